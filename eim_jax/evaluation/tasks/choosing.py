"""What tasks of choices share: a choice is read from the answer's text, or it is the one with the likeliest text."""

import abc
from collections.abc import Mapping, Sequence

import numpy as np

from eim_jax.data import tokenize
from eim_jax.data.rows import row_options
from eim_jax.data.samples import Sample, Split
from eim_jax.evaluation.tasks.questions import Questions
from eim_jax.evaluation.tasks.task import Asked, Predicted
from eim_jax.generation.batched_inference import likelihoods
from eim_jax.generation.visual_tokens import VisualTokens
from eim_jax.models.vlm import VLM
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs


class Choosing(Questions):
    """Questions that let choose. With config.decode.answers="likelihood" the text of an answer does not count."""

    ended = True  # whether a choice's text is weighed with the token that ends an answer (config.data.eos)

    @abc.abstractmethod
    def responses(self, split: Split) -> Mapping[str, Sequence[str]]:
        """Returns by sample id what a right answer would be for each choice, in their order."""

    @abc.abstractmethod
    def named(self, split: Split, key: str, text: str) -> int | None:
        """Returns the place of the choice that an answer's text names, None where it names none."""

    def predict(self, inputs: Inputs, vlm: VLM, params: Flat, asked: Asked) -> Predicted:
        """Returns the likelihoods of the right responses, and where they are asked for the likeliest choices."""
        found = super().predict(inputs, vlm, params, asked)
        if inputs.config.decode.answers != "likelihood":
            return found
        responses = self.responses(asked.split)
        end = self.ended and inputs.config.data.eos
        return found._replace(choice=likeliest(inputs, vlm, params, asked.split, responses, found.visual, end=end))

    def chosen(self, asked: Asked, predicted: Predicted, outputs: Mapping[str, str]) -> dict[str, int | None]:
        """Returns the place of each question's choice."""
        if predicted.choice is not None:
            return dict(predicted.choice)
        return {key: self.named(asked.split, key, text) for key, text in outputs.items()}


def likeliest(
    inputs: Inputs,
    vlm: VLM,
    params: Flat,
    split: Split,
    responses: Mapping[str, Sequence[str]],
    visual: VisualTokens,
    *,
    end: bool,
) -> dict[str, int]:
    """Returns the place of each question's response that is the most probable after it, the first of equals.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      split: the questions.
      responses: by sample id, those to choose from.
      visual: of the questions' images.
      end: whether the token that ends an answer belongs to each.
    """
    samples = [
        Sample(f"{sample.id}/{place}", sample.image, sample.instruction, text)
        for sample in split.samples
        for place, text in enumerate(responses[sample.id])
    ]
    data = inputs.config.data
    how = {**row_options(data), "cut": "balanced"}  # a long question must not cost a choice what tells it apart
    every = Split(split.name, tuple(samples), split.images)
    encoded = tokenize.encode_split(every, inputs.lm_tokenizer, data.max_tokens, end, **how)
    images = [sample.image for sample in samples]
    found, _ = likelihoods(inputs, vlm, params, visual, images, encoded, "likelihood of the choices")
    ends = np.cumsum([len(responses[sample.id]) for sample in split.samples])
    parts = np.split(found, ends[:-1])
    return {sample.id: int(np.argmax(part)) for sample, part in zip(split.samples, parts, strict=True)}

"""The tasks of one's own questions: "answers" (exact match), "vqa", "choices", and "descriptions" (caption scores)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eim_jax.data import tokenize
from eim_jax.data.datasets.instruct_choices import LETTERS
from eim_jax.data.rows import row_options
from eim_jax.data.samples import Sample, Split
from eim_jax.evaluation.metrics import caption_scores, vqa
from eim_jax.evaluation.metrics.caption_overlap import caption_rows
from eim_jax.evaluation.metrics.open_answers import choice_rows, same
from eim_jax.evaluation.tasks.questions import Questions
from eim_jax.evaluation.tasks.task import Asked, Item, Option, Predicted, Predictions, Reading, Scored
from eim_jax.generation.batched_inference import likelihoods
from eim_jax.generation.visual_tokens import VisualTokens
from eim_jax.models.vlm import VLM
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress


class Answers(Questions):
    """Open answers, right where they equal an accepted one but for case and outer white space ("exact_match")."""

    name = "answers"
    intervals = True

    def settings(self, inputs: Inputs) -> str:
        """Returns what the answers are scored as: one file may be scored by several tasks."""
        return f", scored as {self.name}"


class Vqa(Answers):
    """Open answers by the rule of the VQA challenge ("vqa_accuracy"): ten people's answers to each question."""

    name = "vqa"

    def right(self, answer: str, references: Sequence[str]) -> bool:
        """Says whether the page marks an answer as right: worth a half at least."""
        return vqa.accuracy(answer, references) >= 0.5


class Choices(Answers):
    """One of several choices ("choice_accuracy", and "unparsed", the share of answers that name none).

    With config.decode.answers="likelihood" the choice is the one whose text is the most probable after the question.
    """

    name = "choices"
    unread = "names no choice"

    def settings(self, inputs: Inputs) -> str:
        """Returns how a choice is made."""
        return f"{super().settings(inputs)}, answers {inputs.config.decode.answers}"

    def predict(self, inputs: Inputs, vlm: VLM, params: Flat, asked: Asked) -> Predicted:
        """Returns the likelihoods of the right choices, and where they are asked for the most likely ones."""
        found = super().predict(inputs, vlm, params, asked)
        if inputs.config.decode.answers != "likelihood":
            return found
        return found._replace(choice=likeliest(inputs, vlm, params, asked, found.visual))

    def record(
        self, inputs: Inputs, asked: Asked, predicted: Predicted, outputs: Mapping[str, str], method: str
    ) -> dict[str, Any]:
        """Returns {"prompt", "decoding", "results" (the choice's place, -1: none was named), "outputs"}."""
        record = super().record(inputs, asked, predicted, outputs, method)
        chosen = _chosen(asked, predicted, outputs)
        return {**record, "results": {key: -1 if place is None else place for key, place in chosen.items()}}

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Scores the choices."""
        found = score_choices(asked, _chosen(asked, predicted, outputs))
        return Scored({**found.scores, **predicted.scores}, {**found.rows, **predicted.rows})

    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns the questions with their choices, the right one marked."""
        choices, truth = _choices(split), _truth(split)
        found = []
        for item in super().items(split, limit) or ():
            named = zip(LETTERS, choices[item.id], strict=False)
            shown = tuple(Option(f"({name})", text, i == truth[item.id]) for i, (name, text) in enumerate(named))
            found.append(replace(item, options=shown, truth=""))
        return found

    def read(self, item: Item, predictions: Predictions) -> Reading:
        """Returns the chosen one."""
        place = (predictions.results or {}).get(item.id, -1)
        if type(place) is not int or not -1 <= place < len(item.options):
            raise ValueError(f"question {item.id}: the prediction is choice {place!a:.20} of {len(item.options)}")
        return Reading(None, False) if place < 0 else Reading(item.options[place].name, item.options[place].right)


class Descriptions(Answers):
    """Texts about pictures, compared with people's as captions are: BLEU, METEOR, ROUGE-L, CIDEr, SPICE."""

    name = "descriptions"
    texts = "descriptions"
    told = "Descriptions written for {:,} test pictures."

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Compares the texts with the references, by the reference scorers."""
        references = self.references(asked)
        with progress(f"scores of {method}", 1) as advance:
            found = caption_scores.score(outputs, references, java=inputs.config.decode.java)
            rows = caption_rows(outputs, references)
            advance(1)
        return Scored({**predicted.scores, **found}, {**rows, **predicted.rows})


def read_choice(text: str, choices: Sequence[str]) -> int | None:
    """Returns the place of the choice that an answer names: by its text, or by its letter; None where it names none.

    >>> read_choice("Red.", ("blue", "red")), read_choice("(A) blue", ("blue", "red")), read_choice("I", ("a", "b"))
    (1, 0, None)
    """
    said = text.strip().rstrip(".")
    for place, choice in enumerate(choices):
        if same(said, (choice, choice.rstrip("."))):
            return place
    letter = re.match(r"\(?([A-Z])(?:[).:]|$)", said)
    place = LETTERS.index(letter[1]) if letter else len(choices)
    return place if place < len(choices) else None


def score_choices(asked: Asked, chosen: Mapping[str, int | None]) -> Scored:
    """Returns the accuracy and the share of answers that name no choice.

    Args:
      asked: the questions.
      chosen: the place of the choice that each answer names, None where it names none.
    """
    truth = _truth(asked.split)
    rows = choice_rows([chosen[key] == truth[key] for key in asked.ids])
    unread = sum(place is None for place in chosen.values()) / len(chosen)
    accuracy = sum(right for right, _ in rows["choice_accuracy"]) / len(chosen)
    return Scored({"choice_accuracy": accuracy, "unparsed": unread}, rows)


def likeliest(inputs: Inputs, vlm: VLM, params: Flat, asked: Asked, visual: VisualTokens) -> dict[str, int]:
    """Returns the place of each question's choice whose text is the most probable, the first of equals.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      asked: the questions.
      visual: of their images.
    """
    choices = _choices(asked.split)
    samples = [
        Sample(f"{sample.id}/{place}", sample.image, sample.instruction, text)
        for sample in asked.split.samples
        for place, text in enumerate(choices[sample.id])
    ]
    data = inputs.config.data
    how = {**row_options(data), "cut": "balanced"}  # a long question must not cost a choice what tells it apart
    every = Split(asked.split.name, tuple(samples), asked.split.images)
    encoded = tokenize.encode_split(every, inputs.lm_tokenizer, data.max_tokens, data.eos, **how)
    images = [sample.image for sample in samples]
    found, _ = likelihoods(inputs, vlm, params, visual, images, encoded, "likelihood of the choices")
    ends = np.cumsum([len(choices[sample.id]) for sample in asked.split.samples])
    parts = np.split(found, ends[:-1])
    return {sample.id: int(np.argmax(part)) for sample, part in zip(asked.split.samples, parts, strict=True)}


def _chosen(asked: Asked, predicted: Predicted, outputs: Mapping[str, str]) -> dict[str, int | None]:
    if predicted.choice is not None:
        return dict(predicted.choice)
    choices = _choices(asked.split)
    return {key: read_choice(text, choices[key]) for key, text in outputs.items()}


def _choices(split: Split) -> Mapping[str, tuple[str, ...]]:
    """The choices of each sample, from the split's field `choices`."""
    found = getattr(split, "choices", None)
    missing = [sample.id for sample in split.samples if not (found or {}).get(sample.id)]
    if missing:
        raise ValueError(f"split {split.name!r}: the task 'choices' needs choices, and sample {missing[0]} has none")
    return found or {}


def _truth(split: Split) -> dict[str, int]:
    choices = _choices(split)
    return {sample.id: choices[sample.id].index(sample.response) for sample in split.samples}


OPEN_ANSWERS = (Answers(), Vqa(), Choices(), Descriptions())

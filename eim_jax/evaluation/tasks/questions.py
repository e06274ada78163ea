"""What tasks of questions share: one answer a sample, after its instruction and its image."""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eim_jax.data import tokenize
from eim_jax.data.conversation import readable
from eim_jax.data.rows import row_options
from eim_jax.data.samples import Sample, Split
from eim_jax.evaluation.metrics.likelihood import likelihood_rows
from eim_jax.evaluation.metrics.metric import Rows
from eim_jax.evaluation.tasks.task import Asked, Item, Predicted, Predictions, Reading, Scored, Task
from eim_jax.generation.batched_inference import likelihoods, pick
from eim_jax.generation.visual_tokens import VisualTokens, encode_images
from eim_jax.models.vlm import VLM
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs

NAMED = 5  # ids named where many are missing


class Questions(Task):
    """Questions about images and texts. As it stands, the task of open answers; options and yes/no are built on it.

    Yields `nll` in nats a token of the right responses, `nll_image` of those about a picture, and `nll_image_shuffled`,
    the same with another picture: the gap says whether the model looks; and every metric of METRICS that names the task
    and measures texts by itself.

    A task of open answers of your own is an object with a name, and `right` where more than equality counts:

    >>> class Spelling(Questions):
    ...     name = "spelling"
    >>> Spelling().right("Two ", ["two"])
    True
    """

    likelihoods = ("nll", "nll_image", "nll_image_shuffled")

    def ask(self, split: Split, limit: int = 0) -> Asked:
        """Returns a text for every sample, up to the limit, each an item of its own."""
        samples = split.samples[: limit or None]
        names = [self.item_of(split, sample) for sample in samples]
        place = {name: i for i, name in enumerate(dict.fromkeys(names))}
        own = tuple(place[name] for name in names)
        return Asked(
            split=replace(split, samples=samples),
            ids=tuple(sample.id for sample in samples),
            images=tuple(sample.image for sample in samples),
            prompts=tuple(sample.instruction for sample in samples),
            items=tuple(place),
            item_of_text=own,
            item_of_sample=own,
        )

    def item_of(self, split: Split, sample: Sample) -> str:
        """Returns the id of what is drawn again for intervals: the question itself."""
        return sample.id

    def predict(self, inputs: Inputs, vlm: VLM, params: Flat, asked: Asked) -> Predicted:
        """Returns the likelihoods of the right responses."""
        visual = encode_images(inputs, vlm, params, asked.split, asked.images)
        return Predicted(visual, *response_likelihoods(inputs, vlm, params, asked, visual))

    def record(
        self, inputs: Inputs, asked: Asked, predicted: Predicted, outputs: Mapping[str, str], method: str
    ) -> dict[str, Any]:
        """Returns {"prompt", "decoding", "outputs"}."""
        digest = hashlib.sha256("\n".join(asked.prompts).encode()).hexdigest()
        decoding = {**asdict(inputs.config.decode), "methods": [method]}
        return {"prompt": {"sha256": digest}, "decoding": decoding, "outputs": dict(outputs)}

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Returns the likelihoods alone; what METRICS measure is added by the caller."""
        return Scored(dict(predicted.scores), dict(predicted.rows))

    def references(self, asked: Asked) -> dict[str, Sequence[str]]:
        """Returns the split's reference answers of each sample; where it has none, its response."""
        known = asked.split.references
        return {sample.id: known.get(sample.id, (sample.response,)) for sample in asked.split.samples}

    def right(self, answer: str, references: Sequence[str]) -> bool:
        """Says whether the page marks an answer as right: equal to a reference but for case and outer white space."""
        return answer.strip().lower() in {text.strip().lower() for text in references}

    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns one item a sample: its instruction, and its references as the truth."""
        asked = self.ask(split, limit)
        references = self.references(asked)
        return [
            Item(
                sample.id,
                picture_of(split, sample),
                readable(sample.instruction),
                truth=" / ".join(references[sample.id]),
                accepted=tuple(references[sample.id]),
            )
            for sample in asked.split.samples
        ]

    def read_predictions(self, path: Path, found: Any) -> Predictions:
        """Reads {"prompt", "decoding", "results" (where the task chooses), "outputs"}."""
        return read_answers(path, found)

    def read(self, item: Item, predictions: Predictions) -> Reading:
        """Takes the text as it is."""
        text = predictions.outputs[item.id]
        return Reading(text.strip(), self.right(text, item.accepted))


def response_likelihoods(
    inputs: Inputs, vlm: VLM, params: Flat, asked: Asked, visual: VisualTokens
) -> tuple[dict[str, float], dict[str, Rows]]:
    """Returns nats a token of all responses; where there are two images at least, of those about one, and with another.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      asked: the questions.
      visual: of their images.

    Returns:
      scores by metric key, and each item's rows.
    """
    data, items = inputs.config.data, len(asked.items)
    encoded = tokenize.encode_split(asked.split, inputs.lm_tokenizer, data.max_tokens, data.eos, **row_options(data))
    images, own = asked.images, np.array(asked.item_of_sample)
    loss, count = likelihoods(inputs, vlm, params, visual, images, encoded, "likelihood of the responses")
    scores = {"nll": float(-loss.sum() / max(count.sum(), 1))}
    rows = likelihood_rows("nll", -loss, count, own, items)
    pictured = [place for place, image in enumerate(images) if image is not None]
    shown = list(dict.fromkeys(images[place] for place in pictured))
    if len(shown) < 2:
        return scores, rows
    other = dict(zip(shown, [*shown[1:], shown[0]], strict=True))
    swapped, theirs = [other[images[place]] for place in pictured], pick(encoded, pictured)
    shuffled, _ = likelihoods(inputs, vlm, params, visual, swapped, theirs, "likelihood with other pictures")
    for key, nats in (("nll_image", -loss[pictured]), ("nll_image_shuffled", -shuffled)):
        scores[key] = float(nats.sum() / max(count[pictured].sum(), 1))
        rows |= likelihood_rows(key, nats, count[pictured], own[pictured], items)
    return scores, rows


def picture_of(split: Split, sample: Sample) -> Callable[[], Image.Image] | None:
    """Returns a function that gives a sample's picture; None for text alone."""
    return None if sample.image is None else functools.partial(split.images.__getitem__, sample.image)


def read_answers(path: Path, found: Any) -> Predictions:
    """Reads the content of a predictions_test.json of questions.

    Raises:
      ValueError: names the file and what it lacks.
    """
    if isinstance(found, list):
        raise ValueError(f"{path}: holds captions, not answers to questions: these are another task's predictions")
    if not isinstance(found.get("outputs"), Mapping):
        raise ValueError(f'{path}: holds no "outputs" (raw text by question id)')
    outputs, results = found["outputs"], found.get("results")
    for name, text in outputs.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: outputs.{name!a:.60} is not a text, but {text!a:.60}")
    if results is not None and not isinstance(results, Mapping):
        raise ValueError(f'{path}: "results" is not an object of choices by question id, but {results!a:.60}')
    if results is not None and results.keys() != outputs.keys():
        some = some_of(results.keys() ^ outputs.keys())
        raise ValueError(f'{path}: {some} in only one of "results" and "outputs"')
    settings = {name: _words(found[name]) for name in ("prompt", "decoding") if found.get(name)}
    return Predictions(dict(outputs), None if results is None else dict(results), settings)


def some_of(ids) -> str:
    """Returns the first ids in words, numbers in order of size."""
    ids = sorted(ids, key=lambda key: (not key.isdigit(), len(key), key))
    return ", ".join(ids[:NAMED]) + (", ..." if len(ids) > NAMED else "")


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(text)}" for name, text in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text  # a checksum's start tells it apart

"""A task: what a test split asks of a model, how its texts are scored, and how the report shows them."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import METRICS, Metric, intervals, metric_of
from eim_jax.evaluation.metrics.metric import Rows
from eim_jax.generation.visual_tokens import VisualTokens
from eim_jax.models.vlm import VLM
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs


@dataclasses.dataclass(frozen=True)
class Asked:
    """What of a test split a model is asked.

    Attributes:
      split: the split with the samples that eval_limit leaves.
      ids: of the texts that the model writes: images, or questions.
      images: for each text the row of its image in split.images, None for text alone.
      prompts: for each text what precedes it, "" for nothing.
      items: ids of what is drawn again for intervals: an image, a question, a picture with its questions.
      item_of_text: the item of each text.
      item_of_sample: the item of each of the split's samples.
    """

    split: Split
    ids: tuple[str, ...]
    images: tuple[int | None, ...]
    prompts: tuple[str, ...]
    items: tuple[str, ...]
    item_of_text: tuple[int, ...]
    item_of_sample: tuple[int, ...]


class Predicted(NamedTuple):
    """What a model says of a test split whatever the decoding: likelihoods, and for some tasks a choice.

    `scores` are likelihoods in nats a token, `rows` each item's share in them.
    """

    visual: VisualTokens
    scores: dict[str, float]
    rows: dict[str, Rows]
    choice: Mapping[str, int] | None = None


class Scored(NamedTuple):
    """Scores by metric key, with the scorer's "notes", and the rows of those that have them."""

    scores: dict[str, Any]
    rows: dict[str, Rows]


@dataclasses.dataclass(frozen=True)
class Option:
    """One of a question's options as the page shows it."""

    name: str
    text: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Item:
    """One test question as the page shows it; items whose ids agree up to their last "/" share a card.

    Attributes:
      id: of the sample.
      image: its picture, a function that gives it, or None (text only).
      question: in words.
      context: what belongs to it, "" for nothing.
      options: to choose from, shown with the right one marked; () for none.
      truth: the right answer in words, where no option is marked.
      accepted: the texts that are right, for tasks that compare texts.
    """

    id: str
    image: Image.Image | Callable[[], Image.Image | None] | None
    question: str
    context: str = ""
    options: tuple[Option, ...] = ()
    truth: str = ""
    accepted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One arm's predictions_test.json: raw texts by id, what was chosen where the file says so, and its settings."""

    outputs: dict[str, str]
    results: dict[str, Any] | None = None
    settings: dict[str, str] = dataclasses.field(default_factory=dict)


class Reading(NamedTuple):
    """What an answer was read as (None: as nothing), and whether that is right."""

    choice: str | None
    right: bool


class Task(abc.ABC):
    """One kind of test. An entry of TASKS; a split names it in its field `task`.

    `Questions` is the base for tasks of one text a sample: what is missing there is one method for the report.

    Attributes:
      name: its key in TASKS.
      counted: what the test holds, in words: "images", "questions".
      texts: what the model writes, in words: "captions", "answers".
      told: a sentence of the page's summary; {:,} is the number of texts.
      unread: what the page says of an answer that `read` could not read.
      likelihoods: the keys of `predict`'s scores, some of which a split may lack.
      intervals: whether every score that has rows gets a bootstrap interval beside it, KEY_low and KEY_high.
    """

    name: str
    counted: str = "questions"
    texts: str = "answers"
    told: str = "Answers given to {:,} test questions."
    unread: str = "not readable"
    likelihoods: tuple[str, ...] = ("nll",)
    intervals: bool = False

    # What is asked.

    @abc.abstractmethod
    def ask(self, split: Split, limit: int = 0) -> Asked:
        """Returns what of a test split is asked; `limit` is config.data.eval_limit, 0 for all."""

    def count(self, split: Split) -> int:
        """Returns how many `counted` a test split holds."""
        return len(split)

    def settings(self, inputs: Inputs) -> str:
        """Returns the words of the settings line that are the task's own, each after ", "."""
        del inputs
        return ""

    # What the model does.

    @abc.abstractmethod
    def predict(self, inputs: Inputs, vlm: VLM, params: Flat, asked: Asked) -> Predicted:
        """Returns what the model says whatever the decoding; the texts themselves are the caller's to generate.

        Args:
          inputs: the run's.
          vlm: the model.
          params: its parameters.
          asked: what is asked.
        """

    # What its texts are worth.

    @abc.abstractmethod
    def record(
        self, inputs: Inputs, asked: Asked, predicted: Predicted, outputs: Mapping[str, str], method: str
    ) -> Any:
        """Returns the content of predictions_test.json: the texts of one decoding method.

        Args:
          inputs: the run's.
          asked: what was asked.
          predicted: what the model said whatever the decoding.
          outputs: the texts by id, in the order of `asked.ids`.
          method: "greedy", "beam" or "nucleus".
        """

    @abc.abstractmethod
    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Scores the texts of one decoding method.

        Args:
          inputs: the run's.
          asked: what was asked.
          predicted: what the model said whatever the decoding; its scores and rows belong to the result.
          outputs: the texts by id, in the order of `asked.ids`.
          directory: the arm's, for files in a form of the task's own.
          method: "greedy", "beam" or "nucleus".
        """

    @abc.abstractmethod
    def references(self, asked: Asked) -> dict[str, Sequence[str]]:
        """Returns the texts that each text is measured against, by id."""

    # What the report shows.

    @abc.abstractmethod
    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns the questions of the page's cards; None: the page shows texts beside the images' references."""

    @abc.abstractmethod
    def read_predictions(self, path: Path, found: Any) -> Predictions:
        """Reads the content of a predictions_test.json.

        Raises:
          ValueError: it is not of the form that `record` gives.
        """

    def read(self, item: Item, predictions: Predictions) -> Reading:
        """Returns what an arm's answer to an item of `items` was read as."""
        raise NotImplementedError(f"task {self.name!r} shows questions, so it has to say what an answer is read as")


def measured(task: Task, asked: Asked, outputs: Mapping[str, str]) -> Scored:
    """Returns the scores and rows of every metric of METRICS that names the task and measures texts by itself.

    Args:
      task: the split's.
      asked: what was asked.
      outputs: the texts by id, in the order of `asked.ids`.
    """
    scores, rows = {}, {}
    for metric in METRICS.values():
        if isinstance(metric, Metric) and metric.measure is not None and task.name in metric.tasks:
            each = np.asarray(metric.measure(outputs, task.references(asked)), np.float64)
            sums = np.zeros((len(asked.items), each.shape[1]))
            np.add.at(sums, np.asarray(asked.item_of_text), each)
            value = metric.total(sums)
            scores[metric.key] = value if np.isfinite(value) else None
            rows[metric.key] = sums.tolist()
    return Scored(scores, rows)


def with_intervals(task: Task, found: Scored) -> dict[str, Any]:
    """Returns the scores, with KEY_low and KEY_high beside each that has rows where the task asks for intervals.

    Args:
      task: the split's.
      found: its scores and their rows.
    """
    scores = dict(found.scores)
    for key, rows in found.rows.items() if task.intervals else ():
        if scores.get(key) is not None and (span := intervals.bounds(metric_of(key), rows)) is not None:
            scores |= {f"{key}_low": span[0], f"{key}_high": span[1]}
    return scores

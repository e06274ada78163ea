"""Scores of a model while it trains: its task's, on some of the validation split and of what it is trained on."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from eim_jax.config import ConfigError
from eim_jax.data.datasets import data_set, load_split
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import known_metrics, metric_of
from eim_jax.evaluation.tasks import TASKS, task_of
from eim_jax.evaluation.tasks.task import Asked, Predicted, Task, measured
from eim_jax.generation.batched_inference import generate_text
from eim_jax.generation.visual_tokens import VisualTokens
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import silent

DISTINCT = "distinct"  # how many different texts there are, of all: a model that does not look says one text often


class WhileTraining:
    """A `training.scorer.Scorer`: "eval/NAME" on config.eval.split, "train/NAME" on the training split's beginning."""

    def __init__(self, inputs: Inputs, held_out: Split):
        settings = inputs.config.eval
        decode = replace(inputs.config.decode, methods=(settings.method,), java=False)  # a JVM takes longer than all
        self._inputs = replace(inputs, config=replace(inputs.config, decode=decode))
        self._texts = settings.method != "none"
        self._parts: list[tuple[str, Task, Split, int, bool]] = [
            ("eval", task_of(held_out), held_out, settings.limit, self._texts)
        ]
        if settings.train:
            # A training split whose own task is another (a chatbot that is tested on MME) has likelihoods alone.
            same = type(inputs.samples) is type(held_out) and inputs.samples.task == held_out.task
            task = task_of(held_out) if same else TASKS["answers"]
            self._parts.append(("train", task, inputs.samples, settings.train, self._texts and same))

    def __call__(self, vlm: VLM, params: Flat) -> dict[str, float]:
        """Returns the scores; the terminal shows nothing of how they are computed."""
        found = {}
        with silent():
            for name, task, split, limit, texts in self._parts:
                scores = self._score(task, split, limit, texts, vlm, params)
                found |= {f"{name}/{key}": value for key, value in scores.items()}
        return found

    def sense(self, key: str) -> int:
        """Returns which way the metric of "eval/NAME" is better."""
        return metric_of(key.partition("/")[2]).sense

    def _score(self, task: Task, split: Split, limit: int, texts: bool, vlm: VLM, params: Flat) -> dict[str, float]:
        inputs, method = self._inputs, self._inputs.config.eval.method
        asked = task.ask(split, limit)
        predicted = task.predict(inputs, vlm, params, asked)
        scores = dict(predicted.scores)
        if texts:
            images, prompts = asked.images, asked.prompts
            said = generate_text(inputs, vlm, params, predicted.visual, images, prompts, method, "", quiet=True)
            if processes.is_first():
                outputs = dict(zip(asked.ids, said, strict=True))
                scores = self._of_texts(task, asked, predicted, outputs)
        return _numbers(scores)

    def _of_texts(self, task: Task, asked: Asked, predicted: Predicted, outputs: dict[str, str]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:  # for a task that scores what it has written
            method = self._inputs.config.eval.method
            found = task.score(self._inputs, asked, predicted, outputs, Path(folder), method).scores
        return found | measured(task, asked, outputs).scores | {DISTINCT: len(set(outputs.values())) / len(outputs)}

    def check(self, key: str) -> None:
        """Refuses to choose a step by a score that the run will not have; asks no model, so that every process knows.

        Raises:
          ConfigError: says which scores there are.
        """
        if not self.sense(key):
            known = ", ".join(f"eval/{metric.key}" for metric in known_metrics() if metric.sense)
            raise ConfigError(
                f"config.checkpoint.metric={key!r}: names no score of which one side is the better; such are {known}"
            )
        there: set[str] = set()
        for name, task, split, limit, texts in self._parts:
            there |= {f"{name}/{metric}" for metric in task.likelihoods}
            if key not in there and texts and key.startswith(f"{name}/"):
                asked = task.ask(split, limit)
                # What the right texts would be scored as: the names are those of any texts.
                right = {text: references[0] for text, references in task.references(asked).items()}
                nothing = Predicted(cast(VisualTokens, None), dict.fromkeys(task.likelihoods, 0.0), {})
                with silent():
                    found = _numbers(self._of_texts(task, asked, nothing, right))
                there |= {f"{name}/{metric}" for metric in found}
        if key not in there:
            why = "" if self._texts else "; config.eval.method='none' scores no texts"
            known = ", ".join(sorted(metric for metric in there if self.sense(metric)))
            raise ConfigError(f"config.checkpoint.metric={key!r} is no score of this run: it has {known}{why}")


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Those that are numbers, without the ends of intervals."""
    return {
        key: float(value)
        for key, value in scores.items()
        if isinstance(value, int | float) and math.isfinite(value) and not key.endswith(("_low", "_high"))
    }


def while_training(inputs: Inputs) -> WhileTraining | None:
    """Returns what scores a run's arms while they train; None where config.eval asks for nothing.

    Raises:
      ConfigError: the data have no such split, or config.checkpoint.metric is no score of this run with a better side.
    """
    config = inputs.config
    if not (config.eval.every_steps or config.eval.every_epochs):
        return None
    kind = data_set(config.data)
    name = "test" if "val" not in kind.scored else config.eval.split
    if name != config.eval.split:
        raise ConfigError(
            f"config.eval.split={config.eval.split!r}: data of kind {kind.name!r} has no such split; set "
            "config.eval.split='test'"
        )
    # "test" of load_split is config.data.scored, which may be another.
    named = replace(config, data=replace(config.data, scored=name))
    with processes.first_alone("scores while training"):
        split = load_split(named, name, inputs.workdir)
    if split is None:
        raise ConfigError(f"config.eval has nothing to score: {kind.unscored}")
    found = WhileTraining(inputs, split)
    if config.checkpoint.keep == "best":
        found.check(config.checkpoint.metric)
    return found

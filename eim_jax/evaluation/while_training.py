"""Scores of a model while it trains: its task's, on some of the validation split and of what it is trained on."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from eim_jax.config import ConfigError
from eim_jax.data.datasets import data_set, load_split
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import known_metrics, metric_of
from eim_jax.evaluation.tasks import TASKS, task_of
from eim_jax.evaluation.tasks.task import Task, measured
from eim_jax.generation.batched_inference import generate_text
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
                with tempfile.TemporaryDirectory() as folder:  # for a task that scores what it has written
                    scores = task.score(inputs, asked, predicted, outputs, Path(folder), method).scores
                scores |= measured(task, asked, outputs).scores | {DISTINCT: len(set(said)) / len(said)}
        return {
            key: float(value)
            for key, value in scores.items()
            if isinstance(value, int | float) and math.isfinite(value) and not key.endswith(("_low", "_high"))
        }


def while_training(inputs: Inputs) -> WhileTraining | None:
    """Returns what scores a run's arms while they train; None where config.eval asks for nothing.

    Raises:
      ConfigError: the data have no such split, or config.checkpoint.metric is no score with a better side.
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
    if config.checkpoint.keep == "best" and not found.sense(config.checkpoint.metric):
        known = ", ".join(f"eval/{metric.key}" for metric in known_metrics() if metric.sense)
        raise ConfigError(
            f"config.checkpoint.metric={config.checkpoint.metric!r}: names no score of which one side is the better; "
            f"such are {known}"
        )
    return found

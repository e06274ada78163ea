"""Scores while a stage trains: when they are due, and which step was the best by one of them."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from eim_jax.config import Eval
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.training.partition import Flat


@runtime_checkable
class Scorer(Protocol):
    """What scores a model while it trains (evaluation/while_training.py); it changes no parameter."""

    def __call__(self, vlm: VLM, params: Flat) -> dict[str, float]:
        """Returns {"eval/nll": ..., ...}; with several processes only the first has the scores of texts."""
        ...

    def sense(self, key: str) -> int:
        """Returns +1 where a higher score is better, -1 where a lower one is, 0 where neither is."""
        ...


def is_due(settings: Eval, step: int, steps: int, per_epoch: int) -> bool:
    """Returns whether a stage is scored after a step: by steps, by epochs, and at its end.

    Args:
      settings: config.eval.
      step: steps that are done.
      steps: of the stage.
      per_epoch: of an epoch.

    >>> [step for step in range(1, 13) if is_due(Eval(every_epochs=0.5), step, 12, 5)]
    [3, 5, 8, 10, 12]
    """
    if not (settings.every_steps or settings.every_epochs):
        return False
    if step == steps or (settings.every_steps and step % settings.every_steps == 0):
        return True
    every = settings.every_epochs * per_epoch
    return bool(every) and math.floor(step / every) > math.floor((step - 1) / every)


class Best:
    """The best step of a stage by one score; `state` is its record in a checkpoint."""

    def __init__(self, metric: str, sense: int):
        self.metric, self._sense = metric, sense
        self.step: int | None = None
        self.value: float | None = None

    def improves(self, step: int, scores: Mapping[str, float]) -> bool:
        """Takes the step as the best where it is better than all before; the same on every process."""
        value = scores.get(self.metric, math.nan)
        better = math.isfinite(value) and (self.value is None or self._sense * (value - self.value) > 0)
        if not processes.agreed(int(better)):
            return False
        self.step, self.value = step, value
        return True

    def state(self) -> dict[str, Any]:
        """Returns {"step", "metric", "value"}; {} before any step was scored."""
        return {} if self.step is None else {"step": self.step, "metric": self.metric, "value": self.value}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`; one that chose by another score is forgotten."""
        if state.get("metric") == self.metric:
            self.step, self.value = state["step"], state["value"]

"""Segmented training in a loop of one's own: a stage as a partition of any parameter tree, and a sequence of stages.

`arm.py` runs a whole config; this is for those who have a model, a loss and a loop already.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from eim_jax.config.checks import ConfigError
from eim_jax.training.partition import FROZEN, Flat, PartitionError, flatten, match_patterns, unflatten


@dataclass(frozen=True)
class Partition:
    """One stage's view of the parameters: what it trains, what it leaves alone, and the optimizer that knows both.

    Attributes:
      trained: {"a/b/c": leaf} of the leaves that the stage trains: differentiate with respect to these alone.
      frozen: {"a/b/c": leaf} of all others.
      tx: an `optax.partition` that gives frozen leaves zero updates and no state; it takes a tree of any of these
        paths, nested or flat: `trained` alone, or all parameters.
    """

    trained: Flat
    frozen: Flat
    tx: optax.GradientTransformation

    def merge(self, trained: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns the nested tree of all parameters.

        Args:
          trained: {"a/b/c": leaf} in place of `self.trained`, such as the stage's result, or tracers in a loss.
        """
        return unflatten({**self.frozen, **(self.trained if trained is None else trained)})


def partition(params: Mapping[str, Any], train: Mapping[str, optax.GradientTransformation]) -> Partition:
    """Splits parameters into what a stage trains and what it freezes ("gradient truncation", EIM section 3).

    Args:
      params: a tree of dicts, nested or with paths as keys.
      train: regular expression over paths "a/b/c" (full match) -> the optimizer of the leaves that it matches.

    Raises:
      PartitionError: a pattern matches no leaf, or two patterns match one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"st": {"kernel": jnp.ones(2)}, "lm": {"kernel": jnp.ones(3)}}
      >>> stage = partition(params, {"st/.*": optax.sgd(0.1)})
      >>> sorted(stage.trained), sorted(stage.frozen)
      (['st/kernel'], ['lm/kernel'])
      >>> grads = jax.grad(lambda trained: stage.merge(trained)["st"]["kernel"].sum())(stage.trained)
      >>> updates, _ = stage.tx.update(grads, stage.tx.init(stage.trained), stage.trained)
      >>> print(updates["st/kernel"])
      [-0.1 -0.1]
    """
    flat = flatten(params)
    owner = match_patterns(train, flat)
    trained = {path: leaf for path, leaf in flat.items() if path in owner}
    frozen = {path: leaf for path, leaf in flat.items() if path not in owner}

    def label(tree):
        return jax.tree_util.tree_map_with_path(lambda where, _: owner.get(_path_of(where), FROZEN), tree)

    return Partition(trained, frozen, optax.partition({**train, FROZEN: optax.set_to_zero()}, label))


class Stages:
    """A sequence of stages over one parameter tree: each starts from what the last one left, with a new optimizer.

    Args:
      params: a tree of dicts.
      sequence: stage's name -> what `partition` takes as `train`; all patterns are checked before the first stage.

    Raises:
      PartitionError: as `partition`, naming the stage.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"st": {"kernel": jnp.zeros(2)}, "lm": {"kernel": jnp.zeros(2)}}
      >>> stages = Stages(params, {"st": {"st/.*": optax.sgd(0.1)}, "all": {".*": optax.sgd(0.1)}})
      >>> for name, stage in stages:
      ...     result = {path: leaf + 1 for path, leaf in stage.trained.items()}  # stands for the stage's training
      ...     stages.finish(result)
      >>> print(stages.params["st"]["kernel"], stages.params["lm"]["kernel"])
      [2. 2.] [1. 1.]
    """

    def __init__(
        self, params: Mapping[str, Any], sequence: Mapping[str, Mapping[str, optax.GradientTransformation]]
    ) -> None:
        self._flat, self._sequence = flatten(params), dict(sequence)
        self._open: Partition | None = None
        for name, train in self._sequence.items():
            try:
                match_patterns(train, self._flat)
            except PartitionError as error:
                raise PartitionError(f"stage {name!r}: {error}") from error

    @property
    def params(self) -> dict[str, Any]:
        """The nested tree, as the last finished stage left it."""
        return unflatten(self._flat)

    def __iter__(self) -> Iterator[tuple[str, Partition]]:
        """Yields each stage's name and partition; `finish` must be called before the next."""
        for name, train in self._sequence.items():
            self._open = partition(self._flat, train)
            yield name, self._open
            if self._open is not None:
                raise ConfigError(f"stage {name!r} was not finished: give its trained leaves to finish()")

    def finish(self, trained: Mapping[str, Any]) -> None:
        """Takes a stage's result: the leaves of its partition's `trained`, under the same paths.

        Raises:
          ValueError: no stage is open, or the paths are not those that the stage trains.
        """
        if self._open is None:
            raise ValueError("no stage is open: call finish() inside the loop over the stages, once a stage")
        if trained.keys() != self._open.trained.keys():
            odd = sorted(trained.keys() ^ self._open.trained.keys())
            raise ValueError(f"finish() takes exactly the stage's trained leaves; too many or missing: {odd[:5]}")
        self._flat, self._open = {**self._flat, **trained}, None


def _path_of(where: tuple) -> str:
    """A leaf's path from the keys that jax.tree_util gives, in a nested or a flat dict."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in where)

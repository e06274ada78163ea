"""The miniature captioning task as a data set: drawn scenes with five captions each."""

import dataclasses
from pathlib import Path
from typing import Any

from eim_jax.config import ConfigError, Data
from eim_jax.data.bad_items import BadItem
from eim_jax.data.data_set import DataSet
from eim_jax.data.samples import Split


@dataclasses.dataclass(frozen=True)
class MiniatureFields:
    """The fields of `config.data` that the miniature alone reads."""

    scenes: int = 1600  # miniature only: training scenes (five captions each), or questions
    test_items: int = 0  # miniature only: test scenes (0: 400), questions (0: 600), or the chat's images a task (0: 50)


def drawn(own: Any, name: str) -> int | None:
    """How many items of a split are drawn; None: as many as the split has by itself.

    Raises:
      ConfigError: a number below 0.
    """
    if own.test_items < 0:
        raise ConfigError(f"config.data.test_items={own.test_items}: give a number of items, or 0 for the usual one")
    return {"train": own.scenes, "test": own.test_items or None}.get(name)


def _load(data: Data, own: MiniatureFields, name: str, cache: Path) -> tuple[Split, list[BadItem]]:
    from eim_jax.data.miniature import captioning  # here, because the miniature's tasks import from this package

    return captioning.load(name, seed=0, scenes=drawn(own, name)), []


MINIATURE = DataSet("miniature", MiniatureFields, _load, free_on_resume=("test_items",))

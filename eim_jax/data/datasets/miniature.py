"""The miniature captioning task as a data set: drawn scenes with five captions each."""

import dataclasses
from pathlib import Path

from eim_jax.config import Data
from eim_jax.data.bad_items import BadItem
from eim_jax.data.data_set import DataSet
from eim_jax.data.samples import Split


@dataclasses.dataclass(frozen=True)
class MiniatureFields:
    """The fields of `config.data` that the miniature alone reads."""

    scenes: int = 1600  # miniature only: training scenes (five captions each), or questions


def _load(data: Data, own: MiniatureFields, name: str, cache: Path) -> tuple[Split, list[BadItem]]:
    from eim_jax.data.miniature import captioning  # here, because the miniature's tasks import from this package

    return captioning.load(name, seed=0, scenes=own.scenes if name == "train" else None), []


MINIATURE = DataSet("miniature", MiniatureFields, _load)

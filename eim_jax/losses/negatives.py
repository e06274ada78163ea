"""Which keys a query is contrasted with besides its own: `losses.negatives`.

EIM's are all keys of the queue. The others are what that claim is compared with. Keys are the queue's in every case,
made once by frozen towers, so that two settings differ in nothing but the negatives:

| setting | negatives |
|---|---|
| `queue` | every other sample's key |
| `batch` | the keys of the update's other samples: over all devices and micro-batches (CLIP's) |
| `10%` | a fixed tenth of the rows, drawn once: what a queue of a tenth of the data would hold |
| `recent-8` | the keys of the 8 batches before this one, first in, first out (MoCo's window) |

MoCo's queue ages, since the tower that makes its keys trains; a momentum encoder slows that down. Here no key ages: the
window is what is left of MoCo. Keys made by the trained tower itself would be another method.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from eim_jax.config import Losses
from eim_jax.models.batch import Batch

FORMS = "queue, batch, a share of it such as 10%, or recent-8 (the keys of the 8 batches before)"


class BatchRows(NamedTuple):
    """The queue rows of an update.

    Attributes:
      index: of its samples, over all devices and micro-batches.
      before: of the batches before it, by place in the batch; None where no loss asks.
    """

    index: Int[Array, "b"]
    before: Int[Array, "b k"] | None = None

    @classmethod
    def of(cls, batch: Batch) -> "BatchRows":
        """Those of a whole batch."""
        return cls(batch.index, batch.before)


@runtime_checkable
class Negatives(Protocol):
    """What every setting answers."""

    @property
    def before(self) -> int:
        """How many earlier batches' rows a batch has to hold."""
        ...

    def rows(self, batch: BatchRows, count: int) -> Int[Array, "m"] | Int[np.ndarray, "m"] | None:
        """The rows that are negatives in an update, None: all (`queue_nce`'s `among`).

        Args:
          batch: the update's rows.
          count: of the queue.
        """
        ...

    def like(self, batch: int, count: int) -> Int[np.ndarray, "m"] | None:
        """Rows such as an update of `batch` samples may have, by which a queue is judged before training."""
        ...


@dataclass(frozen=True)
class WholeQueue:
    """Every other sample's key: the paper's."""

    before: int = 0

    def rows(self, batch: BatchRows, count: int) -> None:
        """All."""
        return None

    def like(self, batch: int, count: int) -> None:
        """All."""
        return None


@dataclass(frozen=True)
class InBatch:
    """The keys of the update's other samples."""

    before: int = 0

    def rows(self, batch: BatchRows, count: int) -> Int[Array, "b"]:
        """Those of the whole batch."""
        return batch.index

    def like(self, batch: int, count: int) -> Int[np.ndarray, "m"]:
        """A batch less the own key, which `queue_nce` adds."""
        return _drawn(count, min(max(batch - 1, 1), count))


@dataclass(frozen=True)
class Share:
    """The keys of a fixed part of the samples; a smaller part lies within a larger one.

    Args:
      share: of the rows, rounded up: at least one.
    """

    share: float
    before: int = 0

    def rows(self, batch: BatchRows, count: int) -> Int[np.ndarray, "m"]:
        """The same in every update, stage and run of data of this size."""
        return np.sort(_drawn(count, max(1, int(np.ceil(round(self.share * count, 6))))))

    def like(self, batch: int, count: int) -> Int[np.ndarray, "m"]:
        """Those very rows."""
        return self.rows(BatchRows(jnp.zeros(0, jnp.int32)), count)


@dataclass(frozen=True)
class Recent:
    """The keys of the batches just before; fewer while a stage's first batches fill the window.

    Args:
      before: so many batches.
    """

    before: int

    def rows(self, batch: BatchRows, count: int) -> Int[Array, "m"]:
        """Those that the batch carries; -1 before the stage's first batch, when there are none."""
        assert batch.before is not None, "the loader fills it where a loss's negatives ask for it"
        return batch.before[:, : self.before].reshape(-1)

    def like(self, batch: int, count: int) -> Int[np.ndarray, "m"]:
        """A full window of an epoch."""
        return _drawn(count, min(self.before * batch, count))


def _drawn(count: int, number: int) -> Int[np.ndarray, "m"]:
    return np.random.default_rng(0).permutation(count)[:number].astype(np.int32)


def parse(word: str) -> Negatives | None:
    """What a setting says; None where it says nothing.

    Args:
      word: as in the table above.

    Example:
      >>> parse("10%"), parse("recent-8"), parse("nearest")
      (Share(share=0.1, before=0), Recent(before=8), None)
    """
    named = {"queue": WholeQueue(), "batch": InBatch()}
    if word in named:
        return named[word]
    if (share := re.fullmatch(r"(\d+(?:\.\d+)?)%", word)) and 0 < float(share[1]) <= 100:
        return Share(float(share[1]) / 100)
    if (window := re.fullmatch(r"recent-(\d{1,6})", word)) and int(window[1]):
        return Recent(int(window[1]))
    return None


def negatives_of(settings: Losses, loss: str) -> Negatives:
    """The negatives of a loss.

    Raises:
      ValueError: the setting is no such form.
    """
    word = settings.of("negatives", loss)
    found = parse(word)
    if found is None:
        raise ValueError(f"losses.negatives: {word!r} is none of {FORMS}")
    return found

"""In which order a queue's samples are encoded, how many at a time, and to which length their texts are cut.

Texts are encoded longest first, so that a step's texts have about one length and little of its work is padding. Most
captions have 10 to 16 tokens and one in thousands has 77: padded to that, four fifths of the work would be.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from eim_jax.data.batch_order import best_widths

_ROUND = 8  # widths are multiples of this, which suit vector units
_WIDTHS = 6  # at most; the encoder is compiled once for each
_SAVES = 0.05  # of the slots has to be saved by another width: compiling takes time too
_LEAST = 2**18  # slots of all samples together, below which one width serves


class Step(NamedTuple):
    """Places `start` to `start + rows` of each device's order; texts are cut to `width`, None: whole."""

    start: int
    rows: int
    width: int | None = None


class Steps(NamedTuple):
    """How a queue is built.

    Attributes:
      shards: devices that share the queue.
      held: rows that each of them holds.
      rows: that a device encodes at a time where rows are at their longest.
      steps: one after the other.
      order: [shards, held], each device's own row numbers in the order in which they are encoded; None: as they come.
    """

    shards: int
    held: int
    rows: int
    steps: list[Step]
    order: Int[np.ndarray, "shards held"] | None = None

    def places(self, step: Step) -> Int[np.ndarray, "shards rows"]:
        """Returns the rows of each device that a step encodes; `held` stands for none."""
        numbers = np.arange(step.start, step.start + step.rows, dtype=np.int32)
        if self.order is None:
            return np.tile(numbers, (self.shards, 1))
        found = np.full((self.shards, step.rows), self.held, np.int32)
        real = self.order[:, step.start : step.start + step.rows]
        found[:, : real.shape[1]] = real
        return found

    def stop(self, done: int) -> int:
        """Returns how many rows each device has after so many steps."""
        return min(self.held, self.steps[done - 1].start + self.steps[done - 1].rows) if done else 0

    def described(self) -> dict[str, int | str]:
        """Returns what tells these steps from others, as JSON values."""
        own: dict[str, int | str] = {"shards": self.shards, "held": self.held, "rows": self.rows}
        if self.order is None:
            return own
        digest = hashlib.sha256(self.order.tobytes() + np.array([step[:] for step in self.steps], np.int32).tobytes())
        return {**own, "order": digest.hexdigest()}


def plan_steps(
    count: int, shards: int, batch: int, lengths: Int[np.ndarray, "N"] | None, longest: int, held: int = 0
) -> Steps:
    """Returns the steps in which `count` samples are encoded.

    Args:
      count: samples.
      shards: devices that share the rows.
      batch: samples at a time over all devices, at their longest; of shorter ones as many more as have no more slots.
      lengths: of each sample's text; None: samples are encoded as they come, and whole.
      longest: slots of a row as the fields hold it.
      held: rows of each device; 0: as few as hold all samples.
    """
    held = held or -(-count // shards)
    rows = min(max(1, batch // shards), held)
    if lengths is None or count * longest < _LEAST:
        # The last step encodes some rows of the one before again, so that all are of one shape.
        return Steps(shards, held, rows, [Step(min(start, held - rows), rows) for start in range(0, held, rows)])
    own = np.ones(shards * held, np.int32)  # what fills up the last device is short
    own[:count] = lengths
    own = own.reshape(shards, held)
    order = np.argsort(-own, axis=1, kind="stable").astype(np.int32)
    slots = np.take_along_axis(own, order, axis=1).max(axis=0)  # all devices take a step together
    slots = np.minimum(-(-slots // _ROUND) * _ROUND, longest)
    widths = _widths(slots, int(slots[0]))
    steps, start = [], 0
    while start < held:
        width = int(widths[np.searchsorted(widths, slots[start])])
        step = Step(start, min(_rows(rows, longest, width), held), width)
        steps.append(step)
        start += step.rows
    return Steps(shards, held, rows, steps, order)


def _rows(rows: int, longest: int, width: int) -> int:
    """Rows of this width with no more slots than `rows` of the longest; a multiple of 8 where there are so many."""
    more = rows * longest // width
    return max(rows, more - more % _ROUND)


def _widths(slots: Int[np.ndarray, "held"], longest: int) -> np.ndarray:
    """The fewest widths beside which another one would save little."""
    found, before = (longest,), len(slots) * longest
    for count in range(2, _WIDTHS + 1):
        more = best_widths(slots, longest, count)
        total = int(np.asarray(more)[np.searchsorted(more, slots)].sum())
        if total > (1 - _SAVES) * before:
            break
        found, before = more, total
    return np.asarray(found)

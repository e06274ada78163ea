"""In which order an epoch shows the samples, and to which length the texts of each batch are cut."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from eim_jax.data.mixture import Mixture


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The rows of every step, the same in all processes, from the seed alone.

    Each epoch is a fresh permutation whose incomplete last batch is dropped. With `window` > 1, the samples of so many
    consecutive batches are put in order of their `lengths` before they are cut into batches, and the epoch's batches
    are shuffled: the epoch shows the same samples, in batches of similar lengths. `widths` are the lengths, in order,
    to which batches may be cut, None where no text is read. With a `mixture`, an epoch shows the rows that it says.
    """

    samples: int
    batch_size: int
    seed: int
    lengths: Int[np.ndarray, "N"] | None = None
    window: int = 1
    widths: tuple[int, ...] | None = None
    mixture: Mixture | None = None

    def rows(self, step: int) -> Int[np.ndarray, "b"]:
        """Returns the sample rows of a step, counted over all epochs."""
        epoch, step = divmod(step, self.samples // self.batch_size)
        return _epoch(self, epoch)[step]

    def width(self, rows: Int[np.ndarray, "b"]) -> int | None:
        """Returns the smallest of `widths` that holds the longest text of these rows."""
        if self.widths is None:
            return None
        return self.widths[int(np.searchsorted(self.widths, self.lengths[rows].max()))]

    def with_widths(self, count: int) -> "Order":
        """Returns this order with at most `count` widths, those that pad the first epoch's batches least."""
        longest_of = self.lengths[_epoch(self, 0)].max(1)
        return dataclasses.replace(self, widths=best_widths(longest_of, int(self.lengths.max()), count))


# Drawn once an epoch, which costs a tenth of shuffling row by row in grain; threads work ahead of the epoch's end.
@functools.lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> Int[np.ndarray, "steps b"]:
    size = order.batch_size
    if order.mixture is None:
        rows = np.random.default_rng([order.seed, epoch]).permutation(order.samples).astype(np.int32)
    else:
        rows = order.mixture.rows(order.seed, epoch)
    rows = rows[: order.samples // size * size]
    if order.window > 1:
        reach = order.window * size
        parts = (rows[start : start + reach] for start in range(0, len(rows), reach))
        rows = np.concatenate([part[np.argsort(order.lengths[part], kind="stable")] for part in parts])
    batches = rows.reshape(-1, size)
    if order.window > 1:
        batches = np.random.default_rng([order.seed, epoch, 1]).permutation(batches)
    batches.flags.writeable = False  # shared by all batches of the epoch
    return batches


def best_widths(longest_of: Int[np.ndarray, "steps"], longest: int, count: int) -> tuple[int, ...]:
    """Returns at most `count` widths, `longest` the last, to which batches of these lengths are padded with least loss.

    `longest_of` holds the longest text of each batch. Exact, by dynamic programming over the distinct lengths.

    >>> best_widths(np.array([5, 5, 5, 9, 10]), 12, 3)
    (5, 10, 12)
    """
    if count < 1:
        raise ValueError(f"count is {count}: give at least 1 width")
    values, numbers = np.unique(np.append(longest_of, longest), return_counts=True)
    numbers[-1] -= 1  # `longest` is a width, whether or not a batch needs it
    below = np.concatenate([[0], np.cumsum(numbers)])  # batches shorter than each value
    # cost[i]: tokens of the batches up to values[i] with the best widths so far, the last of which is values[i].
    cost = values * below[1:]
    cuts = [[i] for i in range(len(values))]
    for _ in range(min(count, len(values)) - 1):
        # between[j, i]: widths that end at j, then one at i, which pads all batches between.
        between = cost[:, None] + values[None] * (below[None, 1:] - below[1:, None])
        between[np.tril_indices(len(values))] = np.iinfo(between.dtype).max
        before = between.argmin(0)
        better = between.min(0) < cost
        cuts = [[*cuts[before[i]], i] if better[i] else cuts[i] for i in range(len(values))]
        cost = np.where(better, between.min(0), cost)
    return tuple(int(values[i]) for i in cuts[-1])

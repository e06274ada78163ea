"""Sources mixed by weight: how much of an epoch each gives, while the split keeps every sample, and its row, once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class Mixture:
    """Which rows an epoch shows, where sources have weights.

    An epoch shows as many rows as the split has samples, of each source the part that its weight is of all weights. A
    source's rows are shown in fresh permutations, one after the other over the epochs: none is shown again before all
    the others of its source were. All follows from the seed and the epoch's number, so that a run resumes exactly.
    """

    def __init__(self, source_of: Sequence[int], weights: Sequence[int | float]):
        """Keeps the rows of each source.

        Args:
          source_of: the source of each sample, counted from 0.
          weights: of each source, above 0.
        """
        numbers = np.asarray(source_of, np.int32)
        self.rows_of = [np.flatnonzero(numbers == source).astype(np.int32) for source in range(len(weights))]
        self.counts = _apportioned(len(numbers), weights)

    def rows(self, seed: int, epoch: int) -> Int[np.ndarray, "N"]:
        """Returns the rows of an epoch in the order in which they are shown."""
        parts = [self._part(source, seed, epoch) for source in range(len(self.rows_of))]
        return np.random.default_rng([seed, epoch]).permutation(np.concatenate(parts))

    def _part(self, source: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
        own, count = self.rows_of[source], self.counts[source]
        if not count:
            return own[:0]
        first, last = epoch * count // len(own), ((epoch + 1) * count - 1) // len(own)
        drawn = (np.random.default_rng([seed, 2, source, number]) for number in range(first, last + 1))
        passes = [generator.permutation(own) for generator in drawn]
        start = epoch * count - first * len(own)
        return np.concatenate(passes)[start : start + count]


def _apportioned(total: int, weights: Sequence[int | float]) -> list[int]:
    """Returns whole numbers in the weights' proportions that add up to a total: the largest remainders get one more.

    >>> _apportioned(10, (2, 1, 1))
    [5, 3, 2]
    """
    exact = total * np.asarray(weights, np.float64) / sum(weights)
    counts = np.floor(exact).astype(int)
    for source in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[source] += 1
    return counts.tolist()

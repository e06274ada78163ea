"""Bootstrap intervals of a score over its test items: which values other items of the same kind might have given."""

from collections.abc import Callable, Iterator

import numpy as np

from eim_jax.evaluation.metrics.metric import Metric, Rows, Value

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 100  # resamples whose counts are held at a time


def bounds(metric: Metric, rows: Rows, seed: int = 0) -> tuple[float, float] | None:
    """Returns the 95 % interval (percentiles) of a score over resampled items; None where none is finite.

    Args:
      metric: how rows become the score.
      rows: of each item.
      seed: of the draws.
    """
    found = resampled(np.asarray(rows, np.float64), metric.value, seed)
    if not np.isfinite(found).all():
        return None
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled(rows: np.ndarray, value: Callable[[np.ndarray], Value], seed: int = 0) -> np.ndarray:
    """Returns the score of each of RESAMPLES resamples of the items.

    Args:
      rows: of each item, [items k].
      value: the score from the sums of rows, [..., k].
      seed: of the draws.
    """
    return np.concatenate([value(counts @ rows) for counts in _draws(len(rows), seed)])


def _draws(items: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each item stands in each of some resamples."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn = rng.integers(items, size=(_AT_ONCE, items)) + items * np.arange(_AT_ONCE)[:, None]
        yield np.bincount(drawn.ravel(), minlength=_AT_ONCE * items).reshape(_AT_ONCE, items).astype(np.float64)

"""Means over seeds, and intervals of differences that know both noises: another training seed, other test items.

Two rows answered the same test items, and a seed gives both the same draws where their models agree in form, so their
difference is paired in both. A replicate is the mean over seeds on test items drawn with replacement (one draw for all
seeds: they share the test set) plus what a draw of seeds with replacement changes in the mean on all items; the
interval holds the middle 95 % of the replicates.

With S seeds, a mean of resampled seeds spreads by sd sqrt((S-1)/S) / sqrt(S): too little, and 1.96 of it is too short
where Student's t says otherwise. So what the seeds' draw changes is multiplied by sqrt(S/(S-1)) t(S-1)/z, which in the
normal case gives Student's interval. Noise that belongs to a seed and an item together enters with both draws: the
interval is then somewhat too long, never too short. With one seed it holds the items' noise alone.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from eim_jax.data.miniature.qa import PER_SCENE
from eim_jax.evaluation.metrics import metric_of

REPLICATES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """A mean, its standard deviation over seeds (None: one seed), and its 95 % interval (None: not known)."""

    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    seeds: int


def score(results: Mapping[int, Mapping[str, Any]], metric: str) -> Spread | None:
    """A row's score over its cells {seed: result}; None if a cell lacks it."""
    values = [cell["scores"].get(metric) for cell in results.values()]
    if not values or None in values:
        return None
    table = _replicates(list(results.values()), metric)
    interval = None if table is None else _interval(*table)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), sd, interval, len(values))


def difference(
    left: Mapping[int, Mapping[str, Any]], right: Mapping[int, Mapping[str, Any]], metric: str
) -> Spread | None:
    """`right` minus `left` over the seeds that both have; None if there is none, or a cell lacks the score.

    Raises ValueError when the two rows were tested on other items.
    """
    seeds = sorted(left.keys() & right.keys())
    values = [(left[seed]["scores"].get(metric), right[seed]["scores"].get(metric)) for seed in seeds]
    if not values or any(None in pair for pair in values):
        return None
    for seed in seeds:
        if left[seed]["items"]["ids"] != right[seed]["items"]["ids"]:
            rows = f"{left[seed]['row']} and {right[seed]['row']}"
            raise ValueError(f"{rows} were tested on other items: run them again with one version of the code")
    per_seed = [b - a for a, b in values]
    one, other = (_replicates([row[seed] for seed in seeds], metric) for row in (left, right))
    interval = None
    if one is not None and other is not None:
        interval = _interval(other[0] - one[0], other[1] - one[1])
    sd = float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None
    return Spread(float(np.mean(per_seed)), sd, interval, len(per_seed))


def bootstrap(full: np.ndarray, resampled: np.ndarray, seed: int = 0) -> np.ndarray:
    """Replicates [B] of a mean over seeds; the values may be differences.

    `full` [S]: each seed's value on all items; `resampled` [B S]: on the items of replicate b.
    """
    count = len(full)
    centre = resampled.mean(axis=1)
    if count == 1:
        return centre
    draw = np.random.default_rng(seed).integers(count, size=resampled.shape)
    drawn = full[draw].mean(axis=1)
    tail = 1 - (1 - LEVEL) / 2
    widen = np.sqrt(count / (count - 1)) * stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail)
    return centre + widen * (drawn - full.mean())


def _interval(full: np.ndarray, resampled: np.ndarray) -> tuple[float, float] | None:
    found = bootstrap(full, resampled)
    if not np.isfinite(found).all():
        return None
    low, high = np.quantile(found, [(1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2])
    return float(low), float(high)


def _replicates(cells: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """([S] on all items, [B S] on resampled items) of a score, None if the cells do not hold its items."""
    how = metric_of(metric)
    if how.difference:
        more, less = (_replicates(cells, key) for key in how.difference)
        return None if more is None or less is None else (more[0] - less[0], more[1] - less[1])
    if any(metric not in cell["items"] for cell in cells):
        return None
    rows = [np.asarray(cell["items"][metric], np.float64) for cell in cells]
    weights = _weights(tuple(cells[0]["items"]["ids"]))
    full = np.array([how.value(row.sum(axis=0)) for row in rows])
    return full, np.stack([how.value(weights @ row) for row in rows], axis=1)


@functools.lru_cache(maxsize=8)
def _weights(ids: tuple) -> np.ndarray:
    """How often each replicate draws each item [B n].

    The same for every row and metric of one test set, so that differences stay paired.
    """
    _, scene = np.unique([scene_of(item) for item in ids], return_inverse=True)
    number = scene.max() + 1
    drawn = np.random.default_rng(number).multinomial(number, np.full(number, 1 / number), size=REPLICATES)
    return drawn.astype(np.float64)[:, scene]


def scene_of(item: object) -> str:
    """What a test item is about.

    MME's questions about pictures of one name, and the miniature's two about one scene, are drawn together, since what
    makes one hard may make the other hard.
    """
    words = str(item)
    if words.startswith("qa-"):
        head, _, number = words.rpartition("-")
        return f"{head}-{int(number) // PER_SCENE}"
    return words.split("/")[1] if words.count("/") == 2 else words

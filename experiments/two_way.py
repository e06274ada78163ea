"""A difference between two rows as a two-way layout, seeds x scenes: its interval, its tests, and what they can decide.

Every seed answers the same scenes. With d[s, i] what scene i adds to the difference of seed s,

    d[s, i] = mu + a[s] + b[i] + e[s, i]
    Var(mean) = (MS_a + MS_b - MS_e) / (S n),   E MS_a = n var_a + var_e,  E MS_b = S var_b + var_e,  E MS_e = var_e

which counts the noise of a seed and a scene together once (the bootstrap of intervals.py counts it twice). Its degrees
of freedom are Satterthwaite's: V^2 / sum_k (MS_k / (S n))^2 / df_k. A score that is no mean over scenes (BLEU of a
corpus, F1) is taken apart by the jackknife's pseudo-values, n f(all) - (n - 1) f(all but i).

The interval covers .92 to .985 of a nominal .95 from five seeds up (tests/test_two_way.py), less below: fewer seeds get
none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from eim_jax.evaluation.metrics import metric_of
from experiments.intervals import scene_of

FEWEST = 5  # seeds
LEVEL = 0.95
MOST = 1000  # seeds that are thought of


class Layout(NamedTuple):
    """The mean squares of a difference over `seeds` x `scenes`: of seeds, of scenes, and of what is left."""

    mean: float
    seeds: int
    scenes: int
    of_seeds: float
    of_scenes: float
    left: float

    @classmethod
    def of(cls, parts: Float[np.ndarray, "seeds scenes"], per_seed: np.ndarray | None = None) -> "Layout":
        """Of d[s, i]; `per_seed` are the seeds' differences where they are known better than by their means."""
        seeds, scenes = parts.shape
        if seeds < 2 or scenes < 2:
            raise ValueError(f"{seeds} seeds x {scenes} scenes: a two-way layout takes two of each")
        rows, columns = parts.mean(axis=1), parts.mean(axis=0)
        rest = parts - rows[:, None] - columns[None] + parts.mean()
        rows = rows if per_seed is None else per_seed
        return cls(
            float(rows.mean()),
            seeds,
            scenes,
            float(scenes * rows.var(ddof=1)),
            float(seeds * columns.var(ddof=1)),
            float((rest**2).sum() / ((seeds - 1) * (scenes - 1))),
        )

    def at(self, seeds: int, scenes: int) -> "Layout":
        """What is expected of other numbers of seeds and scenes."""
        between_seeds = max(self.of_seeds - self.left, 0) / self.scenes
        between_scenes = max(self.of_scenes - self.left, 0) / self.seeds
        more = (scenes * between_seeds + self.left, seeds * between_scenes + self.left)
        return Layout(self.mean, seeds, scenes, *more, self.left)

    @property
    def error(self) -> float:
        """The standard error of the mean; never below that of seeds alone, or of scenes alone."""
        return float(np.sqrt(self._square))

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom."""
        a, b, both = self.seeds - 1, self.scenes - 1, (self.seeds - 1) * (self.scenes - 1)
        total = self.seeds * self.scenes
        parts = ((self.of_seeds, a), (self.of_scenes, b), (self.left, both))
        below = sum((square / total) ** 2 / df for square, df in parts)
        return float(min(max(self._square**2 / below, 1.0), both)) if below else float(both)

    @property
    def _square(self) -> float:
        found = max(self.of_seeds + self.of_scenes - self.left, self.of_seeds, self.of_scenes)
        return found / (self.seeds * self.scenes)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Two-sided, Student's."""
        half = float(stats.t.ppf((1 + level) / 2, self.df)) * self.error
        return self.mean - half, self.mean + half

    def p_different(self) -> float:
        """Two-sided: of a difference this far from 0 where there is none."""
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.df)) if self.error else float(self.mean == 0)

    def p_equivalent(self, bound: float) -> float:
        """Of a difference this small where the true one is as large as `bound`: the larger of two one-sided (TOST)."""
        if not self.error:
            return float(abs(self.mean) >= bound)
        return float(stats.t.sf((bound - abs(self.mean)) / self.error, self.df))

    def power(self, effect: float, alpha: float = 1 - LEVEL) -> float:
        """The chance that a true difference of `effect` is told from 0, on its own side."""
        if not self.error:
            return 1.0
        edge = stats.t.ppf(1 - alpha / 2, self.df)
        return float(stats.nct.sf(edge, self.df, abs(effect) / self.error))

    def power_equivalent(self, bound: float, alpha: float = 1 - LEVEL) -> float:
        """The chance that a difference is found smaller than `bound` where there is none."""
        if not self.error:
            return 1.0
        room = bound / self.error - stats.t.ppf(1 - alpha, self.df)
        return float(max(2 * stats.t.cdf(room, self.df) - 1, 0))


def seeds_for(layout: Layout, effect: float, scenes: int, wanted: float = 0.8, alpha: float = 1 - LEVEL) -> int | None:
    """The fewest seeds, at least FEWEST, with which `effect` is found with this chance; None: more than MOST."""
    if layout.at(MOST, scenes).power(effect, alpha) < wanted:
        return None
    low, high = FEWEST, MOST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if layout.at(middle, scenes).power(effect, alpha) >= wanted else (middle + 1, high)
    return low


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: claims are right together at the level that each is held to.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order, found, least = np.argsort(values, kind="stable"), [0.0] * len(values), 0.0
    for place, which in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[which]))
        found[which] = least
    return found


def difference(
    pairs: Sequence[tuple[Mapping[int, Mapping[str, Any]], Mapping[int, Mapping[str, Any]]]], metric: str
) -> Layout | None:
    """The layout of (right - left), the mean over pairs of rows {seed: result}; None where it cannot be had.

    Several pairs are one claim in several settings, pooled scene by scene and seed by seed, over the seeds that all
    have.

    Raises ValueError where rows were tested on other items.
    """
    seeds = sorted(set.intersection(*(left.keys() & right.keys() for left, right in pairs)))
    cells = [[side[seed] for seed in seeds] for pair in pairs for side in pair]
    every = [cell for row in cells for cell in row]
    if len(seeds) < 2 or any(cell["scores"].get(metric) is None for cell in every):
        return None
    if other := [cell["row"] for cell in every if cell["items"]["ids"] != every[0]["items"]["ids"]]:
        raise ValueError(f"{every[0]['row']} and {other[0]} were tested on other items: run them again")
    parts = [pseudo_values(row, metric) for row in cells]
    if any(part is None for part in parts):
        return None
    scores = [np.array([cell["scores"][metric] for cell in row]) for row in cells]
    apart = np.mean([right - left for left, right in zip(parts[::2], parts[1::2], strict=True)], axis=0)
    per_seed = np.mean([right - left for left, right in zip(scores[::2], scores[1::2], strict=True)], axis=0)
    return Layout.of(apart, per_seed)


def pseudo_values(cells: Sequence[Mapping[str, Any]], metric: str) -> Float[np.ndarray, "seeds scenes"] | None:
    """What each scene adds to each seed's score; None where the cells do not hold their items."""
    how = metric_of(metric)
    if how.difference:
        more, less = (pseudo_values(cells, key) for key in how.difference)
        return None if more is None or less is None else more - less
    if any(metric not in cell["items"] for cell in cells):
        return None
    _, scene = np.unique([scene_of(item) for item in cells[0]["items"]["ids"]], return_inverse=True)
    number, found = int(scene.max()) + 1, []
    for cell in cells:
        items = np.asarray(cell["items"][metric], np.float64)
        rows = np.zeros((number, *items.shape[1:]))
        np.add.at(rows, scene, items)
        total = rows.sum(axis=0)
        found.append(number * how.value(total) - (number - 1) * how.value(total[None] - rows))
    return np.stack(found)

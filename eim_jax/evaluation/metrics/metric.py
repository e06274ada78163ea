"""What a score says of itself: how it is called and shown, which way is better, and how items add up to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# One row of numbers a test item; rows are added up, and `Metric.value` turns the sums into the score.
Rows = list[list[int | float]]
Value = Float[np.ndarray, "*batch"] | np.floating
# (texts by id, reference texts by id) -> a row for each text, in their order
Measure = Callable[[Mapping[str, str], Mapping[str, Sequence[str]]], Rows]


def ratio(sums: Float[np.ndarray, "*batch 2"]) -> Value:
    """Returns a mean from the sums of rows (value, count); nan where nothing was counted.

    >>> float(ratio(np.array([3.0, 4.0])))
    0.75
    """
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / np.where(sums[..., 1] == 0, np.nan, sums[..., 1])


@dataclass(frozen=True)
class Panel:
    """A bar chart that the report's page draws of several metrics.

    Attributes:
      title: stands above the chart; metrics of one title share it.
      heading: of the page's section that holds the charts.
      words: what the section's reader has to know.
      most: the end of the axis, in shown units.
    """

    title: str
    heading: str
    words: str
    most: int


@dataclass(frozen=True)
class Metric:
    """One score, as every table, page and interval needs it. Entries of METRICS; only `key` and `title` are needed.

    Attributes:
      key: its name in scores_test.json.
      title: its name where runs are compared: terminal, experiments, seeds.
      factor: from the file's number to the shown one (fractions are shown in points: 100).
      decimals: of the shown number.
      sense: +1 higher is better, -1 lower is, 0 not judged.
      unit: of the shown number.
      long: the name that is clear by itself, where `title` is not.
      heading: of the page's column, where not `title`.
      terminal: the name in the terminal's table, where not `title`; None: not shown there.
      seeds: the name, with its unit, in the table over seeds, where not `title`; None: not shown there.
      group: metrics of one group are columns together, with a dash for one that a run lacks; the group's name.
      panel: the bar chart that it belongs to.
      bar: its name in that chart, where not the column's heading.
      summed_up_by: sets of keys; the page's verdict leaves the metric out where every score of one set is there.
      reason: the key of the scorer's note that says why this score is null, beside its own.
      difference: (more, less): this score is the one's value less the other's, where a file does not hold it.
      same_as: a score that has the same value, where a file does not hold this one.
      tasks: names of the tasks that yield it by `measure`; a task may yield other metrics by itself.
      measure: gives every text's row, from the texts and their references.
      value: the score from the sums of the items' rows [..., k], so that any resampling of the items can be scored.

    >>> f1 = Metric("f1", "F1", factor=100, decimals=1, sense=+1, unit="points")
    >>> f1.text(0.7512), f1.text_in_file(0.7512), f1.signed(0.74, 0.7512)
    ('75.1', '0.751', ('+1.1', 1))
    """

    key: str
    title: str
    factor: int | float = 1
    decimals: int = 3
    sense: int = 0
    unit: str = ""
    long: str = ""
    heading: str = ""
    terminal: str | None = ""
    seeds: str | None = ""
    group: str = ""
    panel: Panel | None = None
    bar: str = ""
    summed_up_by: tuple[frozenset[str], ...] = ()
    reason: str = ""
    difference: tuple[str, str] | None = None
    same_as: str = ""
    tasks: tuple[str, ...] = ()
    measure: Measure | None = None
    value: Callable[[np.ndarray], Value] = ratio

    @property
    def label(self) -> str:
        """The heading of the page's column."""
        return self.heading or self.title

    @property
    def name(self) -> str:
        """The name that is clear by itself."""
        return self.long or self.title

    def text(self, value: int | float) -> str:
        """Returns the value as shown, in `unit`."""
        return f"{value * self.factor:.{self.decimals}f}"

    def text_in_file(self, value: int | float) -> str:
        """Returns the value as scores_test.json holds it, to the digit that `text` shows."""
        return f"{value:.{self.decimals + round(np.log10(self.factor))}f}"

    def signed(self, base: int | float, value: int | float) -> tuple[str, int | None]:
        """Returns the difference as shown, and +1 better, -1 worse, 0 equal to the shown digit, None: not judged."""
        change = round(value * self.factor, self.decimals) - round(base * self.factor, self.decimals)
        change = round(change, self.decimals)
        better = (int(change > 0) - int(change < 0)) * self.sense if self.sense else None
        return ("±0" if change == 0 else f"{change:+.{self.decimals}f}".replace("-", "−")), better

    def total(self, rows: Rows | np.ndarray) -> float:
        """Returns the score of all items, from their rows."""
        return float(self.value(np.asarray(rows, np.float64).sum(axis=0)))


@dataclass(frozen=True)
class Family:
    """Metrics that share the start of their keys, such as accuracy/<category>. An entry of METRICS by `prefix`.

    Attributes:
      prefix: with the slash that ends it.
      member: the metric by what follows the prefix, also for names that are not among `known`.
      known: these names, in the order in which tables show them.
    """

    prefix: str
    member: Callable[[str], Metric]
    known: tuple[str, ...] = ()

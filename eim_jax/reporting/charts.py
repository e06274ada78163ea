"""Small charts of a run: one panel a quantity, bars of an arm's scores, intervals of differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eim_jax.reporting.svg import GRID, INK, LINES, inline_svg, text_style

INSIDE = 6  # lines whose names find room inside a panel; those of more stand below it
POINTS = 400  # drawn per line at most; longer runs are averaged over equal bins of neighbouring steps


@dataclass(frozen=True)
class Line:
    """One curve: its name, steps and values (None where not finite), and its colour's number."""

    label: str
    steps: Sequence[int | float]
    values: Sequence[int | float | None]
    colour: int = 0
    dashed: int = 0  # 0 solid, 1 dashed, 2 dotted


@dataclass(frozen=True)
class Bars:
    """One arm's bars: a value for each category (None where there is none) and the interval around it, if known."""

    label: str
    values: Sequence[int | float | None]
    intervals: Sequence[tuple[float, float] | None]
    colour: int = 0


@dataclass(frozen=True)
class Interval:
    """One row of `intervals`.

    Args:
      label: its name.
      value: drawn as a dot.
      span: its interval.
      mark: another value that it is compared with, a diamond.
      colour: its number.
      band: values within it of 0 are too small to matter, a pale bar.
    """

    label: str
    value: float
    span: tuple[float, float]
    mark: float | None = None
    colour: int = 0
    band: float = 0.0


def panel(
    lines: Sequence[Line],
    *,
    unit: str,
    name: str,
    log: bool = False,
    unit_range: bool = False,
    over: str = "step",
    levels: Sequence[tuple[str, float]] = (),
) -> str:
    """Draws curves: the pale line is what was logged, the strong one its running mean.

    Args:
      lines: the curves.
      unit: of the values.
      name: must be unique in the page: it prefixes the element ids.
      log: draws a logarithmic axis where all values are positive.
      unit_range: fixes the axis to 0...1.
      over: what the other axis counts.
      levels: (name, value) of dashed lines across the panel, the highest first.

    Returns:
      an <svg> element without outside references.
    """
    with text_style(name, 9.5):
        many = len(lines) > INSIDE
        figure = Figure(figsize=(3.1, 1.95 + many * 0.17 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        for number, (label, value) in enumerate(levels):
            axes.axhline(value, color=INK, linewidth=0.9, linestyle="--")
            place = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "ha": "right"}
            # The first name stands above its line and the others below, so that two that are close stay legible.
            offset = {"xytext": (0, -2), "va": "top"} if number else {"xytext": (0, 1.5), "va": "bottom"}
            axes.annotate(label, **place, **offset, textcoords="offset points", fontsize=8, color=INK)
        if levels:
            axes.margins(y=0.14)
        finite = [v for line in lines for v in line.values if v is not None]
        if log and finite and min(finite) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        if unit_range:
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(left=0)
        _dress(axes, unit, over)
        if many:
            figure.legend(loc="outside lower left", frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.6)
        elif len(lines) > 1:
            axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.6)
        said = "".join(f"; {label}: {value:.4g}" for label, value in levels)
        return inline_svg(figure, name, _spoken(lines, unit) + said)


def _draw(axes, line: Line) -> None:
    steps, values = _bins(line)
    if not len(steps):
        return
    few = len(steps) <= 12
    look = {"color": LINES[line.colour % len(LINES)], "linestyle": ("-", "--", ":")[line.dashed]}
    if not few:
        axes.plot(steps, values, color=look["color"], linewidth=0.8, alpha=0.35)
        values = _smooth(values)
    axes.plot(steps, values, linewidth=1.7, label=line.label, marker="o" if few else None, markersize=3, **look)


def bars(series: Sequence[Bars], categories: Sequence[str], *, unit: str, name: str, most: int | float) -> str:
    """Draws lying bars, the arms below one another in each category.

    Each value stands at its bar's end, a dash where there is none; a whisker is an interval.

    Args:
      series: an arm each.
      categories: names of the values.
      unit: of the values.
      name: must be unique in the page.
      most: where the axis ends; it begins at 0.

    Returns:
      an <svg> element as `panel` does.
    """
    thick = 0.8 / len(series)
    with text_style(name, 9):
        height = 0.6 + 0.22 * math.ceil(len(series) / 3) + len(categories) * (0.1 + 0.15 * len(series))
        figure = Figure(figsize=(5.2, height), layout="constrained")
        axes = figure.add_subplot()
        for i, one in enumerate(series):
            places = np.arange(len(categories)) - 0.4 + thick * (i + 0.5)
            widths = [0 if value is None else value for value in one.values]
            colour = LINES[one.colour % len(LINES)]
            axes.barh(places, widths, thick * 0.86, color=colour, label=one.label)
            for place, value, span in zip(places, one.values, one.intervals, strict=True):
                end = 0 if value is None else max(value, span[1] if span else 0)
                if span:
                    axes.plot(span, (place, place), color=INK, linewidth=1.1, marker="|", markersize=4)
                told = "–" if value is None else f"{value:.1f}"
                axes.text(end + 0.012 * most, place, told, va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(categories)), categories)
        axes.set_ylim(len(categories) - 0.45, -0.55)
        axes.set_xlim(0, 1.08 * most)  # room for the figure at a full bar
        _dress(axes, "")
        axes.set_xlabel(unit, color=INK)
        axes.xaxis.set_major_locator(FixedLocator(np.linspace(0, most, 5)))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
        spoken = []
        for one in series:
            pairs = zip(categories, one.values, strict=True)
            spoken.append(f"{one.label}: " + ", ".join(f"{c} {'–' if v is None else f'{v:.1f}'}" for c, v in pairs))
        return inline_svg(figure, name, f"{unit}. " + "; ".join(spoken))


def intervals(rows: Sequence[Interval], *, unit: str, name: str, reach: float | None = None, width: float = 6.4) -> str:
    """Draws a point and its interval for each row, from the top down, around a line at 0.

    Args:
      rows: the values.
      unit: of the values.
      name: must be unique in the page.
      reach: where the axis ends on either side; what lies beyond stands at the edge, in figures.
      width: of the figure, in inches.

    Returns:
      an <svg> element as `panel` does.
    """
    with text_style(name, 9):
        figure = Figure(figsize=(width, 0.7 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=0.8)
        if reach is not None:
            axes.set_xlim(-reach, reach)
        for place, row in enumerate(rows):
            colour = LINES[row.colour % len(LINES)]
            if row.band:
                axes.barh(place, 2 * row.band, 0.7, left=-row.band, color=GRID, alpha=0.8, linewidth=0)
            axes.plot(row.span, (place, place), color=colour, linewidth=1.6, marker="|", markersize=5)
            axes.plot([row.value], [place], color=colour, marker="o", markersize=4.5)
            if row.mark is not None:
                axes.plot([row.mark], [place], color=INK, marker="D", markersize=3.5, fillstyle="none")
            if reach is not None and abs(row.value) > reach:
                told = f"{row.value:+.1f} [{row.span[0]:+.1f}, {row.span[1]:+.1f}]"
                right = row.value > 0
                edge, told = (reach, f"{told} →") if right else (-reach, f"← {told}")
                axes.text(edge, place, told, ha="right" if right else "left", va="center", fontsize=8, color=colour)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _dress(axes, "")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(unit, color=INK)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        told = "; ".join(f"{row.label}: {row.value:.3g} [{row.span[0]:.3g}, {row.span[1]:.3g}]" for row in rows)
        return inline_svg(figure, name, f"{unit}. {told}")


def _dress(axes, unit: str, over: str = "step") -> None:
    axes.set_xlabel(over, color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.patch.set_alpha(0)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=2, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.6)


def _bins(line: Line) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if v is not None and math.isfinite(v)]
    data = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    size = max(math.ceil(len(data) / POINTS), 1)
    means = np.asarray([data[i : i + size].mean(axis=0) for i in range(0, len(data), size)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the curve, centred; shorter at the steep start, one-sided at the end."""
    reach, rows = max(len(values) // 40, 1), np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    before = np.minimum(reach, rows)
    after = np.minimum(before, rows[::-1])
    return (sums[rows + after + 1] - sums[rows - before]) / (before + after + 1)


def _spoken(lines: Sequence[Line], unit: str) -> str:
    parts = []
    for line in lines:
        steps, values = _bins(line)
        if len(steps):
            parts.append(
                f"{line.label}: {values[0]:.4g} at step {steps[0]:.0f}, {values[-1]:.4g} at step {steps[-1]:.0f}"
            )
    return f"{unit}. " + "; ".join(parts)

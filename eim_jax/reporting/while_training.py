"""Curves of the scores while a stage trained: what was held out beside what it was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from eim_jax.evaluation.metrics import in_order
from eim_jax.evaluation.metrics.metric import Metric
from eim_jax.evaluation.while_training import DISTINCT
from eim_jax.reporting.charts import Line, panel

SETS = {"eval": "held out", "train": "trained on"}  # what stands before the slash in metrics.jsonl


def scored_curves(place: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns a chart for each score that a run's tables show, of held-out and of trained data together.

    Args:
      place: of the stage in the page, for ids.
      rows: the stage's records.

    Returns:
      [{"title", "range", "svg"}].
    """
    keys = dict.fromkeys(key for row in rows for key in row if key.partition("/")[0] in SETS and "/" in key)
    names = dict.fromkeys(key.partition("/")[2] for key in keys)
    charts = []
    for metric in in_order(names):
        if metric.key != DISTINCT and metric.terminal is None:
            continue
        lines = [
            _line(rows, f"{kind}/{metric.key}", metric, words, number)
            for number, (kind, words) in enumerate(SETS.items())
            if f"{kind}/{metric.key}" in keys
        ]
        last = [f"{line.label} {_last(metric, line)}" for line in lines]
        title = "different texts" if metric.key == DISTINCT else metric.title.replace("test ", "")
        unit = "share of texts" if metric.key == DISTINCT else metric.unit
        svg = panel(lines, unit=unit, name=f"{place}-scored-{metric.key}")
        charts.append({"title": title, "range": ", ".join(last), "svg": svg})
    return charts


def _line(rows: Sequence[Mapping[str, Any]], key: str, metric: Metric, label: str, number: int) -> Line:
    have = [row for row in rows if key in row]
    values = [None if row[key] is None else row[key] * metric.factor for row in have]
    return Line(label, [row["step"] for row in have], values, number, dashed=number)


def _last(metric: Metric, line: Line) -> str:
    value = line.values[-1]
    return "–" if value is None else f"{value:.{metric.decimals}f}"

"""Bars of the scores of parts of a test: accuracy by category, MME's tasks, whatever metrics name a panel."""

from collections.abc import Mapping

from eim_jax.evaluation.metrics.metric import Metric
from eim_jax.reporting.charts import Bars, bars
from eim_jax.reporting.scores import BASELINE, METHODS, Arms, Scores, columns, flatten, interval


def by_category(arms: Arms) -> dict | None:
    """Returns a bar chart for every panel that the arms' metrics name, at the main decoding (the first in a file).

    Args:
      arms: arm -> decoding method -> scores.

    Returns:
      {"title", "words", "charts": [{"title", "range", "svg"}]}; None if no arm has such scores.
    """
    method = next((name for scores in arms.values() for name in scores), None)
    have = {arm: scores[method] for arm, scores in arms.items() if method in scores}
    panels: dict[str, list[Metric]] = {}
    for metric in columns([{"": scores} for scores in have.values()]):
        if metric.panel and any(flatten(scores).get(metric.key) is not None for scores in have.values()):
            panels.setdefault(metric.panel.title, []).append(metric)
    if not panels:
        return None
    charts = [
        {"title": title, "range": "", "svg": _chart(title, metrics, have, list(arms))}
        for title, metrics in panels.items()
    ]
    every = [metric for metrics in panels.values() for metric in metrics]
    whiskers = any(interval(scores, metric.key) for scores in have.values() for metric in every)
    words = [f"Decoded with {METHODS.get(method, method)}.", *dict.fromkeys(metric.panel.words for metric in every)]
    words += ["Whisker: 95 % bootstrap interval over the test questions."] if whiskers else []
    return {"title": every[0].panel.heading, "words": " ".join(words), "charts": charts}


def _chart(title: str, metrics: list[Metric], have: Mapping[str, Scores], arms: list[str]) -> str:
    series = []
    for arm, scores in have.items():
        values, spans = [], []
        for metric in metrics:
            value, span = flatten(scores).get(metric.key), interval(scores, metric.key)
            values.append(None if value is None else value * metric.factor)
            spans.append(span and (span[0] * metric.factor, span[1] * metric.factor))
        series.append(Bars(arm, values, spans, 4 if arm == BASELINE else arms.index(arm)))
    names = [metric.bar or metric.label for metric in metrics]
    return bars(series, names, unit=metrics[0].unit, name=title, most=metrics[0].panel.most)

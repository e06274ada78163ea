"""Scores of texts against references: METRICS, the table of them all, and each test item's share in them.

A score of your own is one `Metric` in this table, from a script or a config file: `METRICS["words"] = Metric(...)`.
"""

from collections.abc import Iterable, Iterator

from eim_jax.evaluation.metrics import (
    accuracy,
    caption_overlap,
    likelihood,
    mme_scores,
    named_objects,
    open_answers,
)
from eim_jax.evaluation.metrics.metric import Family, Metric

# By key, families by their prefix, in the order in which every table shows them.
METRICS: dict[str, Metric | Family] = {
    **{metric.key: metric for metric in caption_overlap.METRICS},
    accuracy.ACCURACY.prefix: accuracy.ACCURACY,
    accuracy.UNPARSED.key: accuracy.UNPARSED,
    **{metric.key: metric for metric in open_answers.METRICS},
    mme_scores.MME.prefix: mme_scores.MME,
    **{metric.key: metric for metric in likelihood.METRICS},
    **{metric.key: metric for metric in named_objects.METRICS},
}


def metric_of(key: str) -> Metric:
    """Returns the metric of a score's key; of one that no table knows a neutral one, which is shown and not judged.

    >>> metric_of("Bleu_4").title, metric_of("accuracy/IMG").name, metric_of("my/score").title
    ('BLEU-4', 'accuracy, with a picture', 'my score')
    """
    prefix, slash, part = key.partition("/")
    found = METRICS.get(key, METRICS.get(prefix + slash) if slash else None)
    if found is None:
        return Metric(key, key.replace("/", " ").replace("_", " "), terminal=None, seeds=None)
    return found.member(part) if isinstance(found, Family) else found


def known_metrics() -> Iterator[Metric]:
    """Yields every metric of the table, families by their known members, in order."""
    for found in METRICS.values():
        if isinstance(found, Family):
            yield from map(found.member, found.known)
        else:
            yield found


def in_order(keys: Iterable[str]) -> list[Metric]:
    """Returns the metrics of these keys as the table orders them, those that it does not know last, as they came."""
    place = {metric.key: i for i, metric in enumerate(known_metrics())}
    return [metric_of(key) for key in sorted(dict.fromkeys(keys), key=lambda key: place.get(key, len(place)))]

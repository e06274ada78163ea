"""Whether a model looks at its pictures: how much worse it predicts with another one, and how many texts differ."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eim_jax.evaluation.metrics.intervals import resampled
from eim_jax.evaluation.metrics.metric import ratio

PAIRS = (("nll_image", "nll_image_shuffled"), ("nll", "nll_shuffled"))  # with its own picture, with another
FEW = 0.05  # texts that differ, as a share of all, from which on it is said
ENOUGH = 20  # texts, from which on a share of them tells anything


def ignored_pictures(arm: str, items: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str] | None) -> list[str]:
    """Says of an arm that it seems not to look at its pictures.

    Args:
      arm: its name.
      items: its items_test.json, {decoding: {metric key: rows}}.
      texts: what it wrote about each picture; None where texts may well be equal (answers to questions).

    Returns:
      A sentence for each sign of it; none where it looks, or where nothing tells.
    """
    said = []
    for own, other in PAIRS:
        rows = next(iter(items.values()), {})
        if own in rows and other in rows:
            if line := _same_likelihood(arm, np.asarray(rows[own], float), np.asarray(rows[other], float)):
                said.append(line)
            break
    if texts is not None and len(texts) >= ENOUGH:
        distinct = len(set(texts.values()))
        if distinct <= FEW * len(texts):
            said.append(f"{arm} wrote {distinct} different texts about {len(texts):,} pictures.")
    return said


def _same_likelihood(arm: str, own: np.ndarray, other: np.ndarray) -> str:
    """A sentence where the interval of the NLL's rise with another picture holds 0, or lies below it."""
    both = np.concatenate([own, other], axis=1)
    drawn = resampled(both, lambda sums: ratio(sums[..., 2:]) - ratio(sums[..., :2]))
    if not np.isfinite(drawn).all():
        return ""
    gap = float(ratio(other.sum(axis=0)) - ratio(own.sum(axis=0)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    if low > 0:
        return ""
    return (
        f"{arm} predicts the texts as well with another picture as with the right one: its NLL rises by {gap:.4f} nats "
        f"a token (95 % interval {low:.4f} to {high:.4f})."
    )

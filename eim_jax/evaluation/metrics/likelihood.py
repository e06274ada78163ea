"""Negative log-likelihood of the right texts, in nats a token, and how much it rises with another picture."""

from collections.abc import Sequence

import numpy as np

from eim_jax.evaluation.metrics.metric import Metric, Rows


def likelihood_rows(
    key: str, nats: np.ndarray, tokens: np.ndarray, item: Sequence[int] | np.ndarray, items: int
) -> dict[str, Rows]:
    """Returns {key: the rows (nats, tokens) of a mean over tokens}.

    Args:
      key: the metric's.
      nats: negative log-likelihood of each of N samples.
      tokens: each sample's supervised tokens.
      item: the item of each sample.
      items: how many items there are.
    """
    sums = np.zeros((items, 2))
    np.add.at(sums, np.asarray(item), np.stack([nats, tokens], axis=1))
    return {key: [[round(float(total), 4), int(count)] for total, count in sums]}


_SHOWN = {"factor": 1, "decimals": 3, "unit": "nats"}
# With a wrong picture neither a high nor a low NLL is good in itself: not judged.
_SHUFFLED = {**_SHOWN, "sense": 0, "terminal": None}
_GAP = {
    "factor": 1,
    "decimals": 3,
    "sense": 1,
    "unit": "nats, other picture",
    "long": "NLL gap to another picture",
    "terminal": None,
    "seeds": None,
}

METRICS = (
    Metric("nll", "test NLL", **_SHOWN, sense=-1, terminal="nll", seeds="NLL, nats a token"),
    Metric("nll_shuffled", "test NLL, shuffled pictures", **_SHUFFLED, seeds=None),
    Metric("nll_image", "test NLL image", **_SHOWN, sense=-1, terminal=None, seeds="NLL about pictures"),
    Metric(
        "nll_image_shuffled",
        "test NLL, shuffled pictures",
        **_SHUFFLED,
        seeds="NLL about pictures, another shown",
    ),
    Metric("nll_gap", "NLL gap", **_GAP, difference=("nll_shuffled", "nll")),
    Metric("nll_image_gap", "NLL gap", **_GAP, difference=("nll_image_shuffled", "nll_image")),
)

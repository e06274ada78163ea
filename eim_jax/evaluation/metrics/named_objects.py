"""What captions name against the exact scene of a drawn picture: (colour, shape) pairs, shapes, colours."""

from collections.abc import Mapping

import numpy as np

from eim_jax.data.miniature.captioning import attribute_counts
from eim_jax.data.miniature.drawing import Scene
from eim_jax.evaluation.metrics.metric import Metric, Rows, Value


def f1(sums: np.ndarray) -> Value:
    """Returns F1 from the sums of (named rightly, named, there)."""
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)


def object_rows(results: Mapping[str, str], scenes: Mapping[str, Scene]) -> dict[str, Rows]:
    """Returns the rows of the F1 of named (colour, shape) pairs, in the order of the captions."""
    counts = attribute_counts(results, scenes)
    return {"shape_colour_f1": [[int(n) for n in counts[key]["shape_colour"]] for key in results]}


_SHOWN = {"factor": 100, "decimals": 1, "sense": 1, "unit": "points"}
_PART = {**_SHOWN, "terminal": None, "seeds": None}
_SUMMED = {**_PART, "summed_up_by": (frozenset({"shape_colour_f1"}),)}

METRICS = (
    Metric("shape_colour_f1", "object F1", **_SHOWN, heading="shape colour F1", value=f1),
    Metric("shape_colour_precision", "shape colour precision", **_SUMMED),
    Metric("shape_colour_recall", "shape colour recall", **_SUMMED),
    Metric("shape_f1", "shape F1", **_PART),
    Metric("colour_f1", "colour F1", **_PART),
    Metric("shape_colour_f1_seen", "shape colour F1 seen", **_PART),
    Metric(
        "shape_colour_f1_held_out",
        "shape colour F1 held out",
        **_SHOWN,
        terminal=None,
        seeds="object F1, held-out pairs",
    ),
)

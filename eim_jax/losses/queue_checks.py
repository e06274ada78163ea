"""What a queue cannot be made of: arrays of different lengths, samples whose key has no direction."""

from collections.abc import Sequence
from typing import Any

import jax


class BadRow(ValueError):
    """A sample's key is not finite, or has no direction."""


def common_length(label: str, fields: Any, groups: Any, ids: Any) -> int:
    """Returns how many samples there are; raises ValueError naming what has another number of entries."""
    leaves = jax.tree.leaves(fields)
    if not leaves or not all(leaf.shape for leaf in leaves):
        raise ValueError(f"{label}: fields are arrays with one row a sample")
    count = leaves[0].shape[0]
    lengths = {f"field {i}": leaf for i, leaf in enumerate(leaves)}
    check_lengths(label, count, {**lengths, "groups": groups, "ids": ids})
    return count


def check_lengths(label: str, count: int, others: dict[str, Any]) -> None:
    """Raises ValueError naming what has not one entry a sample."""
    for name, other in others.items():
        found = None if other is None else other.shape[0] if hasattr(other, "shape") else len(other)
        if found is not None and found != count:
            raise ValueError(f"{label}: {count} samples, but {name} has {found}")
    if not count:
        raise ValueError(f"{label}: no samples")


def check_row(
    label: str, bad: jax.Array | None, count: int, ids: Sequence[str] | None, similarity: str, reason: str = ""
) -> None:
    """Raises BadRow for the first row that is no key, naming its sample.

    Args:
      label: of the queue, for the message.
      bad: the row's number; `count` or more, or None: there is none.
      count: samples.
      ids: their names; None: the row's number is said.
      similarity: under the cosine a key needs a direction.
      reason: what is wrong with it; "" leaves it to `similarity`.
    """
    if bad is None or (row := int(bad)) >= count:
        return
    sample = f"sample {ids[row]!r} (row {row})" if ids is not None else f"row {row}"
    reason = reason or ("not finite or zero, so it has no direction" if similarity == "cosine" else "not finite")
    raise BadRow(f"{label}: the key of {sample} is {reason}; look at the sample, or drop it")

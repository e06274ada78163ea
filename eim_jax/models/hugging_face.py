"""The words in which a kind of model says how its Hugging Face files and our parameters map to each other.

A model's file states its config.json fields as a dict {their field: our field} and its weights as `Row`s: one row for
each of our leaves, with the keys of the safetensors file that make it and the `Layout` that turns their arrays into
ours and back. Reading and writing the files themselves is the business of `eim_jax.pretrained`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# What a size of ours is at most, so that a slip in a file does not fill the memory; sizes that are not here: 2**24.
LARGEST = {"layers": 10_000, "heads": 2**16, "kv_heads": 2**16, "image_size": 2**14, "context": 2**31 - 1}


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file, key or field and says what to do."""


class Layout(NamedTuple):
    """How their arrays become one of ours, and back."""

    load: Callable[[list[np.ndarray]], np.ndarray]
    save: Callable[[np.ndarray], list[np.ndarray]]


SAME = Layout(lambda a: a[0], lambda x: [x])
TRANSPOSE = Layout(lambda a: a[0].T, lambda x: [x.T])  # torch.nn.Linear is [out, in]
# Query, key and value maps as one kernel [in, 3, out] and bias [3, out]: from three layers, or from one of 3 x out.
FUSE_KERNEL = Layout(lambda a: np.stack([x.T for x in a], axis=1), lambda x: [x[:, i].T for i in range(3)])
FUSE_BIAS = Layout(np.stack, list)
FUSED = Layout(
    lambda a: a[0].reshape(*a[0].shape[:-1], 3, a[0].shape[-1] // 3),
    lambda x: [x.reshape(*x.shape[:-2], 3 * x.shape[-1])],
)
PATCHES = Layout(lambda a: a[0].transpose(2, 3, 1, 0), lambda x: [x.transpose(3, 2, 0, 1)])  # [out, 3, p, p]


class Row(NamedTuple):
    """One of our leaves (with {i} for the layer) and the keys that make it; a `part` of a key may stand for a key."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def part(key: str, start: int, stop: int, rows: int) -> str:
    """Returns the name of rows start to stop (not included) of a key that has so many: one tensor of several leaves.

    >>> part("qkv.weight", 0, 4, 12)
    'qkv.weight[0:4/12]'
    """
    return f"{key}[{start}:{stop}/{rows}]"


def parts_of_key(name: str) -> tuple[str, slice | None, int]:
    """Returns the key that a name stands for, which of its rows, and how many it is to have; (key, None, 0) for all.

    >>> parts_of_key("qkv.weight[0:4/12]"), parts_of_key("qkv.weight")
    (('qkv.weight', slice(0, 4, None), 12), ('qkv.weight', None, 0))
    """
    if (found := re.fullmatch(r"(.*)\[(\d+):(\d+)/(\d+)\]", name)) is None:
        return name, None, 0
    key, start, stop, rows = found.groups()
    return key, slice(int(start), int(stop)), int(rows)


def norm_rows(ours: str, theirs: str) -> list[Row]:
    """Returns the rows of a LayerNorm."""
    return [Row(f"{ours}/scale", (f"{theirs}.weight",)), Row(f"{ours}/bias", (f"{theirs}.bias",))]


def dense_rows(ours: str, theirs: str, layout: Layout = TRANSPOSE) -> list[Row]:
    """Returns the rows of a linear layer with a bias; `layout` is that of its weight."""
    return [Row(f"{ours}/kernel", (f"{theirs}.weight",), layout), Row(f"{ours}/bias", (f"{theirs}.bias",))]


def our_fields(
    theirs: Mapping[str, Any], fields: Mapping[str, str], shape: type | None = None, part: str = ""
) -> dict[str, Any]:
    """Returns our configuration's fields from theirs.

    Args:
      theirs: the content of a config.json, or a part of it.
      fields: their name -> ours. A field that is absent or null is left out, so that our default holds.
      shape: our configuration, a dataclass with a default for each field: a value must be of its default's type, and
        a number in the range that a model can have.
      part: the part's name with a point behind it ("text_config."), for messages.

    Raises:
      WeightsError: a value of another type, or outside its range; the message names the field.
    """
    found = {ours: theirs[field] for field, ours in fields.items() if theirs.get(field) is not None}
    if shape is None:
        return found
    defaults = {field.name: field.default for field in dataclasses.fields(shape)}
    for field, ours in fields.items():
        if ours in found:
            found[ours] = _checked(f"{part}{field}", found[ours], type(defaults[ours]), ours)
    return found


def _checked(field: str, value: Any, kind: type, ours: str) -> Any:
    """A field's value, if it is of its kind and in its range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        least, most = (0 if ours == "eos_id" else 1), LARGEST.get(ours, 2**24)
        if not number or not least <= value <= most or value != math.floor(value):
            raise WeightsError(f"{field} is {value!r:.60}, not a whole number from {least} to {most:,}")
        return int(value)
    if kind is float:
        low, high = (0, 1) if ours == "dropout" else (0, 1e30)
        if not number or not (low < value < high or (ours == "dropout" and value == 0)):
            raise WeightsError(f"{field} is {value!r:.60}, not a number {'in [0, 1)' if high == 1 else 'above 0'}")
        return float(value)
    if not isinstance(value, kind):
        raise WeightsError(f"{field} is {value!r:.60}, not {'true or false' if kind is bool else 'a text'}")
    return value


def their_fields(ours: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    """Returns config.json's fields from our configuration; `fields` as in `our_fields`."""
    return {field: getattr(ours, name) for field, name in fields.items()}


def check_fixed(theirs: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuses a config.json that changes what our implementation has fixed.

    Raises:
      WeightsError: a field is there with another value than the one in `fixed`.
    """
    for field, value in fixed.items():
        if theirs.get(field, value) != value:
            raise WeightsError(f"{field} {theirs[field]!r} is not supported, only {value!r}")

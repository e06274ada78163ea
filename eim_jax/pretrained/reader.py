"""A Hugging Face directory (config.json and safetensors) read into our parameters and written from them.

Which key makes which of our leaves, and how, is said by the rows of a model's own file (`models/hugging_face.Row`).
Every key and every shape is checked before an array is read; leaf by leaf is placed, so at most one leaf is in memory
twice.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from eim_jax.models.hugging_face import Layout, Row, WeightsError, parts_of_key
from eim_jax.pretrained.weight_files import Tensors

SHARD = "5GB"  # the largest file of weights, as transformers and the hub have it


class Leaf(NamedTuple):
    """What fills one leaf of ours."""

    keys: list[tuple[str, ...]]  # one tuple a layer; a single one for leaves that are not stacked
    layout: Layout
    stacked: bool


def leaves_of(rows: tuple[Row, ...], layers: Mapping[str, int], scan: bool) -> dict[str, Leaf]:
    """Returns our paths -> what fills them.

    Args:
      rows: a model's key table.
      layers: tower ("lm", "visual", "text") -> its number of blocks.
      scan: the blocks' leaves are stacked.
    """
    leaves = {}
    for row in rows:
        if "{i}" not in row.ours:
            leaves[row.ours] = Leaf([row.theirs], row.layout, stacked=False)
            continue
        keys = [tuple(k.replace("{i}", str(i)) for k in row.theirs) for i in range(layers[row.ours.split("/")[0]])]
        if scan:
            leaves[row.ours.replace("blocks_{i}", "blocks")] = Leaf(keys, row.layout, stacked=True)
        else:
            for i, k in enumerate(keys):
                leaves[row.ours.replace("{i}", str(i))] = Leaf([k], row.layout, stacked=False)
    return leaves


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts an array where a sharding says; on the default device if None."""
    if sharding is None:
        return jnp.asarray(array)
    # Unlike device_put this moves each device its own part only, on every process of a multi-process run.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def kind_of(dtype: DTypeLike | Mapping[str, DTypeLike], path: str) -> DTypeLike:
    """Returns a leaf's dtype: the one of all leaves, or its own in a mapping from our paths."""
    return dtype[path] if isinstance(dtype, Mapping) else dtype


def read_leaves(
    tensors: Tensors,
    leaves: dict[str, Leaf],
    *,
    dtype: DTypeLike | Mapping[str, DTypeLike],
    shardings: Callable | None,
) -> dict[str, jax.Array]:
    """Returns our paths -> arrays of `dtype`, each placed where shardings(path) says, one leaf after the other."""
    flat = {}
    for path, leaf in leaves.items():
        kind = kind_of(dtype, path)
        first = leaf.layout.load([tensors.read(k) for k in leaf.keys[0]])
        if leaf.stacked:
            array = np.empty((len(leaf.keys), *first.shape), kind)
            array[0] = first
            for i, keys in enumerate(leaf.keys[1:], start=1):
                array[i] = leaf.layout.load([tensors.read(k) for k in keys])
        else:
            array = first.astype(kind)
        flat[path] = place(array, shardings(path) if shardings else None)
    return flat


def write_leaves(flat: Mapping[str, jax.Array | np.ndarray], leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
    """Returns their keys -> arrays, from our leaves.

    Raises:
      WeightsError: a leaf is missing or unexpected.
    """
    missing, unexpected = leaves.keys() - flat.keys(), flat.keys() - leaves.keys()
    if missing or unexpected:
        raise WeightsError(f"parameters to export: missing {sorted(missing)[:8]}, unexpected {sorted(unexpected)[:8]}")
    tensors = {}
    for path, leaf in leaves.items():
        array = np.asarray(flat[path])
        for keys, layer in zip(leaf.keys, array if leaf.stacked else [array], strict=True):
            theirs = leaf.layout.save(layer)
            tensors |= {k: np.ascontiguousarray(x) for k, x in zip(keys, theirs, strict=True)}
    return _joined(tensors)


def _joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with every key whole: the parts of one, in the order of their rows, become one array."""
    whole, parts = {}, {}
    for name, array in tensors.items():
        key, lines, _ = parts_of_key(name)
        if lines is None:
            whole[key] = array
        else:
            parts.setdefault(key, {})[lines.start] = array
    return whole | {key: np.concatenate([found[start] for start in sorted(found)]) for key, found in parts.items()}


def write(
    directory: str | pathlib.Path, config: dict, tensors: dict[str, np.ndarray], shard: str = SHARD
) -> pathlib.Path:
    """Writes config.json and model.safetensors, or several files of at most `shard` ("5GB") and their index.

    Weights of an earlier export are replaced, also where those had other files. Returns the directory.

    Raises:
      WeightsError: `shard` is no size.
    """
    directory = pathlib.Path(directory)
    check_shard(shard)
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda x: x.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    for old in directory.glob("model*.safetensors*"):
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
    for name, keys in split.filename_to_tensors.items():
        # transformers reads the file only if its metadata says which framework's layout it has
        save_file({key: tensors[key] for key in keys}, directory / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(directory / "model.safetensors.index.json", index)
    return directory


def check_shard(shard: str) -> None:
    """Raises WeightsError for a largest file of weights that is no size."""
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", shard):
        raise WeightsError(f"the largest file, {shard!r:.60}, is no size such as 5GB or 500MB")


def _write_json(file: pathlib.Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

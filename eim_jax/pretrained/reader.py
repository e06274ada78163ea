"""A Hugging Face directory (config.json and safetensors) read into our parameters and written from them.

Which key makes which of our leaves, and how, is said by the rows of a model's own file (`models/hugging_face.Row`).
Every key and every shape is checked before an array is read; leaf by leaf is placed, so at most one leaf is in memory
twice.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eim_jax.models.hugging_face import Layout, Row, WeightsError


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


class Tensors:
    """Their keys, read from one model.safetensors or from the shards that an index names.

    `prefix` may stand before any key of the file; here the keys are without it.
    """

    def __init__(self, directory: pathlib.Path, stack: contextlib.ExitStack, prefix: str = ""):
        self._where, self._name = {}, {}
        for path in weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, "numpy"))
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path} cannot be read ({error}); download it again") from error
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.removeprefix(prefix)
                if name in self._where:
                    raise WeightsError(f"{path}: key {key!r} is there a second time, in another file or spelling")
                self._where[name], self._name[name] = file, key

    def __iter__(self) -> Iterator[str]:  # noqa: D105
        return iter(self._where)

    def __contains__(self, key: str) -> bool:  # noqa: D105
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._where[key].get_slice(self._name[key]).get_shape())

    def read(self, key: str) -> np.ndarray:
        """Returns a tensor."""
        return self._where[key].get_tensor(self._name[key])


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns a checkpoint's safetensors files: all shards of an index, or the single file.

    Raises:
      WeightsError: there are none, or not all; the message says what to do.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise WeightsError(
                f"{directory}: {index.name} names {', '.join(missing)}, which are missing; download them"
            )
        return files
    if single.is_file():
        return [single]
    hint = "give a directory that transformers' save_pretrained wrote"
    if list(directory.glob("pytorch_model*.bin")):
        hint = "pytorch_model.bin is not read; load it in transformers once and save_pretrained it"
    raise WeightsError(f"{directory} holds neither {single.name} nor {index.name}; {hint}")


def read_json(path: pathlib.Path) -> dict:
    """Returns the object in a JSON file.

    Raises:
      WeightsError: the file is missing, no JSON, or holds another thing than an object; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; a checkpoint needs it beside its safetensors") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise WeightsError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {content!r:.40}, not an object ({{...}}); download it again")
    return content


def check_keys(directory: pathlib.Path, tensors: Tensors, leaves: dict[str, Leaf], shapes: dict, ignored: str) -> None:
    """Raises WeightsError unless the keys are exactly the table's and every shape is the configuration's."""
    problems, known = [], set()
    for path, leaf in leaves.items():
        shape = shapes[path].shape[1:] if leaf.stacked else shapes[path].shape
        # np.empty touches no memory, and every layout only views it
        theirs = [a.shape for a in leaf.layout.save(np.empty(shape, np.int8))]
        for keys in leaf.keys:
            known.update(keys)
            for key, expected in zip(keys, theirs, strict=True):
                if key not in tensors:
                    problems.append(f"key {key!r} (our {path}) is missing")
                elif tensors.shape(key) != expected:
                    problems.append(f"key {key!r} (our {path}) has shape {tensors.shape(key)}, not {expected}")
    problems += [f"key {k!r} is unexpected" for k in tensors if k not in known and not re.fullmatch(ignored, k)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightsError(f"{directory}: {shown}. Check that config.json and the safetensors are of the same model.")


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


def write_leaves(flat: dict[str, jax.Array], leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
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
    return tensors


def of_table(directory: pathlib.Path, table: Mapping[str, Any], role: str) -> tuple[Any, dict]:
    """Returns the entry of a table of kinds that a checkpoint is of, and its config.json.

    Args:
      directory: the checkpoint's.
      table: model_type -> what reads it.
      role: what the checkpoint is wanted for, for the message.

    Raises:
      WeightsError: config.json is missing, or its model_type is not in the table.
    """
    config = read_json(directory / "config.json")
    name = config.get("model_type")
    if name not in table:
        known = " or ".join(map(repr, table))
        raise WeightsError(f"{directory}/config.json: model_type is {name!r}; {role} is a {known}")
    return table[name], config


@contextlib.contextmanager
def naming(directory: pathlib.Path) -> Iterator[None]:
    """Puts the name of a checkpoint's config.json before the WeightsErrors that are raised inside."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{directory}/config.json: {error}") from error


def write(directory: str | pathlib.Path, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes config.json and model.safetensors; returns the directory."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers reads the file only if its metadata says which framework's layout it has
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory

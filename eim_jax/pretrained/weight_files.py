"""The weight files of a directory: which are read, what may stand in them, and what is none of them.

Only headers are read before every key, shape and dtype is known to be right.
"""

import contextlib
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from eim_jax.models.hugging_face import WeightsError, parts_of_key
from eim_jax.pretrained import torch_files
from eim_jax.pretrained.json_files import WHOLE, check_adapter, read_json
from eim_jax.pretrained.torch_files import Header
from eim_jax.utils.console import console

DTYPES = ("F32", "F16", "BF16")  # safetensors' names of what is read
_CODES = r".*\.(qweight|qzeros|g_idx|weight_packed|absmax|quant_map)"  # what GPTQ, AWQ and others store beside
_DEEP = 128  # layers from which on the files are asked before anything is made for each
_MANY = 2**28  # elements from which on no array is made to say a shape


class Tensors:
    """Their keys, from the open files of `open_files`: safetensors, or torch.save's `WeightFile`, which looks like one.

    `prefix` may stand before any key of the file; here the keys are without it. A key may be asked for by its parts
    (`hugging_face.part`); parts of a tensor with another number of rows have its whole shape.
    """

    def __init__(self, files: Mapping[pathlib.Path, Any], prefix: str = ""):
        self._where, self._name, self._path = {}, {}, {}
        for path, file in files.items():
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.removeprefix(prefix)
                if name in self._where:
                    raise WeightsError(f"{path}: key {key!r} is there a second time, in another file or spelling")
                self._where[name], self._name[name], self._path[name] = file, key, path

    def __iter__(self) -> Iterator[str]:  # noqa: D105
        return iter(self._where)

    def __contains__(self, key: str) -> bool:  # noqa: D105
        return parts_of_key(key)[0] in self._where

    def __len__(self) -> int:  # noqa: D105
        return len(self._where)

    def path(self, key: str) -> pathlib.Path:
        """Returns the file that holds a tensor."""
        return self._path[parts_of_key(key)[0]]

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        key, lines, rows = parts_of_key(key)
        shape = tuple(self._where[key].get_slice(self._name[key]).get_shape())
        return (lines.stop - lines.start, *shape[1:]) if lines is not None and shape[:1] == (rows,) else shape

    def dtype(self, key: str) -> str:
        """Returns safetensors' name of a tensor's dtype without reading it."""
        key, _, _ = parts_of_key(key)
        return self._where[key].get_slice(self._name[key]).get_dtype()

    def read(self, key: str) -> np.ndarray:
        """Returns a tensor.

        Raises:
          WeightsError: it holds NaN or infinity.
        """
        key, lines, _ = parts_of_key(key)
        array = self._where[key].get_tensor(self._name[key])
        array = array if lines is None else array[lines]
        if not _finite(array):
            raise WeightsError(
                f"{self._path[key]}: key {self._name[key]!r} holds NaN or infinity; the file is damaged or its "
                "training went wrong: download it again, or take an earlier checkpoint"
            )
        return array


def _finite(array: np.ndarray) -> bool:
    if array.dtype.itemsize != 2:  # min and max carry a NaN along, and need no second array
        return bool(array.size == 0 or (np.isfinite(array.min()) and np.isfinite(array.max())))
    exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)  # all ones in NaN and infinity alone
    return not ((array.view(np.uint16) & exponent) == exponent).any()


def open_files(files: Sequence[pathlib.Path], stack: contextlib.ExitStack) -> dict[pathlib.Path, Any]:
    """Opens weight files, which `stack` keeps open; nothing of them is read.

    Raises:
      WeightsError: one cannot be read; the message names it.
    """
    found = {}
    for path in files:
        if path.suffix != ".safetensors":
            found[path] = torch_files.WeightFile(torch_files.read(path), path)
            continue
        try:
            found[path] = stack.enter_context(safe_open(path, "numpy"))
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read ({error}); download it again") from error
    return found


class Joined:
    """The shards of one model as one open file: each key is split over all of them, or the same in each.

    Args:
      files: the shards, open, in order.
      axis: (key, shape in a shard) -> along which axis they are joined; None where all hold the same.
    """

    def __init__(self, files: Mapping[pathlib.Path, Any], axis: Callable[[str, tuple[int, ...]], int | None]):
        self._files, self._axis = list(files.values()), axis
        first, *others = files.items()
        for path, file in others:
            if set(file.keys()) != set(first[1].keys()):
                raise WeightsError(f"{path} has other keys than {first[0]}: they are not shards of one model")

    def keys(self) -> Any:
        """Returns the keys."""
        return self._files[0].keys()

    def get_slice(self, key: str) -> Any:
        """Returns what is known of a tensor without reading it."""
        header = self._files[0].get_slice(key)
        shape = list(header.get_shape())
        if (axis := self._axis(key, tuple(shape))) is not None:
            shape[axis] = sum(file.get_slice(key).get_shape()[axis] for file in self._files)
        return Header(shape, header.get_dtype())

    def get_tensor(self, key: str) -> np.ndarray:
        """Returns a tensor, its parts joined."""
        axis = self._axis(key, tuple(self._files[0].get_slice(key).get_shape()))
        if axis is None:
            return self._files[0].get_tensor(key)
        return np.concatenate([file.get_tensor(key) for file in self._files], axis)


def open_weights(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[pathlib.Path, Any]:
    """Opens the weight files of a directory; as `weight_files` and `open_files`."""
    return open_files(weight_files(directory), stack)


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns a checkpoint's weight files: the single file, or all shards of an index, as transformers chooses.

    safetensors go before torch.save's pytorch_model.bin, and both before the shards of a model's authors.

    Raises:
      WeightsError: there are none, or not all; the message says what to do.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, single = directory / f"{name}.index.json", directory / name
        if single.is_file():
            if index.is_file():
                _note_both(single, index.name)
            return [single]
        if index.is_file():
            return _shards(directory, index)
    if shards := sorted(directory.glob("consolidated.*.pth")):
        return shards
    check_adapter(directory)
    hint = "give a directory that transformers' save_pretrained wrote"
    raise WeightsError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json; {hint}")


def _shards(directory: pathlib.Path, index: pathlib.Path) -> list[pathlib.Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{index}: weight_map is {names!r:.60}, not an object of key -> file name")
    for key, name in names.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise WeightsError(f"{index}: weight_map.{key} is {name!r:.60}, not the name of a file beside it")
    files = [directory / name for name in sorted(set(names.values()))]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise WeightsError(f"{directory}: {index.name} names {', '.join(missing)}, which are missing; download them")
    return files


@functools.cache
def _note_both(single: pathlib.Path, index: str) -> None:
    """Said once: which of two copies of the weights is read."""
    console.print(f"{single} is read, as transformers does; {index} beside it is not", soft_wrap=True)


def check_depth(directory: pathlib.Path, layers: Mapping[str, int]) -> None:
    """Raises WeightsError for more layers than the files have tensors, before anything is made for each layer.

    Args:
      directory: the checkpoint's; one without weights (a plan needs none) is let through.
      layers: tower -> its number of blocks.
    """
    if max(layers.values()) <= _DEEP or not any(directory.glob("model.safetensors*")):
        return
    with contextlib.ExitStack() as stack:
        count = len(Tensors(open_weights(directory, stack)))
    for tower, depth in layers.items():
        if depth > count:
            raise WeightsError(
                f"{directory}/config.json gives the tower {tower!r} {depth:,} layers, but the safetensors hold "
                f"{count:,} tensors in all. Check that they are of the same model."
            )


def check_keys(
    directory: pathlib.Path,
    tensors: Tensors,
    leaves: Mapping,
    shapes: Mapping,
    ignored: str,
    *,
    missing: Sequence[str] = (),
    advice: str = "Check that config.json and the weights are of the same model.",
) -> None:
    """Raises WeightsError unless the keys are exactly the table's, and every dtype and shape is one that we can read.

    Args:
      directory: the checkpoint's, for messages.
      tensors: its keys.
      leaves: our paths -> `reader.Leaf`.
      shapes: our paths -> shape.
      ignored: a regular expression over keys that hold no parameter.
      missing: leaves of ours that no key of the table fills, and that must be filled.
      advice: the end of the message.
    """
    known = {parts_of_key(key)[0] for leaf in leaves.values() for keys in leaf.keys for key in keys}
    unexpected = [key for key in tensors if key not in known and not re.fullmatch(ignored, key)]
    _check_dtypes([key for key in tensors if key in known or re.fullmatch(_CODES, key)], tensors)
    problems = [problem for path, leaf in leaves.items() for problem in _differences(path, leaf, shapes[path], tensors)]
    problems += [f"nothing fills our {path}" for path in missing]
    problems += [f"key {key!r} is unexpected" for key in unexpected]
    if problems:
        _name_wrapped(directory, known, list(tensors))
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightsError(f"{directory}: {shown}. {advice}")


def _differences(path: str, leaf: Any, ours: jax.ShapeDtypeStruct, tensors: Tensors) -> Iterator[str]:
    """What keeps one leaf from being filled."""
    shape = ours.shape[1:] if leaf.stacked else ours.shape
    theirs = None
    size, held = math.prod(shape), sum(math.prod(tensors.shape(key)) for key in leaf.keys[0] if key in tensors)
    if size < _MANY or size == held:
        # np.empty touches no memory, and every layout only views it
        theirs = [a.shape for a in leaf.layout.save(np.empty(shape, np.int8))]
    for keys in leaf.keys:
        for i, key in enumerate(keys):
            if key not in tensors:
                yield f"key {key!r} (our {path}) is missing"
            elif theirs is None:
                yield f"key {key!r} has shape {tensors.shape(key)}, while our {path} has {shape}"
            elif tensors.shape(key) != theirs[i]:
                yield f"key {key!r} (our {path}) has shape {tensors.shape(key)}, not {theirs[i]}"


def _check_dtypes(keys: list[str], tensors: Tensors) -> None:
    others = {key: kind for key in keys if (kind := tensors.dtype(key)) not in DTYPES}
    if others:
        key, kind = next(iter(others.items()))
        what = "fp8" if kind.startswith("F8") else "integer codes" if kind[0] in "IU" else "another number format"
        raise WeightsError(
            f"{tensors.path(key)}: {len(others)} tensors are no weights as they are ({what}): the first is {key!r} of "
            f"{kind}; only {', '.join(DTYPES)} are read. {WHOLE.capitalize()}."
        )


def _name_wrapped(directory: pathlib.Path, known: set[str], found: list[str]) -> None:
    """Raises WeightsError where keys are the right ones but for what a wrapper put before them, or took away."""
    if any(".lora_" in key or ".base_layer." in key for key in found) and not any(".lora_" in key for key in known):
        raise WeightsError(
            f"{directory}: its keys are a PEFT (LoRA) model's, saved with its adapter inside ({found[0]!r}): merge it "
            "once (merge_and_unload) and save_pretrained the result"
        )
    here, longest = set(found), sorted(known, key=len)[-3:]
    for wrapper in {key.removesuffix(end) for end in longest for key in found if key.endswith(end)} - {""}:
        if sum(wrapper + key in here for key in known) > len(known) // 2:
            raise WeightsError(
                f"{directory}: {wrapper!r} stands before its keys ({wrapper + longest[-1]!r}): a wrapper was saved "
                "(DataParallel, torch.compile, another model); save_pretrained the model inside"
            )
    for outer in {key.partition(".")[0] + "." for key in longest}:
        stripped = {key.removeprefix(outer) for key in known if key.startswith(outer)}
        if len(stripped & here) > len(stripped) // 2 and stripped.isdisjoint(known):
            raise WeightsError(
                f"{directory}: {outer!r} is missing before its keys ({min(stripped & here)!r}): only a part of the "
                "model was saved; save_pretrained the whole model"
            )

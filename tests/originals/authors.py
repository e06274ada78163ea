"""The authors' arrays under our names: their files read without PyTorch, their layouts turned into ours.

Written from what their code does with each tensor, and apart from the package's key tables: neither checks itself.
"""

import collections
import functools
import json
import pathlib
import pickle
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from close import size_of
from shared_folders import shared

_STORAGE = {"FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "ByteStorage": "u1"}


original = functools.partial(shared, "originals")  # name -> its folder, or a skipped test


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """An npz, whole."""
    with np.load(path, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def group(held: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries under "prefix/", without it."""
    return {name.removeprefix(prefix + "/"): a for name, a in held.items() if name.startswith(prefix + "/")}


def read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


class _Tensors(pickle.Unpickler):
    """Unpickles plain containers and tensors, and refuses any other global: nothing else can run."""

    def __init__(self, archive: zipfile.ZipFile):
        index = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        self._archive, self._root = archive, index.removesuffix("data.pkl")
        super().__init__(archive.open(index))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE:
            return _STORAGE[name]
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": _rebuild,
            "argparse.Namespace": type("Namespace", (), {}),
        }
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), dtype)


def _rebuild(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    steps = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def read_torch(path: pathlib.Path) -> Any:
    """What torch.save wrote into a zip file, its tensors as NumPy arrays."""
    with zipfile.ZipFile(path) as archive:
        return _Tensors(archive).load()


def dense(held: dict[str, np.ndarray], theirs: str, ours: str, *, bias: bool = True) -> dict[str, np.ndarray]:
    """A torch.nn.Linear [out in]."""
    found = {f"{ours}/kernel": held[f"{theirs}.weight"].T}
    return found | ({f"{ours}/bias": held[f"{theirs}.bias"]} if bias else {})


def norm(held: dict[str, np.ndarray], theirs: str, ours: str) -> dict[str, np.ndarray]:
    """A torch.nn.LayerNorm."""
    return {f"{ours}/scale": held[f"{theirs}.weight"], f"{ours}/bias": held[f"{theirs}.bias"]}


def placed(flat: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The leaves as float32 arrays of JAX."""
    return {path: jnp.asarray(np.asarray(leaf, np.float32)) for path, leaf in flat.items()}


def off(ours: Any, theirs: Any) -> float:
    """The largest difference of two arrays of one shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max(initial=0))


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of two flat trees of the same paths, as a fraction of the largest number in theirs."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    return max(off(ours[path], theirs[path]) for path in theirs) / size_of(*theirs.values())

"""Where a queue's rows lie: filled up to a multiple of the devices, each process reading those of its own."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from eim_jax.losses.queue_build import rows_sharding, whole
from eim_jax.losses.queue_files import StoredRows
from eim_jax.parallel.sharding import parts_of, rows_of_each

_BLOCK = 65_536  # rows that are read at once


def padded(count: int, mesh: Mesh | None) -> int:
    """The rows of a queue of `count` samples on all devices, padding included."""
    return rows_of_each(count, mesh) * parts_of(mesh)


def place_groups(groups: Any, count: int, mesh: Mesh | None) -> jax.Array:
    """Places the samples' group numbers; None: every sample is a group of its own. -1 in the padding."""
    groups = np.arange(count) if groups is None else groups
    return place_rows(np.asarray(groups, np.int32), padded(count, mesh), mesh, fill=-1)


def place_rows(rows: np.ndarray | StoredRows, total: int, mesh: Mesh | None, fill: int) -> jax.Array:
    """Places `rows`, filled up to `total`, reading on each process only what its devices hold."""
    shape, dtype = (total, *rows.shape[1:]), jax.dtypes.canonicalize_dtype(rows.dtype)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        out = _aligned((stop - start, *shape[1:]), dtype)
        real = min(stop, len(rows)) - start
        for begin in range(0, real, _BLOCK):  # rows of a file are copied on the way
            end = min(begin + _BLOCK, real)
            out[begin:end] = rows[start + begin : start + end]
        out[max(real, 0) :] = fill
        return out

    return jax.make_array_from_callback(shape, rows_sharding(mesh), part)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, which JAX takes over on CPU instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def place_whole(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array that every device holds."""
    where = rows_sharding(None) if mesh is None else whole(mesh)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

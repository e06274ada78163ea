"""Queues: read-only arrays with one fixed key for each training sample, built once, kept on disk, sharded by row.

| queue | key of a sample (EIM, section on the pre-built queues) | read by |
|---|---|---|
| caption K_t | [EOS] feature of CLIP.text | loss_IE |
| embed K_e | mean over tokens of the LM's input embeddings (LM_e) | loss_ST |
| hidden K_b | [EOS] feature out of the original LM_block | loss_LM |
"""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from eim_jax.parallel.processes import barrier, is_first
from eim_jax.parallel.sharding import parts_of, queue_sharding
from eim_jax.utils.console import progress as shown

QUEUES = ("caption", "embed", "hidden")


class Queue(NamedTuple):
    """Row i is sample i's key; rows from `count` on are zeros that fill the last device."""

    keys: Float[Array, "N D"] | Int[Array, "N D"]
    groups: Int[Array, "N"]  # samples of one image share a number; -1 in the padding
    count: int  # real rows
    scale: Float[Array, "N"] | None = None  # of int8 keys: row j times scale[j] is the key


class StaleQueue(ValueError):
    """The queue on disk was made from something else than what is asked for; the message names every difference."""


class BadRow(ValueError):
    """A sample's key is not finite, or has no direction."""


def manifest(
    kind: str,
    *,
    weights: str,
    data: str,
    tokenizer: str,
    pooling: str,
    similarity: str,
    dtype: str,
    count: int,
) -> dict[str, Any]:
    """Returns what decides a queue's content: its kind, three fingerprints, how rows are pooled and held, and how many.

    `save` adds the width. Raises ValueError for an unknown kind.
    """
    if kind not in QUEUES:
        raise ValueError(f"unknown queue {kind!r}: one of {', '.join(QUEUES)}")
    return {
        "kind": kind,
        "weights": weights,
        "data": data,
        "tokenizer": tokenizer,
        "pooling": pooling,
        "similarity": similarity,
        "dtype": jnp.dtype(dtype).name,
        "count": count,
    }


def build(
    name: str,
    encode: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    tokens: np.ndarray,
    valid: np.ndarray,
    groups: np.ndarray,
    *,
    batch: int,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    similarity: str = "cosine",
    ids: Sequence[str] | None = None,
    progress: bool = False,
) -> Queue:
    """Encode N samples, `batch` at a time, into a queue whose row i is sample i.

    encode(params, tokens int32[b t], valid bool[b t]) -> [b D] is compiled once. tokens [N t], valid [N t] and groups
    [N] are NumPy arrays, whole on every process. Each device encodes the rows that it will hold, so no key ever moves
    and the host holds none. Rows are normalised in float32 when similarity="cosine", then cast to `dtype`.

    Raises BadRow naming the sample (by `ids`, else by row) whose key is not finite or, for cosine, zero.
    """
    count = len(tokens)
    if not count or len(valid) != count or len(groups) != count or (ids is not None and len(ids) != count):
        raise ValueError(f"queue {name!r}: {count} token rows, {len(valid)} masks, {len(groups)} groups, or ids differ")
    shards = parts_of(mesh)
    held = -(-count // shards)  # rows a device holds
    rows = min(max(1, batch // shards), held)  # rows a device encodes at a time
    by_row = _sharding(mesh)

    def encode_rows(params, tokens, valid, row):
        key = encode(params, tokens.reshape(-1, *tokens.shape[2:]), valid.reshape(-1, *valid.shape[2:]))
        key = key.astype(jnp.float32)
        square = jnp.sum(key * key, axis=-1)
        good = jnp.isfinite(square) & ((square > 0) | (similarity != "cosine"))
        if similarity == "cosine":
            key = key * lax.rsqrt(jnp.where(good, square, 1))[:, None]
        key, good = key.reshape(shards, -1, key.shape[-1]), good.reshape(shards, -1)
        key = jnp.where((row < count)[..., None], key, 0)
        return compress(key, dtype), jnp.min(jnp.where(good, count, row))

    def step(keys, params, tokens, valid, row, start):
        key, bad = encode_rows(params, tokens, valid, row)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return jax.tree.map(put, keys, key), bad

    step = jax.jit(step, donate_argnums=0, out_shardings=None if mesh is None else (by_row, _whole(mesh)))

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, by_row, lambda index: array[index])

    starts = [min(i * rows, held - rows) for i in range(-(-held // rows))]  # the last step overlaps the one before
    pending, keys = None, None
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=by_row)
    with shown(f"queue {name}", count, "keys") if progress else nullcontext(lambda _: None) as advance:
        for done, start in enumerate(starts, 1):
            row = np.arange(shards, dtype=np.int32)[:, None] * held + np.arange(start, start + rows, dtype=np.int32)
            source = np.minimum(row, count - 1)  # padding rows encode some real text, and are then set to zero
            inputs = (place(tokens[source]), place(valid[source]), place(row))
            if keys is None:
                parts = jax.eval_shape(encode_rows, params, *inputs)[0]
                keys = jax.tree.map(lambda part: zeros((shards, held, *part.shape[2:]), part.dtype), parts)
            keys, bad = step(keys, params, *inputs, start)
            _check(name, pending, count, ids, similarity)  # one step behind, so that the devices never wait
            pending = bad
            advance(min(count, done * rows * shards) - min(count, (done - 1) * rows * shards))
        _check(name, pending, count, ids, similarity)
    flat = jax.jit(lambda x: x.reshape(-1, *x.shape[2:]), donate_argnums=0, out_shardings=by_row)
    keys, scale = jax.tree.map(flat, keys)
    return Queue(keys, _place_rows(np.asarray(groups, np.int32), len(keys), mesh, fill=-1), count, scale)


def compress(keys: Float[Array, "*rows D"], dtype: Any) -> tuple[Array, Float[Array, "*rows"] | None]:
    """Returns the keys in `dtype`; int8: codes -127..127, and the scale of each row that brings its largest to 127."""
    if jnp.dtype(dtype) != jnp.int8:
        return keys.astype(dtype), None
    scale = jnp.max(jnp.abs(keys), axis=-1).astype(jnp.float32) / 127
    return jnp.round(keys / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def save(directory: str | os.PathLike, queue: Queue, manifest: dict[str, Any]) -> None:
    """Write the queue's real rows (keys.npy, groups.npy; int8: scale.npy) and manifest.json, whole or not at all.

    All processes call it with the same directory on a shared file system. Several write a file for each device's rows,
    keys-FIRSTROW.npy: no file has two writers, which NFS and buckets forbid. bfloat16 is stored as its bits.
    Raises ValueError where the manifest contradicts the queue's dtype, count or width.
    """
    target = pathlib.Path(directory)
    scratch, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    count, width = int(queue.count), queue.keys.shape[1]
    facts = {"dtype": queue.keys.dtype.name, "count": count, "width": width}
    for field, value in facts.items():
        if manifest.get(field, value) != value:
            raise ValueError(f"manifest says {field}={manifest[field]!r}, the queue has {value!r}")
    first = is_first()
    several = jax.process_count() > 1
    arrays = [("keys", queue.keys), ("groups", queue.groups)]
    if queue.scale is not None:
        arrays.append(("scale", queue.scale))
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / "manifest.json").write_text(json.dumps({**manifest, **facts}, indent=1) + "\n")
    barrier(f"queue files {target.name}")
    for name, array in arrays:
        stored = _stored(array.dtype)
        if not several:
            out = np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", stored, (count, *array.shape[1:]))
        for shard in array.addressable_shards:
            start = shard.index[0].start or 0
            if shard.replica_id == 0 and start < count:
                rows = np.asarray(shard.data)[: count - start].view(stored)
                if several:
                    np.save(scratch / f"{name}-{start:012d}.npy", rows)
                else:
                    out[start : start + len(rows)] = rows
        if not several:
            out.flush()
    barrier(f"queue rows {target.name}")
    if first:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(scratch, target)
        shutil.rmtree(old, ignore_errors=True)
    barrier(f"queue done {target.name}")


def load(directory: str | os.PathLike, manifest: dict[str, Any], mesh: Mesh | None = None) -> Queue:
    """Read a queue that `manifest` describes; each process reads only its rows, padded to a multiple of the mesh.

    Raises StaleQueue naming each field in which the file differs (width, which is only known once built, may be left
    out), FileNotFoundError where there is no queue.
    """
    source = pathlib.Path(directory)
    found = json.loads((source / "manifest.json").read_text())
    expected = json.loads(json.dumps(manifest))
    fields = [*expected, *(field for field in found if field not in expected and field != "width")]
    different = [
        f"  {field}: expected {expected.get(field, '(absent)')!r}, found {found.get(field, '(absent)')!r}"
        for field in fields
        if field not in expected or field not in found or expected[field] != found[field]
    ]
    if different:
        remedy = "Delete it to have it built anew, or give this run the setting that it was built with."
        raise StaleQueue("\n".join([f"the queue in {source} is another one:", *different, remedy]))
    count, dtype = found["count"], jnp.dtype(found["dtype"])
    keys, groups = _Stored(source, "keys"), _Stored(source, "groups")
    if keys.shape != (count, found["width"]) or groups.shape != (count,) or keys.dtype != _stored(dtype):
        raise StaleQueue(
            f"the queue in {source} is damaged: keys {keys.shape} {keys.dtype}, groups {groups.shape}, but its "
            f"manifest says {count} rows of width {found['width']} in {dtype.name}. Delete it to have it built anew."
        )
    shards = parts_of(mesh)
    total = -(-count // shards) * shards
    keys.dtype = dtype
    scale = _place_rows(_Stored(source, "scale"), total, mesh, 0) if dtype == jnp.int8 else None
    return Queue(_place_rows(keys, total, mesh, 0), _place_rows(groups, total, mesh, -1), count, scale)


class _Stored:
    """The rows of a queue's file, or of its files in order, memory-mapped; `dtype` is what they are read as."""

    def __init__(self, directory: pathlib.Path, name: str):
        files = sorted(directory.glob(f"{name}-*.npy")) or [directory / f"{name}.npy"]
        self._parts = [np.load(file, mmap_mode="r") for file in files]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.dtype = self._parts[0].dtype
        self.shape = (int(self._starts[-1]), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        found = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for first, part in zip(self._starts, self._parts, strict=False)
        ]
        return np.concatenate(found).view(self.dtype)


def _stored(dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else np.dtype(dtype)  # .npy has no name for bfloat16


def _sharding(mesh: Mesh | None) -> Sharding:
    return queue_sharding(mesh) if mesh is not None else SingleDeviceSharding(jax.local_devices()[0])


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _place_rows(rows: np.ndarray | _Stored, total: int, mesh: Mesh | None, fill: int) -> jax.Array:
    """Places `rows`, filled up to `total`, reading on each process only what its devices hold."""
    shape = (total, *rows.shape[1:])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        out = np.full((stop - start, *shape[1:]), fill, rows.dtype)
        real = rows[start : min(stop, len(rows))]
        out[: len(real)] = real
        return out

    return jax.make_array_from_callback(shape, _sharding(mesh), part)


def _check(name: str, bad: jax.Array | None, count: int, ids: Sequence[str] | None, similarity: str) -> None:
    if bad is None or (row := int(bad)) >= count:
        return
    sample = f"sample {ids[row]!r} (row {row})" if ids is not None else f"row {row}"
    reason = "not finite or zero, so it has no direction" if similarity == "cosine" else "not finite"
    raise BadRow(f"queue {name!r}: the key of {sample} is {reason}; look at its text, or drop the sample")

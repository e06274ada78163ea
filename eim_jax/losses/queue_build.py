"""How a queue's keys are made: samples encoded a batch at a time, each device filling its own rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from eim_jax.parallel.sharding import parts_of, queue_sharding


def compress(keys: Float[Array, "*rows D"], dtype: Any) -> tuple[Array, Float[Array, "*rows"] | None]:
    """Returns the keys in `dtype`; int8: codes -127..127, and the scale of each row that brings its largest to 127."""
    if jnp.dtype(dtype) != jnp.int8:
        return keys.astype(dtype), None
    scale = jnp.max(jnp.abs(keys), axis=-1).astype(jnp.float32) / 127
    return jnp.round(keys / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def encode_all(encode, params, fields, count, batch, dtype, similarity, mesh, parts):
    """Encodes a queue's keys step by step; the arguments are those of `Queue.build`, `count` samples.

    Yields:
      After each step, and first of all after those whose rows `parts` holds: (keys and scale [devices, rows a device,
      ...] as far as they are filled, the first bad row, samples encoded since, steps done; 0 where these are no rows to
      keep: the last step also encodes some of the step before).
    """
    shards = parts_of(mesh)
    held = -(-count // shards)  # rows a device holds
    rows = min(max(1, batch // shards), held)  # rows a device encodes at a time
    by_row = rows_sharding(mesh)

    def encode_rows(params, fields, row):
        fields = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), fields)
        keys, bad = as_keys(encode(params, fields).astype(jnp.float32), row.reshape(-1), count, similarity)
        return compress(keys.reshape(shards, -1, keys.shape[-1]), dtype), bad

    def step(keys, params, fields, row, start):
        key, bad = encode_rows(params, fields, row)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return jax.tree.map(put, keys, key), bad

    step = jax.jit(step, donate_argnums=0, out_shardings=None if mesh is None else (by_row, whole(mesh)))
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=by_row)
    keys = None
    starts = [min(i * rows, held - rows) for i in range(-(-held // rows))]  # the last step overlaps the one before
    before = 0 if parts is None else parts.open(shards, held, rows, by_row)
    if parts is not None and before:
        keys = parts.restore(by_row)
        yield keys, None, min(count, before * rows * shards), 0
    for done, start in list(enumerate(starts, 1))[before:]:
        row = np.arange(shards, dtype=np.int32)[:, None] * held + np.arange(start, start + rows, dtype=np.int32)
        source = np.minimum(row, count - 1)  # padding rows encode some real sample, and are then set to zero
        inputs = (jax.tree.map(functools.partial(_take, rows=source, sharding=by_row), fields), _put(row, by_row))
        if keys is None:
            made = jax.eval_shape(encode_rows, params, *inputs)[0]
            keys = jax.tree.map(lambda leaf: zeros((shards, held, *leaf.shape[2:]), leaf.dtype), made)
        keys, bad = step(keys, params, *inputs, start)
        more = min(count, done * rows * shards) - min(count, (done - 1) * rows * shards)
        yield keys, bad, more, done if done < len(starts) else 0


def as_keys(vectors: jax.Array, row: jax.Array, count: int, similarity: str) -> tuple[jax.Array, jax.Array]:
    """Returns float32 vectors [b D] of these rows as keys, zero in the padding, and the first row that is no key."""
    square = jnp.sum(vectors * vectors, axis=-1)
    good = jnp.isfinite(square) & ((square > 0) | (similarity != "cosine"))
    if similarity == "cosine":
        vectors = vectors * lax.rsqrt(jnp.where(good, square, 1))[:, None]
    return jnp.where((row < count)[:, None], vectors, 0), jnp.min(jnp.where(good, count, row))


def _take(field: Any, rows: np.ndarray, sharding: Sharding) -> jax.Array:
    """The field's rows [devices, rows a device, ...]; each process asks for those of its own devices."""
    shape = (*rows.shape, *field.shape[1:])

    def part(index: Any) -> np.ndarray:
        return np.asarray(field[rows[index[:2]]])

    return jax.make_array_from_callback(shape, sharding, part)


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def rows_sharding(mesh: Mesh | None) -> Sharding:
    """Returns how a queue's rows lie over a mesh; on the first device without one."""
    return queue_sharding(mesh) if mesh is not None else SingleDeviceSharding(jax.local_devices()[0])


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the placement of a value that every device holds."""
    return NamedSharding(mesh, PartitionSpec())

"""How a queue's keys are made: samples encoded a batch at a time, each device filling its own rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from eim_jax.losses.queue_steps import plan_steps
from eim_jax.parallel.sharding import parts_of, queue_sharding, rows_of_each


def compress(keys: Float[Array, "*rows D"], dtype: Any) -> tuple[Array, Float[Array, "*rows"] | None]:
    """Returns the keys in `dtype`; int8: codes -127..127, and the scale of each row that brings its largest to 127."""
    if jnp.dtype(dtype) != jnp.int8:
        return keys.astype(dtype), None
    scale = jnp.max(jnp.abs(keys), axis=-1).astype(jnp.float32) / 127
    return jnp.round(keys / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


_NUMBERS = 2**26  # of a tower's residual stream that a device holds at once: slots x width of all its rows
_ROWS = 256  # at most; more bring no speed
_UNKNOWN = 2**18  # numbers of a row of a source that does not say: 256 rows


def rows_at_once(size: int | None) -> int:
    """Returns how many rows a device encodes at a time, where one of them takes `size` numbers at its longest.

    A layer's scores, activations and copies are some tens of times as much: LLaMA-7B at 512 slots gets 32 rows, whose
    scores are 1 GiB, and CLIP's text tower 256.

    >>> rows_at_once(512 * 4096), rows_at_once(77 * 512)
    (32, 256)
    """
    return max(1, min(_ROWS, _NUMBERS // (size or _UNKNOWN)))


def encoder(encode, count: int, dtype, similarity: str, mesh: Mesh | None) -> tuple[Callable, Callable]:
    """Returns a batch's keys as a function, and the jitted step that puts them at their rows.

    Args:
      encode: (params, fields [b ...]) -> [b D].
      count: samples; rows from there on are padding.
      dtype: of the keys.
      similarity: "cosine" normalises them.
      mesh: over which rows are split.

    Returns:
      (params, fields [devices, rows, ...], row [devices, rows]) -> ((keys, scale), first bad row), and the same
      behind the keys so far, which it takes and gives, and followed by the place of each row on its device.
    """
    shards = parts_of(mesh)

    def encode_rows(params, fields, row):
        fields = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), fields)
        keys, bad = as_keys(encode(params, fields).astype(jnp.float32), row.reshape(-1), count, similarity)
        return compress(keys.reshape(shards, -1, keys.shape[-1]), dtype), bad

    def put(keys, key, place):
        """Each device's new keys at their rows; those of no row are dropped."""
        return jax.tree.map(
            lambda old, new: jax.vmap(lambda o, n, at: o.at[at].set(n, mode="drop"))(old, new, place), keys, key
        )

    if mesh is not None:  # no device needs another's rows, which XLA would not see from the places
        put = jax.shard_map(put, mesh=mesh, in_specs=queue_sharding(mesh).spec, out_specs=queue_sharding(mesh).spec)

    def step(keys, params, fields, row, place):
        key, bad = encode_rows(params, fields, row)
        return put(keys, key, place), bad

    where = None if mesh is None else (rows_sharding(mesh), whole(mesh))
    return encode_rows, jax.jit(step, donate_argnums=0, out_shardings=where)


def encode_all(encode, params, fields, count, batch, dtype, similarity, mesh, parts, lengths=None):
    """Encodes a queue's keys step by step; the arguments are those of `Queue.build`, `count` samples.

    Yields:
      After each step, and first of all after those whose rows `parts` holds: (keys and scale [devices, rows a device,
      ...] as far as they are filled, the first bad row, samples encoded since, steps done; 0 where these are no rows to
      keep: the last step also encodes some of the step before).
    """
    shards, by_row = parts_of(mesh), rows_sharding(mesh)
    longest = 0 if lengths is None else longest_of(fields)
    plan = plan_steps(count, shards, batch, lengths, longest, rows_of_each(count, mesh))
    encode_rows, step = encoder(encode, count, dtype, similarity, mesh)
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=by_row)
    keys = None
    before = 0 if parts is None else parts.open(plan, by_row)
    if parts is not None and before:
        keys = parts.restore(by_row)
        yield keys, None, min(count, plan.stop(before) * shards), 0
    for done, now in list(enumerate(plan.steps, 1))[before:]:
        place = plan.places(now)
        # A place beyond a device's rows, and a row that fills up the last device, encode some sample and keep no key.
        row = np.where(
            place < plan.held, np.arange(shards, dtype=np.int32)[:, None] * plan.held + place, shards * plan.held
        )
        take = functools.partial(_take, rows=np.minimum(row, count - 1), width=now.width, sharding=by_row)
        inputs = (jax.tree.map(take, fields), _put(row, by_row))
        if keys is None:
            made = jax.eval_shape(encode_rows, params, *inputs)[0]
            keys = jax.tree.map(lambda leaf: zeros((shards, plan.held, *leaf.shape[2:]), leaf.dtype), made)
        keys, bad = step(keys, params, *inputs, _put(place, by_row))
        more = min(count, plan.stop(done) * shards) - min(count, plan.stop(done - 1) * shards)
        yield keys, bad, more, done if done < len(plan.steps) else 0


def as_keys(vectors: jax.Array, row: jax.Array, count: int, similarity: str) -> tuple[jax.Array, jax.Array]:
    """Returns float32 vectors [b D] of these rows as keys, zero in the padding, and the first row that is no key."""
    square = jnp.sum(vectors * vectors, axis=-1)
    good = jnp.isfinite(square) & ((square > 0) | (similarity != "cosine"))
    if similarity == "cosine":
        vectors = vectors * lax.rsqrt(jnp.where(good, square, 1))[:, None]
    return jnp.where((row < count)[:, None], vectors, 0), jnp.min(jnp.where(good, count, row))


def longest_of(fields: Any) -> int:
    """Returns the slots of a row: the length of the second axis, which all fields share.

    Raises:
      ValueError: they do not.
    """
    found = {leaf.shape[1] if len(leaf.shape) > 1 else None for leaf in jax.tree.leaves(fields)}
    longest = found.pop()
    if found or longest is None:
        raise ValueError("`lengths` is for fields [N t ...] that are all of one length t")
    return longest


def _take(field: Any, rows: np.ndarray, width: int | None, sharding: Sharding) -> jax.Array:
    """The field's rows [devices, rows a device, ...], cut to `width`; a process asks for those of its own devices."""
    rest = field.shape[1:] if width is None else (width, *field.shape[2:])

    def part(index: Any) -> np.ndarray:
        found = np.asarray(field[rows[index[:2]]])
        return found if width is None else found[:, :, :width]

    return jax.make_array_from_callback((*rows.shape, *rest), sharding, part)


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def rows_sharding(mesh: Mesh | None) -> Sharding:
    """Returns how a queue's rows lie over a mesh; on the first device without one."""
    return queue_sharding(mesh) if mesh is not None else SingleDeviceSharding(jax.local_devices()[0])


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the placement of a value that every device holds."""
    return NamedSharding(mesh, PartitionSpec())

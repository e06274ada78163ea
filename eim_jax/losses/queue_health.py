"""Whether a queue's keys can be told apart: a loss that contrasts equal keys learns nothing and says nothing."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from eim_jax.losses.queue_contrast import NARROW, Contrast
from eim_jax.losses.queues import Queue
from eim_jax.parallel.sharding import parts_of

BLOCK = 4096  # rows that a device reads at a time, so that no second copy of the keys arises
EQUAL = 1e-5  # keys that differ by less than this share of their length differ by rounding alone
MANY = 0.1  # share of rows that repeat an earlier one, above which there is a warning


class EqualKeys(ValueError):
    """All keys of a queue are the same vector."""


class Health(NamedTuple):
    """What a queue's keys are like.

    Attributes:
      count: rows.
      distinct: different rows, compared by all their bits.
      all_equal: no row differs from the first by more than rounding.
      mean_cosine: the mean cosine between two different rows; NaN of a single row.
      mean_norm: the length of the unit keys' mean, 0 (all directions) to 1 (one).
      commonest: the first row that holds the most frequent key, and how many rows hold it.
    """

    count: int
    distinct: int
    all_equal: bool
    mean_cosine: float
    mean_norm: float
    commonest: tuple[int, int]


def measure(queue: Queue, mesh: Mesh | None = None) -> Health:
    """Counts a queue's distinct keys and measures how close they lie, in one pass over the rows where they lie.

    The mean cosine is that of the unit keys' mean m, |m|^2, less the N pairs of a key with itself. Rows are compared
    by 64 bits of a hash, which two of 600,000 different rows share with a probability of 1e-8.

    Args:
      queue: the keys.
      mesh: the one over which the queue was placed.

    Example:
      >>> found = measure(Queue.of(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])))
      >>> found.distinct, found.all_equal, found.commonest, round(found.mean_cosine, 3)
      (2, False, (0, 2), 0.333)
    """
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())  # each process counts all rows
    of_all = jax.jit(_of_all, static_argnames=("count", "shards"), out_shardings=everywhere)
    total, farthest, first, hashes = of_all(queue.keys, queue.scale, count=queue.count, shards=parts_of(mesh))
    rows = np.ascontiguousarray(np.asarray(hashes).reshape(-1, 2)[: queue.count]).view(np.uint64)[:, 0]
    _, starts, counts = np.unique(rows, return_index=True, return_counts=True)
    most, count = int(np.argmax(counts)), queue.count
    square = float(np.square(np.asarray(total, np.float64)).sum())
    return Health(
        count=count,
        distinct=len(counts),
        all_equal=len(counts) == 1 or float(farthest) <= (EQUAL * float(first)) ** 2,
        mean_cosine=(square - count) / (count * (count - 1)) if count > 1 else float("nan"),
        mean_norm=float(np.sqrt(square)) / count,
        commonest=(int(starts[most]), int(counts[most])),
    )


def refuse_equal(found: Health, name: str, ids: Sequence[str]) -> None:
    """Raises EqualKeys, naming the queue and what to look at, where all rows are the same key.

    Args:
      found: the queue's health.
      name: the queue's, for messages.
      ids: the samples'.
    """
    if found.all_equal and found.count > 1:
        raise EqualKeys(
            f"queue {name!r}: the keys of all {found.count:,} samples are equal ({found.distinct:,} distinct), as that "
            f"of sample {ids[0]!r}: a contrastive loss cannot tell them apart and would learn nothing. Look whether "
            "all texts (or pictures) are the same, are cut to the same beginning, or the tower's weights are empty"
        )


def report(
    queue: Queue,
    name: str,
    ids: Sequence[str],
    mesh: Mesh | None = None,
    found: Health | None = None,
    between: Contrast | None = None,
    loss: str = "the loss",
    advice: str | None = "",
) -> list[str]:
    """Returns what a log says of a queue: a line, and warnings where many rows are equal or all lie in a narrow cone.

    Args:
      queue: the keys.
      name: the queue's, for messages.
      ids: the samples'.
      mesh: the one over which the queue was placed.
      found: its health, where that is measured already.
      between: what a loss of it lies between (queue_contrast.py); None: nothing is said of that.
      loss: that loss's title.
      advice: what the warning on a narrow cone tells to do; None: no such warning.

    Raises:
      EqualKeys: as `refuse_equal`.
    """
    found = measure(queue, mesh) if found is None else found
    refuse_equal(found, name, ids)
    row, times = found.commonest
    left = ""
    if queue.center is not None:
        left = f" after centring (the mean that was taken: {float(np.linalg.norm(np.asarray(queue.center))):.3f})"
    line = f"queue {name}: {found.count:,} keys, {found.distinct:,} distinct, mean cosine between keys "
    line += f"{found.mean_cosine:.3f}, |mean key| {found.mean_norm:.3f}{left}"
    if between is not None:
        sample = "" if between.rows == found.count else f" (by {between.rows} rows)"
        line += f"; {loss} where the query is its own key {between.floor:.3f}{sample}, by chance {between.chance:.3f}"
    lines = [line]
    repeated = found.count - found.distinct
    if repeated > MANY * found.count:
        lines.append(
            f"warning: queue {name}: {repeated:,} of {found.count:,} keys repeat another sample's, that of sample "
            f"{ids[row]!r} stands {times:,} times; equal keys are each other's negatives, which no query can satisfy"
        )
    if between is not None and advice is not None and between.floor > NARROW * between.chance:
        lines.append(
            f"warning: queue {name}: where the query is its own key, {loss} is {between.floor:.3f}, "
            f"{between.floor / between.chance:.2f} of chance: the keys can hardly be told apart, and the loss may "
            f"teach to leave them rather than to find the own one{'; ' if advice else ''}{advice}"
        )
    return lines


def _of_all(
    keys: Float[Array, "N D"] | Int[Array, "N D"], scale: Float[Array, "N"] | None, *, count: int, shards: int
) -> tuple[Float[Array, "D"], Float[Array, ""], Float[Array, ""], UInt32[Array, "N 2"]]:
    """The sum of the unit keys, the greatest squared distance from the first, its length, and a hash of each row."""
    width = keys.shape[1]
    parts = keys.reshape(shards, -1, width)  # by device: blocks are cut within, so that no key moves
    scales = None if scale is None else scale.reshape(shards, -1)
    held = parts.shape[1]
    rows = min(BLOCK, held)
    factors = np.random.default_rng(0).integers(1 << 32, size=(2, width), dtype=np.uint32) | np.uint32(1)
    origin = jnp.arange(shards)[:, None] * held
    first = keys[0].astype(jnp.float32) * (1.0 if scale is None else scale[0])

    def block(state, number):
        total, farthest, hashes = state
        start = jnp.minimum(number * rows, held - rows)  # the last block overlaps the one before
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=rows, axis=1)
        codes, scaled = cut(parts), None if scales is None else cut(scales)
        within = start + jnp.arange(rows)[None]
        real = (within >= number * rows) & (origin + within < count)
        vectors = codes.astype(jnp.float32) * (1.0 if scaled is None else scaled[..., None])
        unit = vectors * jnp.where(real, lax.rsqrt(jnp.maximum((vectors**2).sum(-1), 1e-30)), 0)[..., None]
        apart = jnp.where(real, ((vectors - first[None, None]) ** 2).sum(-1), 0)
        found = _hashes(codes, scaled, factors)
        hashes = lax.dynamic_update_slice_in_dim(hashes, found, start, axis=1)
        return (total + unit.sum(1), jnp.maximum(farthest, apart.max(1)), hashes), None

    empty = (jnp.zeros((shards, width)), jnp.zeros(shards), jnp.zeros((shards, held, 2), jnp.uint32))
    (total, farthest, hashes), _ = lax.scan(block, empty, jnp.arange(-(-held // rows)))
    return total.sum(0), farthest.max(), jnp.linalg.norm(first), hashes.reshape(-1, 2)


def _hashes(codes: Array, scale: Array | None, factors: np.ndarray) -> UInt32[Array, "*rows 2"]:
    """Two numbers of 32 bits from all bits of each row: sums of its mixed entries with odd factors of their own."""
    bits = jnp.dtype(codes.dtype).itemsize * 8
    if jnp.issubdtype(codes.dtype, jnp.floating):
        codes = codes + jnp.zeros((), codes.dtype)  # -0 is 0
    raw = lax.bitcast_convert_type(codes, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    mixed = raw * np.uint32(0x9E3779B1)
    mixed = mixed ^ (mixed >> 15)
    found = jnp.stack([(mixed * jnp.asarray(row)[None, None]).sum(-1, dtype=jnp.uint32) for row in factors], axis=-1)
    if scale is None:
        return found
    return found + (lax.bitcast_convert_type(scale, jnp.uint32) * np.uint32(0x85EBCA6B))[..., None]

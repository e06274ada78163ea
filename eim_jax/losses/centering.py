"""A queue's mean, taken from its keys and from the queries that meet them: for keys that lie in a narrow cone.

Features of a language model, and less so of CLIP, share one large direction. Between unit keys whose mean m is nearly
as long as they are, all cosines are near 1, and no query can tell them apart at tau 0.07. With x_j the samples'
features, N of them, and u(x) = x / |x|, center="mean" is

    cosine:  m = 1/N sum_j u(x_j),   k_j = u(u(x_j) - m),   s(q, k_j) = u(u(q) - m) . k_j
    dot:     m = 1/N sum_j x_j,      k_j = x_j - m,         s(q, k_j) = (q - m) . k_j

The mean is that of unit keys, so that a query's length means as little as it does without centring: the towers that
give queries and keys differ in scale. Keys are rounded to the queue's dtype after the subtraction: of keys rounded
before it, little more than the rounding would be left.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from eim_jax.losses.queue_build import compress, rows_sharding, whole
from eim_jax.parallel.sharding import parts_of

Center = Literal["none", "mean"]

BLOCK = 1024  # rows that are summed in float32, pairwise: ten additions deep; blocks are added in float64
NOTHING = 1e-6  # what is left of a unit key that differs from the mean by rounding alone is shorter than this


def check_center(center: str) -> None:
    """Raises ValueError for another word than those of `Center`."""
    if center not in get_args(Center):
        raise ValueError(f"center={center!r} is none of {', '.join(get_args(Center))}")


def centred(
    keys: Float[Array, "N D"], count: int, dtype: Any, similarity: str, mesh: Mesh | None
) -> tuple[tuple[Array, Array | None], Float[Array, "D"], Int[Array, ""]]:
    """Takes the mean of a queue's keys from each of them.

    Args:
      keys: [N D] float32, of unit norm under the cosine, zero in the padding; not to be used after (donated).
      count: real rows.
      dtype: in which the result is held.
      similarity: "cosine" brings what is left of a key to length 1, "dot" leaves it.
      mesh: the one over which the rows are split.

    Returns:
      (keys and scale as `compress` gives them, the mean [D] float32 on every device, the first row of which nothing is
      left, `count` where there is none).
    """
    everywhere = None if mesh is None else whole(mesh)
    sums = jax.jit(_block_sums, static_argnums=1, out_shardings=everywhere)(keys, parts_of(mesh))
    mean = (np.asarray(sums, np.float64).sum((0, 1)) / count).astype(np.float32)
    center = jax.make_array_from_callback(mean.shape, everywhere or rows_sharding(None), lambda index: mean[index])

    def finish(keys, center):
        row = jnp.arange(keys.shape[0])
        left = keys - center[None]
        if similarity == "cosine":
            square = jnp.sum(left * left, axis=1)
            good = square > NOTHING**2
            left = left * lax.rsqrt(jnp.where(good, square, 1))[:, None]
        else:
            good = jnp.ones(keys.shape[0], bool)
        bad = jnp.min(jnp.where(good | (row >= count), count, row))
        return compress(jnp.where((row < count)[:, None], left, 0), dtype), bad

    where = None if mesh is None else (rows_sharding(mesh), everywhere)
    reused = () if jnp.dtype(dtype) != keys.dtype else (0,)  # a buffer serves keys of its own size alone
    held, bad = jax.jit(finish, donate_argnums=reused, out_shardings=where)(keys, center)
    return held, center, bad


def _block_sums(keys: Float[Array, "N D"], shards: int) -> Float[Array, "blocks shards D"]:
    """Sums of BLOCK rows of a device each; no key moves."""
    parts = keys.reshape(shards, -1, keys.shape[1])
    held = parts.shape[1]

    def one(number):
        row = number * BLOCK + jnp.arange(BLOCK)
        rows = jnp.where((row < held)[None, :, None], jnp.take(parts, row, axis=1, mode="clip"), 0)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        return rows[:, 0]

    return lax.map(one, jnp.arange(-(-held // BLOCK)))

"""One pass over a queue's keys: each query's loss, its whole gradient, and the own key's rank (see contrastive.py).

Softmax over N scores normally needs the scores twice: once for their maximum, once for the sum. An online softmax reads
them once, a chunk at a time: it keeps the best score so far and rescales what it has summed whenever a better one
appears. The [b, N] scores never exist as a whole, neither here nor for the backward pass.
"""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eim_jax.parallel.sharding import ROWS

Positives = Literal["self", "group", "mask", "others", "alone"]

MASKED = -1e30  # finite: exp(MASKED - MASKED) stays a number, exp(MASKED - any real score) is 0
TIE = 1e-6  # scores closer than this fraction of |u||k_y| tie: twice the rounding of an f32 dot product


SCORE_BYTES = 256 << 20  # of a chunk's scores on a GPU


def keys_at_a_time(platform: str, queries: int, read: int, dtype: DTypeLike, *, all_of_them: bool = True) -> int:
    """Returns how many of the `read` keys on a device a step of the pass takes, where no number is asked for.

    On a GPU a chunk is copied out of the queue before cuBLAS reads it, twice; keys that are all one chunk are read in
    place (tests/test_plan_gpu.py). So there it is as many as let their scores fill SCORE_BYTES. But int8 codes are
    widened, chosen keys gathered, and a number that is no multiple of 8 filled up: copies, which a chunk keeps small.

    >>> [keys_at_a_time(platform, 40, 566_752, jnp.bfloat16) for platform in ("cpu", "tpu", "gpu")]
    [1024, 32768, 566752]
    """
    if platform != "gpu" or dtype == jnp.int8 or not all_of_them or read % 8:
        return min(1024 if platform == "cpu" else 32768, read)
    bytes_a_key = 4 * queries * (1 if dtype == jnp.float32 else 2)  # of scores, which _products makes in two halves
    most = max(32768, SCORE_BYTES // bytes_a_key)
    least = -(-read // -(-read // most))  # chunks of one length: next to none is read again at the end
    return least + -least % 8


class Pass(NamedTuple):
    """What is fixed when the pass is compiled: the queue's real rows, keys read at a time, the positives, the mesh.

    `apart`: of the rows `among` which negatives are, each device is given its own.
    """

    count: int
    chunk: int
    positives: Positives
    mesh: Mesh | None
    on_cpu: bool
    apart: bool = False


class _Softmax(NamedTuple):
    """Running attention over the keys seen so far, relative to the best score `top` (online softmax)."""

    top: Float[Array, "b"]
    total: Float[Array, "b"]  # sum exp(s - top)
    mean: Float[Array, "b D"]  # sum exp(s - top) k
    square: Float[Array, "b"]  # sum exp(s - top)^2

    def add(self, scores, weigh) -> "_Softmax":
        """With a chunk's scores [b c]; weigh(e) sums the chunk's keys, each times its e."""
        top = jnp.maximum(self.top, jnp.max(scores, axis=1))
        e, old = jnp.exp(scores - top[:, None]), jnp.exp(self.top - top)
        return _Softmax(
            top,
            self.total * old + jnp.sum(e, axis=1),
            self.mean * old[:, None] + weigh(e),
            self.square * old * old + jnp.sum(e * e, axis=1),
        )

    def merge(self, axes) -> "_Softmax":
        """Of all devices along the mesh axes, each of which has seen its own keys."""
        top = lax.pmax(self.top, axes)
        scale = jnp.exp(self.top - top)
        parts = (self.total * scale, self.mean * scale[:, None], self.square * scale * scale)
        return _Softmax(top, *lax.psum(parts, axes))


class _Own(NamedTuple):
    """Each query's own key, on every device though one holds it."""

    key: Float[Array, "b D"]
    group: Array | None  # [b]
    score: Float[Array, "b"]
    tie: Float[Array, "b"]  # a key that scores this much ranks before the own key


def one_pass(how: Pass, u, keys, index, groups, scale, among=None):
    """Reads every key once; under shard_map, every key that this device holds, and the results are the same on all.

    Args:
      how: see Pass.
      u: [b D], the queries divided by tau.
      keys: [N D], of this device: float32, bfloat16 or int8 codes.
      index: [b], the own key's row in the whole queue.
      groups: [N] or None.
      scale: [N] of int8 codes, else None.
      among: [m] rows of the whole queue that are read in place of all, the own one aside, which is always read, once;
        those that another device holds, or -1, are passed over. None: all rows.

    Returns:
      loss [b], dloss/du [b D], rank of the own key [b], its score u.k_y [b], and 1 / sum_j p_j^2 [b].
    """
    (b, width), held = u.shape, keys.shape[0]
    span = held if among is None else among.shape[0]
    axes = ROWS if how.mesh is not None else ()
    first = lax.axis_index(axes) * held if axes else 0  # this device's first key in the whole queue
    u, score_of, weighted_sum = _products(u, keys.dtype, how.on_cpu)
    own = _own_keys(u, keys, index, groups, scale, first, axes)

    # XLA's CPU compiler has no bf16: it would widen all keys to a float32 copy ahead of the loop. Stored as integers,
    # they can only be widened inside the loop, a chunk at a time.
    integers = how.on_cpu and keys.dtype == jnp.bfloat16
    stored = lax.bitcast_convert_type(keys, jnp.uint16) if integers else keys

    def step(i, carry):
        softmax, positive, rank = carry
        # A slice cannot be shorter at the end: the last one starts early, and `fresh` leaves out its keys already seen.
        start = jnp.minimum(i * how.chunk, span - how.chunk)
        slot = start + jnp.arange(how.chunk)
        if among is None:
            place, at = first + slot, None
            fresh = ((slot >= i * how.chunk) & (place < how.count))[None, :]
        else:
            place = lax.dynamic_slice_in_dim(among, start, how.chunk)
            mine, at = _place(place, first, held)
            fresh = ((slot >= i * how.chunk) & mine)[None, :] & (place[None, :] != index[:, None])

        def cut(array):
            return lax.dynamic_slice_in_dim(array, start, how.chunk) if at is None else array[at]

        block = cut(stored)
        block = lax.bitcast_convert_type(block, keys.dtype) if stored is not keys else block
        by = None if scale is None else cut(scale)[None]
        scores = score_of(block) if by is None else score_of(block) * by
        scores = jnp.where(fresh, scores, MASKED)

        def weigh(e):
            return weighted_sum(e if by is None else e * by, block)

        rivals = scores >= own.tie[:, None]
        if groups is not None and own.group is not None:
            same = (cut(groups)[None, :] == own.group[:, None]) & fresh
            sibling = same & (place[None, :] != index[:, None])
            rivals &= ~sibling
            if how.positives == "mask":
                scores = jnp.where(sibling, MASKED, scores)
            else:  # a second softmax, over the positives alone; most chunks hold none and skip it
                if how.positives == "others":
                    scores, same = jnp.where(same & ~sibling, MASKED, scores), sibling
                inside = jnp.where(same, scores, MASKED)
                positive = lax.cond(jnp.any(same), lambda p: p.add(inside, weigh), lambda p: p, positive)
        softmax = softmax.add(scores, weigh)
        return softmax, positive, rank + jnp.sum(rivals, axis=1, dtype=jnp.int32)

    empty = _Softmax(jnp.full(b, MASKED), jnp.zeros(b), jnp.zeros((b, width)), jnp.zeros(b))
    start = (empty, empty if how.positives in ("group", "others") else None, jnp.zeros(b, jnp.int32))
    start = lax.pcast(start, axes, to="varying") if axes else start
    softmax, positive, rank = lax.fori_loop(0, -(-span // how.chunk), step, start)
    if axes:
        softmax, rank = softmax.merge(axes), lax.psum(rank, axes)
        positive = positive.merge(axes) if positive is not None else None
    if how.positives == "others" and positive is not None:
        softmax, positive = _with_own(own, softmax, positive, only=positive.top <= MASKED)
    elif among is not None:
        softmax, positive = _with_own(own, softmax, positive)
    rank = rank if among is None else rank + 1
    loss, gradient = _loss_and_gradient(how, u, own, softmax, positive)
    effective = softmax.total * softmax.total / softmax.square
    return jnp.maximum(loss, 0), gradient, rank.astype(jnp.float32), own.score, effective


def _place(index, first, held: int):
    """Whether this device holds each row of the whole queue, and where."""
    return (index >= first) & (index < first + held), jnp.clip(index - first, 0, held - 1)


def keys_at(keys, scale, index, first, axes) -> Float[Array, "b D"]:
    """The keys in these rows of the whole queue, in float32; the devices that do not hold one add zeros."""
    mine, place = _place(index, first, keys.shape[0])
    key = keys[place].astype(jnp.float32) * (1 if scale is None else scale[place][:, None])
    key = jnp.where(mine[:, None], key, 0)
    return lax.psum(key, axes) if axes else key


def _own_keys(u, keys, index, groups, scale, first, axes) -> _Own:
    """Looks each query's own key up; the devices that do not hold it add zeros."""
    mine, place = _place(index, first, keys.shape[0])
    key = keys_at(keys, scale, index, first, axes)
    group = jnp.where(mine, groups[place], 0) if groups is not None else None
    group = lax.psum(group, axes) if axes and group is not None else group
    score = jnp.sum(u * key, axis=1)
    tie = score - TIE * jnp.sqrt(jnp.sum(u * u, axis=1) * jnp.sum(key * key, axis=1))
    return _Own(key, group, score, tie)


def _with_own(
    own: _Own, softmax: _Softmax, positive: _Softmax | None, only: Array | None = None
) -> tuple[_Softmax, _Softmax | None]:
    """Adds the own key to what queries are contrasted with, and to their positives.

    To all queries, or to some: those without a sibling, whose loss would be the distance to nothing.
    """
    score = (own.score if only is None else jnp.where(only, own.score, MASKED))[:, None]  # MASKED adds nothing

    def weigh(e):
        return e * own.key

    return softmax.add(score, weigh), None if positive is None else positive.add(score, weigh)


def _loss_and_gradient(how: Pass, u, own: _Own, softmax: _Softmax, positive: _Softmax | None):
    """Log sum_j exp(u.k_j) less the positives' own log sum, and the difference of the two softmaxes' mean keys."""
    loss = softmax.top + jnp.log(softmax.total)
    gradient = softmax.mean / softmax.total[:, None]
    if how.positives == "alone":
        loss, gradient = jnp.sqrt(jnp.sum(u * u, axis=1) * jnp.sum(own.key * own.key, axis=1)) - own.score, -own.key
    elif positive is not None:
        loss, gradient = (
            loss - positive.top - jnp.log(positive.total),
            gradient - positive.mean / positive.total[:, None],
        )
    else:
        loss, gradient = loss - own.score, gradient - own.key
    return loss, gradient


def _products(u, dtype, on_cpu: bool):
    """Returns u as used, scores(block) -> [b c], weighted_sum(e [b c], block) -> [b D], fastest for the dtype."""
    if dtype == jnp.float32 or on_cpu:
        dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
        return (
            u,
            lambda block: dot("bd,cd->bc", u, block.astype(jnp.float32)),
            lambda e, block: dot("bc,cd->bd", e, block.astype(jnp.float32)),
        )

    # Matrix units multiply bf16 by bf16. Two bf16 halves hold an f32 to 2^-17; the pass is bound by reading the keys,
    # so the second half is free up to b ~ 46 on an H200. int8 codes are exact in bf16.
    def halves(x):
        high = x.astype(jnp.bfloat16)
        return jnp.stack([high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)])

    pair = halves(u)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return (
        jnp.sum(pair.astype(jnp.float32), axis=0),
        lambda block: jnp.sum(dot("hbd,cd->hbc", pair, block.astype(jnp.bfloat16)), axis=0),
        lambda e, block: jnp.sum(dot("hbc,cd->hbd", halves(e), block.astype(jnp.bfloat16)), axis=0),
    )

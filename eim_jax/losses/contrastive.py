"""The contrastive loss against a whole-data-set queue (EIM, equations of loss_IE, loss_ST, loss_LM).

For one row with scaled query u = q/tau and fixed keys k_1..k_N of which k_y is its own,

    loss    = log sum_j exp(u.k_j) - u.k_y
    dloss/du = sum_j p_j k_j - k_y,   p = softmax(u.K)

`sum_j p_j k_j` is attention whose values are the keys, so one online-softmax pass over K yields the loss and the whole
gradient: K is read once, the residual for the backward pass is [b, D], and nothing is recomputed. Keys get no gradient.
"""

import functools
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from eim_jax.parallel.sharding import ROWS, parts_of

MASKED = -1e30  # finite: exp(MASKED - MASKED) stays a number, exp(MASKED - any real score) is 0
UNIT = {"float32": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}  # how far from 1 a unit key's length may be, held so
TIE = 1e-6  # scores closer than this fraction of |u||k_y| tie: twice the rounding of an f32 dot product

Positives = Literal["self", "group", "mask", "alone"]
Similarity = Literal["cosine", "dot"]


class NCE(NamedTuple):
    """Sums over a batch's rows, each times the row's weight: they add over micro-batches; divide them by `weight`.

    loss: nats, the only field with a gradient. rank: of the own key, 1 is best, ties count against it; its siblings do
    not compete unless positives="self". recall1: rank is 1. similarity: with the own key, before division by tau.
    effective: 1 / sum p^2, the number of keys that the softmax in effect looks at, 1..N.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    recall1: Float[Array, ""]
    rank: Float[Array, ""]
    similarity: Float[Array, ""]
    effective: Float[Array, ""]


def queue_nce(
    query: Float[Array, "b D"],
    keys: Float[Array, "N D"] | Int[Array, "N D"],
    index: Int[Array, "b"],
    *,
    count: int,
    tau: float | Float[Array, ""] = 0.07,
    similarity: Similarity = "cosine",
    weights: Float[Array, "b"] | None = None,
    positives: Positives = "self",
    groups: Int[Array, "N"] | None = None,
    scale: Float[Array, "N"] | None = None,
    chunk: int = 0,
    mesh: Mesh | None = None,
) -> NCE:
    """Contrasts each query with all `count` keys of a queue, exactly, in one pass (EIM: loss_IE, loss_ST, loss_LM).

    The loss of a query is -log(exp(s(q, k_own) / tau) / sum_j exp(s(q, k_j) / tau)), j over the queue.

    Args:
      query: [b D]; the only argument that gets a gradient. Normalised here when similarity="cosine".
      keys: [N D] float32 (best on CPU, where bfloat16 costs a copy) or bfloat16 (best elsewhere), or int8 codes; of
        unit norm when similarity="cosine". Rows from `count` on are padding and must be finite.
      index: [b], each query's own row, 0 <= index < count.
      count: real rows of the queue.
      tau: the temperature.
      similarity: "cosine" or "dot".
      weights: [b], of each query's loss; a query of weight 0 gives no loss and no gradient, whatever it holds.
      positives: "self", the own key (the paper); "group", every key of the own key's group, loss = -log sum_{j in
        group} p_j; "mask", as "self", but the rest of its group leaves the denominator; "alone", no other key at all
        (self-distillation, cosine only), loss = (1 - cos) / tau.
      groups: [N], for "group" and "mask": keys of one group share a number.
      scale: [N], of int8 codes: scale[j] * keys[j] is the key.
      chunk: keys read at a time; 0: 1024 on CPU, 32768 elsewhere.
      mesh: the rows of `keys`, `groups` and `scale` lie over its ("data", "fsdp") axes; each device passes over its own
        rows, and only [b] and [b D] move.

    Returns:
      Sums over the batch, see NCE: `found.loss / found.weight` is the mean loss in nats.

    Raises:
      ValueError: a count outside 1..N, groups missing where `positives` needs them, rows that the mesh does not divide;
        and, where the values are at hand (outside jit), an index outside the queue or a key that is not of unit norm
        under the cosine. Inside jit neither can be seen: an index outside the queue gets a key of zeros, and keys of
        another norm act like another temperature for each key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> keys = jnp.eye(4)
      >>> found, gradient = jax.value_and_grad(
      ...     lambda query: queue_nce(query, keys, jnp.array([0, 1]), count=4, tau=1.0).loss)(keys[:2] + 1)
      >>> print(f"{found:.4f}", gradient.shape)
      2.2341 (2, 4)
    """
    batch = query.shape[0]
    shards = parts_of(mesh)
    if not 0 < count <= keys.shape[0]:
        raise ValueError(f"count={count}, but the queue holds {keys.shape[0]} rows (count is at least 1)")
    if keys.shape[0] % shards:
        raise ValueError(f"{keys.shape[0]} key rows do not divide over {shards} devices: pad them with zero rows")
    if (keys.dtype == jnp.int8) != (scale is not None):
        raise ValueError(f"keys of {keys.dtype} with scale={'None' if scale is None else 'given'}: int8 alone has one")
    if positives == "alone" and similarity != "cosine":
        raise ValueError('positives="alone" needs similarity="cosine": a dot product with one key has no least loss')
    grouped = positives in ("group", "mask")
    if grouped and groups is None:
        raise ValueError(f'positives="{positives}" needs one group id a key (groups=)')
    _check_values(keys, index, count, similarity, scale)
    on_cpu = (mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()) == "cpu"
    rows = min(chunk or (1024 if on_cpu else 32768), keys.shape[0] // shards)

    weights = jnp.ones(batch) if weights is None else weights.astype(jnp.float32)
    counted = weights != 0
    q = jnp.where(counted[:, None], query, 0).astype(jnp.float32)  # also stops the gradient of uncounted rows
    q = _unit(q) if similarity == "cosine" else q
    how = _How(count, rows, positives, mesh, on_cpu)
    groups = groups if grouped else None
    loss, (rank, score, effective) = cast(Any, _rowwise(how, q / tau, keys, index, groups, scale))

    def total(x):
        return jnp.sum(jnp.where(counted, weights * x, 0))

    aux = (total(rank == 1), total(rank), total(score * tau), total(effective))
    return NCE(total(loss), jnp.sum(weights), *lax.stop_gradient(aux))


def _check_values(keys, index, count: int, similarity: str, scale) -> None:
    """Raises ValueError for an index outside the queue or, under the cosine, a key that is not of unit norm.

    Only arrays whose values are at hand are looked at: not those that jit traces, nor other processes' rows.
    """

    def at_hand(array) -> bool:
        if isinstance(array, Tracer):
            return False
        return not isinstance(array, jax.Array) or array.is_fully_addressable

    if at_hand(index):
        outside = [int(row) for row in np.asarray(index) if not 0 <= row < count]
        if outside:
            raise ValueError(f"index {outside[0]} is outside the queue, whose rows are 0 to {count - 1}")
    if similarity == "cosine" and at_hand(keys) and (scale is None or at_hand(scale)):
        with jax.ensure_compile_time_eval():  # constants of a function that jit traces can be looked at too
            length = np.asarray(_lengths(keys, scale))[:count]
        row = int(np.argmax(np.abs(length - 1)))
        if not abs(length[row] - 1) < UNIT[keys.dtype.name]:
            raise ValueError(
                f"the key in row {row} has length {length[row]:.4g}: under the cosine keys are of length 1. "
                'Queue.of(features) normalises them; similarity="dot" takes them as they are'
            )


@jax.jit
def _lengths(keys, scale):
    length = jnp.linalg.norm(keys.astype(jnp.float32), axis=1)
    return length if scale is None else length * scale


def _unit(x: Float[Array, "b D"]) -> Float[Array, "b D"]:
    """Rows of length 1; a zero row stays zero, with a zero gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, x * lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


class _How(NamedTuple):
    count: int
    chunk: int
    positives: Positives
    mesh: Mesh | None
    on_cpu: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rowwise(how, u, keys, index, groups, scale):
    return _forward(how, u, keys, index, groups, scale)[0]


def _forward(how, u, keys, index, groups, scale):
    one_pass = functools.partial(_one_pass, how)
    if how.mesh is not None:
        held, whole = PartitionSpec(ROWS), PartitionSpec()
        specs = (whole, held, whole, held, held)
        one_pass = jax.shard_map(one_pass, mesh=how.mesh, in_specs=specs, out_specs=whole)
    loss, gradient, *diagnostics = one_pass(u, keys, index, groups, scale)
    return (loss, tuple(diagnostics)), gradient


def _backward(how, gradient, cotangents):
    return cotangents[0][:, None] * gradient, None, None, None, None


_rowwise.defvjp(_forward, _backward)


class _Softmax(NamedTuple):
    """Running attention over the keys seen so far, relative to the best score `top` (online softmax)."""

    top: Float[Array, "b"]
    total: Float[Array, "b"]  # sum exp(s - top)
    mean: Float[Array, "b D"]  # sum exp(s - top) k
    square: Float[Array, "b"]  # sum exp(s - top)^2

    def add(self, scores, weigh) -> "_Softmax":
        top = jnp.maximum(self.top, jnp.max(scores, axis=1))
        e, old = jnp.exp(scores - top[:, None]), jnp.exp(self.top - top)
        return _Softmax(
            top,
            self.total * old + jnp.sum(e, axis=1),
            self.mean * old[:, None] + weigh(e),
            self.square * old * old + jnp.sum(e * e, axis=1),
        )

    def merge(self, axes) -> "_Softmax":
        top = lax.pmax(self.top, axes)
        scale = jnp.exp(self.top - top)
        parts = (self.total * scale, self.mean * scale[:, None], self.square * scale * scale)
        return _Softmax(top, *lax.psum(parts, axes))


def _one_pass(how: _How, u, keys, index, groups, scale):
    """Returns loss [b], dloss/du [b D], rank [b], own score [b], 1 / sum p^2 [b]; with a mesh, on every device."""
    (b, width), held = u.shape, keys.shape[0]
    axes = ROWS if how.mesh is not None else ()
    first = lax.axis_index(axes) * held if axes else 0
    u, score_of, weighted_sum = _products(u, keys.dtype, how.on_cpu)

    # The own key (and its group), held by one device.
    mine = (index >= first) & (index < first + held)
    place = jnp.clip(index - first, 0, held - 1)
    own = keys[place].astype(jnp.float32) * (1 if scale is None else scale[place][:, None])
    own = jnp.where(mine[:, None], own, 0)
    group = jnp.where(mine, groups[place], 0) if groups is not None else None
    own, group = lax.psum((own, group), axes) if axes else (own, group)
    score = jnp.sum(u * own, axis=1)
    tie = score - TIE * jnp.sqrt(jnp.sum(u * u, axis=1) * jnp.sum(own * own, axis=1))

    # XLA's CPU compiler has no bf16 and would widen all keys before the loop, to a float32 copy. As integers they are
    # widened a chunk at a time, though still copied once.
    integers = how.on_cpu and keys.dtype == jnp.bfloat16
    stored = lax.bitcast_convert_type(keys, jnp.uint16) if integers else keys

    def step(i, carry):
        softmax, positive, rank = carry
        start = jnp.minimum(i * how.chunk, held - how.chunk)  # the last chunk overlaps the one before
        block = lax.dynamic_slice_in_dim(stored, start, how.chunk)
        block = lax.bitcast_convert_type(block, keys.dtype) if stored is not keys else block
        place = start + jnp.arange(how.chunk)
        fresh = ((place >= i * how.chunk) & (first + place < how.count))[None, :]
        by = None if scale is None else lax.dynamic_slice_in_dim(scale, start, how.chunk)[None]
        scores = score_of(block) if by is None else score_of(block) * by
        scores = jnp.where(fresh, scores, MASKED)

        def weigh(e):
            return weighted_sum(e if by is None else e * by, block)

        rivals = scores >= tie[:, None]
        if groups is not None and group is not None:
            same = (lax.dynamic_slice_in_dim(groups, start, how.chunk)[None, :] == group[:, None]) & fresh
            sibling = same & ((first + place)[None, :] != index[:, None])
            rivals &= ~sibling
            if how.positives == "mask":
                scores = jnp.where(sibling, MASKED, scores)
            else:  # few chunks hold a positive at all
                inside = jnp.where(same, scores, MASKED)
                positive = lax.cond(jnp.any(same), lambda p: p.add(inside, weigh), lambda p: p, positive)
        softmax = softmax.add(scores, weigh)
        return softmax, positive, rank + jnp.sum(rivals, axis=1, dtype=jnp.int32)

    empty = _Softmax(jnp.full(b, MASKED), jnp.zeros(b), jnp.zeros((b, width)), jnp.zeros(b))
    start = (empty, empty if how.positives == "group" else None, jnp.zeros(b, jnp.int32))
    start = lax.pcast(start, axes, to="varying") if axes else start
    softmax, positive, rank = lax.fori_loop(0, -(-held // how.chunk), step, start)
    if axes:
        softmax, rank = softmax.merge(axes), lax.psum(rank, axes)
        positive = positive.merge(axes) if positive is not None else None

    loss = softmax.top + jnp.log(softmax.total)
    gradient = softmax.mean / softmax.total[:, None]
    if how.positives == "alone":
        loss, gradient = jnp.sqrt(jnp.sum(u * u, axis=1) * jnp.sum(own * own, axis=1)) - score, -own
    elif positive is not None:
        loss, gradient = (
            loss - positive.top - jnp.log(positive.total),
            gradient - positive.mean / positive.total[:, None],
        )
    else:
        loss, gradient = loss - score, gradient - own
    effective = softmax.total * softmax.total / softmax.square
    return jnp.maximum(loss, 0), gradient, rank.astype(jnp.float32), score, effective


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

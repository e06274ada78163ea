"""loss_base from hidden states: next-token cross-entropy whose float32 logits exist a chunk of positions at a time.

For a supervised position with hidden state h, the head's rows W_1..W_V and the token y that follows,

    loss = log sum_v exp(h.W_v) - h.W_y,   dloss/dh = sum_v g_v W_v,   dloss/dW_v = g_v h,   g_v = p_v - [v = y]

Where logits are capped (Gemma 2), z_v = cap tanh(h.W_v / cap) stands for h.W_v, and g_v has the factor
1 - (z_v / cap)^2.

The result is a sum over positions, so its gradient is known, up to one factor, where the logits are: one sweep yields
both, computes the logits once and keeps none of them (the idea of Liger Kernel's fused linear cross-entropy). The sweep
visits the supervised positions only: prompts and padding cost nothing once they fill a chunk.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.products import sum_over_rows
from eim_jax.models.soft_cap import soft_cap
from eim_jax.parallel.sharding import ROWS, parts_of

P = PartitionSpec
CHUNK_BYTES = {"cpu": 64 << 20, "other": 256 << 20}  # of a chunk's float32 logits on one device
OUTSIDE = -1e30  # the score of a padded vocabulary entry; finite, exp(OUTSIDE - any real score) is 0


def head_xent(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "_ _"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"] | Float[Array, "b t"],
    *,
    vocab_axis: int = 0,
    chunk: int = 0,
    cap: float = 0.0,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Next-token cross-entropy of the logits `hidden` x `head`, in nats, and the number of supervised positions.

    `head` is [V d] (vocab_axis 0, a tied embedding) or [d V] (1); it is cast to hidden's dtype, products add up in f32,
    and its gradient is f32 at once. What is not differentiated costs nothing: a frozen head gets no gradient of its
    size. Positions outside `mask` give no loss and no gradient, even where `hidden` is not finite there. A `mask` of
    floats weighs each position, and then the weights' sum is returned in place of a number.

    `chunk` positions have their logits at a time (0: what fits into CHUNK_BYTES); `cap` bounds them (0: nothing does).
    With `mesh`, the rows of `hidden` lie over ("data", "fsdp") and the vocabulary over "tensor" (padded here where it
    does not divide): the head is gathered over "fsdp" once, its gradient is summed over devices once, after the last
    chunk.

    Raises ValueError for a head of another width, or rows that the mesh does not divide.
    """
    (b, t, width), vocab = hidden.shape, head.shape[vocab_axis]
    if head.shape[1 - vocab_axis] != width:
        raise ValueError(f"a head of shape {head.shape} with the vocabulary on axis {vocab_axis} is not {width} wide")
    shards, parts = parts_of(mesh), parts_of(mesh, ("tensor",))
    if b % shards:
        raise ValueError(f"{b} rows do not divide over {shards} devices")
    columns = -(-vocab // parts)
    on_cpu = (mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()) == "cpu"
    limit = chunk or max(1, CHUNK_BYTES["cpu" if on_cpu else "other"] // (4 * columns))
    rows = b // shards * t
    number = max(1, -(-rows // limit))
    padding = [(0, 0), (0, 0)]
    padding[vocab_axis] = (0, columns * parts - vocab)
    head = jnp.pad(head, padding) if columns * parts > vocab else head
    targets, mask = jnp.asarray(targets), jnp.asarray(mask)
    total = cast(Any, _total(_How(vocab, vocab_axis, number, mesh, cap), hidden, head, targets, mask))
    return total, jnp.sum(mask, dtype=jnp.float32)


class _How(NamedTuple):
    vocab: int
    axis: int  # of the head, that counts the vocabulary
    number: int  # chunks
    mesh: Mesh | None
    cap: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(how, hidden, head, targets, mask):
    return _run(how, (False, False), hidden, head, targets, mask)[0]


def _forward(how, *arguments):
    total, *slopes = _run(how, tuple(a.perturbed for a in arguments[:2]), *(a.value for a in arguments))
    return total, slopes


def _backward(how, slopes, factor):
    slopes = [None if s is None else (factor * s.astype(jnp.float32)).astype(s.dtype) for s in slopes]
    return *slopes, None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(how: _How, wanted: tuple[bool, bool], hidden, head, targets, mask):
    """The sum, and its gradients towards `hidden` and `head` as far as `wanted` (else None)."""
    if how.mesh is None:
        return _sweep(how, wanted, None, hidden, head, targets, mask)
    split = "fsdp" if hidden.shape[2] % how.mesh.shape["fsdp"] == 0 else None
    spec = P("tensor", split) if how.axis == 0 else P(split, "tensor")
    sweep = functools.partial(_sweep, how, wanted, split)
    outputs = (P(), P(ROWS) if wanted[0] else None, spec if wanted[1] else None)
    sweep = jax.shard_map(sweep, mesh=how.mesh, in_specs=(P(ROWS), spec, P(ROWS), P(ROWS)), out_specs=outputs)
    return sweep(hidden, head, targets, mask)


def _sweep(how: _How, wanted: tuple[bool, bool], split: str | None, hidden, head, targets, mask):
    """One device's part: its rows of `hidden`, its columns of the vocabulary; see _run."""
    (b, t, width), dtype, axis = hidden.shape, hidden.dtype, how.axis
    rows, columns, weighted = b * t, head.shape[axis], mask.dtype != jnp.bool_
    chunk = -(-rows // how.number)
    sharded = how.mesh is not None
    kernel = head.astype(dtype)
    if split:
        kernel = lax.all_gather(kernel, split, axis=1 - axis, tiled=True)
    column = jnp.arange(columns)[None] + (lax.axis_index("tensor") * columns if sharded else 0)
    hidden, targets, mask = hidden.reshape(rows, width), targets.reshape(rows), mask.reshape(rows)
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)

    # Supervised positions are moved to the front, so that the loop can end where they do.
    counted = mask > 0 if weighted else mask
    order = jnp.argsort(~counted, stable=True).astype(jnp.int32)
    padded = jnp.pad(order, (0, how.number * chunk - rows))
    supervised = jnp.sum(counted, dtype=jnp.int32)

    def step(i, carry):
        total, to_hidden, to_head = carry
        place = lax.dynamic_slice_in_dim(padded, i * chunk, chunk)
        live = (i * chunk + jnp.arange(chunk) < supervised)[:, None]
        h = jnp.where(live, hidden[place], 0)
        logits = soft_cap(dot(h, kernel, (((1,), (1 - axis,)), ((), ()))), how.cap)
        logits = jnp.where(column < how.vocab, logits, OUTSIDE)
        loss, slope = _loss_and_slope(logits, targets[place][:, None] == column, sharded)
        if how.cap:
            slope *= jnp.where(column < how.vocab, 1 - (logits / how.cap) ** 2, 0)
        if weighted:
            weight = mask[place][:, None]
            loss, slope = loss * weight, slope * weight
        total += jnp.sum(jnp.where(live, loss, 0))
        slope = jnp.where(live, slope, 0).astype(dtype)
        if wanted[0]:
            part = dot(slope, kernel, (((1,), (axis,)), ((), ()))).astype(to_hidden.dtype)
            to_hidden = lax.dynamic_update_slice_in_dim(to_hidden, part, i * chunk, axis=0)
        if wanted[1]:
            pair = (slope, h) if axis == 0 else (h, slope)
            to_head += sum_over_rows(*pair, 1, jnp.float32)
        return total, to_hidden, to_head

    carry = _empty(how, wanted, dtype, (len(padded), width), kernel.shape)
    if how.number == 1:
        total, to_hidden, to_head = step(0, carry)
    else:
        total, to_hidden, to_head = lax.fori_loop(0, -(-supervised // chunk), step, carry)

    if wanted[0]:  # summed over the vocabulary's parts, and every position back in its place
        to_hidden = lax.psum(to_hidden, "tensor") if sharded else to_hidden
        to_hidden = to_hidden[jnp.argsort(order)].reshape(b, t, width).astype(dtype)
    if wanted[1] and sharded:  # summed over the devices that held other rows, each keeping its part of the width
        if split:
            to_head = lax.psum_scatter(to_head, split, scatter_dimension=1 - axis, tiled=True)
        to_head = lax.psum(to_head, "data" if split else ROWS)
    return lax.psum(total, ROWS) if sharded else total, to_hidden, to_head


def _loss_and_slope(logits, own, sharded: bool):
    """A chunk's loss [c 1] and p_v - [v = y] [c columns]; the softmax is over the columns of all "tensor" devices."""
    top = jnp.max(logits, axis=1, keepdims=True)
    top = lax.pmax(top, "tensor") if sharded else top
    e = jnp.exp(logits - top)
    sums = jnp.sum(e, axis=1, keepdims=True), jnp.sum(jnp.where(own, logits, 0), axis=1, keepdims=True)
    all_e, score = lax.psum(sums, "tensor") if sharded else sums
    return top + jnp.log(all_e) - score, e / all_e - own


def _empty(how: _How, wanted: tuple[bool, bool], dtype, positions: tuple[int, int], head: tuple[int, ...]):
    """What the loop starts from: loss 0, and zeros for the gradients that are wanted."""
    parts = (
        how.mesh is not None and how.mesh.shape["tensor"] > 1
    )  # whose gradients are summed: kept in float32 till then
    total = jnp.float32(0)
    to_hidden: Any = jnp.zeros(positions, jnp.float32 if parts else dtype) if wanted[0] else None
    to_head = jnp.zeros(head, jnp.float32) if wanted[1] else None
    if how.mesh is not None:
        total = lax.pcast(total, ROWS, to="varying")
        to_hidden, to_head = lax.pcast((to_hidden, to_head), (*ROWS, "tensor"), to="varying")
    return total, to_hidden, to_head

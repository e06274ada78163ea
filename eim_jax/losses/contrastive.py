"""The contrastive loss against a whole-data-set queue (EIM, equations of loss_IE, loss_ST, loss_LM).

For one row with scaled query u = q/tau and fixed keys k_1..k_N of which k_y is its own,

    loss    = log sum_j exp(u.k_j) - u.k_y
    dloss/du = sum_j p_j k_j - k_y,   p = softmax(u.K)

`sum_j p_j k_j` is attention whose values are the keys, so one pass over K yields the loss and the whole gradient
(online_softmax.py): K is read once, the residual for the backward pass is [b, D], and nothing is recomputed. Keys get
no gradient.
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

from eim_jax.losses.online_softmax import Pass, Positives, keys_at_a_time, one_pass
from eim_jax.parallel.sharding import ROWS, parts_of

UNIT = {"float32": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}  # how far from 1 a unit key's length may be, held so

Similarity = Literal["cosine", "dot"]


class NCE(NamedTuple):
    """Sums over a batch's rows, each times the row's weight: they add over micro-batches; divide them by `weight`.

    loss: nats, the only field with a gradient. rank: of the own key, 1 is best, ties count against it; its siblings do
    not compete unless positives="self" (of "others" too it is the own key's, which that loss leaves out). recall1: rank
    is 1. similarity: with the own key, before division by tau. effective: 1 / sum p^2, the number of keys that the
    softmax in effect looks at, 1..N.
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
    center: Float[Array, "D"] | None = None,
    among: Int[Any, "m"] | None = None,
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
        group} p_j; "mask", as "self", but the rest of its group leaves the denominator; "others", as "group", but the
        own key is left out of both sums (a query that is alone in its group keeps it); "alone", no other key at all
        (self-distillation, cosine only), loss = (1 - cos) / tau.
      groups: [N], for "group", "mask" and "others": keys of one group share a number.
      scale: [N], of int8 codes: scale[j] * keys[j] is the key.
      center: [D], taken from the queries, after they are normalised and before they are once more under the cosine; of
        the keys it was taken before (losses/centering.py).
      among: [m], rows of the queue that are a query's negatives in place of all, beside its own key, which always
        counts and counts once; -1 stands for none, a row that stands twice counts twice. NumPy's are fixed when the
        program is compiled: then each device reads those alone that it holds. None: all `count` rows.
      chunk: keys read at a time; 0: 1024 on a CPU, on a TPU 32768, on a GPU more (`online_softmax.keys_at_a_time`).
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
    grouped = positives in ("group", "mask", "others")
    _check_arguments(keys, count, similarity, positives, groups, scale, center, parts_of(mesh))
    _check_values(keys, index, count, similarity, scale)
    _check_among(among, count)
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    fixed = isinstance(among, np.ndarray)
    if fixed:
        among = _by_device(among, keys.shape[0], parts_of(mesh))
    read = keys.shape[0] // parts_of(mesh) if among is None else among.shape[0] // (parts_of(mesh) if fixed else 1)
    usual = keys_at_a_time(platform, query.shape[0], read, keys.dtype, all_of_them=among is None)
    rows = min(chunk, read) if chunk else usual

    weights = jnp.ones(query.shape[0]) if weights is None else weights.astype(jnp.float32)
    counted = weights != 0
    q = jnp.where(counted[:, None], query, 0).astype(jnp.float32)  # also stops the gradient of uncounted rows
    q = as_queries(q, similarity, center)
    how = Pass(count, rows, positives, mesh, platform == "cpu", fixed)
    groups = groups if grouped else None
    loss, (rank, score, effective) = cast(Any, _rowwise(how, q / tau, keys, index, groups, scale, among))

    def total(x):
        return jnp.sum(jnp.where(counted, weights * x, 0))

    aux = (total(rank == 1), total(rank), total(score * tau), total(effective))
    return NCE(total(loss), jnp.sum(weights), *lax.stop_gradient(aux))


def as_queries(query: Float[Array, "b D"], similarity: str, center: Float[Array, "D"] | None = None):
    """Features [b D] as they meet a queue's keys, in float32: normalised for the cosine, without the queue's mean."""
    query = query.astype(jnp.float32)
    query = unit(query) if similarity == "cosine" else query
    if center is None:
        return query
    left = query - center[None]
    return unit(left) if similarity == "cosine" else left


def _check_arguments(keys, count, similarity, positives, groups, scale, center, shards) -> None:
    """Raises ValueError for arguments that do not go together, whatever their values."""
    if not 0 < count <= keys.shape[0]:
        raise ValueError(f"count={count}, but the queue holds {keys.shape[0]} rows (count is at least 1)")
    if keys.shape[0] % shards:
        raise ValueError(f"{keys.shape[0]} key rows do not divide over {shards} devices: pad them with zero rows")
    if (keys.dtype == jnp.int8) != (scale is not None):
        raise ValueError(f"keys of {keys.dtype} with scale={'None' if scale is None else 'given'}: int8 alone has one")
    if positives == "alone" and similarity != "cosine":
        raise ValueError('positives="alone" needs similarity="cosine": a dot product with one key has no least loss')
    if center is not None and center.shape != keys.shape[1:]:
        raise ValueError(f"center of shape {center.shape}: keys of {keys.shape[1]} numbers have a mean of as many")
    if positives in ("group", "mask", "others") and groups is None:
        raise ValueError(f'positives="{positives}" needs one group id a key (groups=)')


def _check_among(among, count: int) -> None:
    """Raises ValueError for negatives that are no list of rows of the queue."""
    if among is None:
        return
    if among.ndim != 1 or not among.shape[0]:
        raise ValueError(f"among of shape {among.shape}: it lists the rows of at least one negative, [m]")
    if isinstance(among, np.ndarray) and not ((among >= -1) & (among < count)).all():
        row = int(among[(among < -1) | (among >= count)][0])
        raise ValueError(f"among holds row {row}: the queue has rows 0 to {count - 1}, and -1 stands for none")


def _by_device(among: Int[np.ndarray, "m"], held: int, shards: int) -> Int[np.ndarray, "shards_longest"]:
    """Fixed rows, those of each device together, filled up with -1 to the longest list."""
    among = among.astype(np.int32)
    if shards == 1:
        return among
    device = np.where(among < 0, -1, among // (held // shards))
    longest = max(1, int(np.bincount(device[device >= 0], minlength=shards).max()))
    found = np.full((shards, longest), -1, np.int32)
    for number in range(shards):
        own = among[device == number]
        found[number, : len(own)] = own
    return found.ravel()


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


def unit(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Vectors of length 1; a zero vector stays zero, with a zero gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(square > 0, x * lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rowwise(how, u, keys, index, groups, scale, among):
    return _forward(how, u, keys, index, groups, scale, among)[0]


def _forward(how, u, keys, index, groups, scale, among):
    passed = functools.partial(one_pass, how)
    if how.mesh is not None:
        held, whole = PartitionSpec(ROWS), PartitionSpec()
        specs = (whole, held, whole, held, held, held if how.apart else whole)
        passed = jax.shard_map(passed, mesh=how.mesh, in_specs=specs, out_specs=whole)
    loss, gradient, *diagnostics = passed(u, keys, index, groups, scale, among)
    return (loss, tuple(diagnostics)), gradient


def _backward(how, gradient, cotangents):
    return cotangents[0][:, None] * gradient, None, None, None, None, None


_rowwise.defvjp(_forward, _backward)

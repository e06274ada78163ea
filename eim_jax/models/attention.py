"""Which attention a layer takes at its shapes, and JAX's own implementations in the form that ours has.

Ours keeps the scores [b heads t s] in float32, for the backward pass too. A flash kernel keeps none of them: cuDNN has
one for NVIDIA GPUs, which JAX calls in 16 bits for head widths that are multiples of 8, up to 128 before Hopper.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

# Ours, float32 softmax; jax.nn.dot_product_attention's; cuDNN's wherever it can, or only where it pays as well.
ATTENTIONS = ("softmax", "xla", "cudnn", "cudnn_long")
LONG = 128  # cuDNN works on tiles of 128 queries x 128 keys: below one tile in either it computes mostly padding
WIDEST_HEAD = 128


def check_attention(name: str) -> None:
    """Raises ValueError for a name that is not in ATTENTIONS."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention {name!r} is not one of {ATTENTIONS}")


def choose_attention(
    name: str,
    dtype: DTypeLike,
    queries: int,
    keys: int,
    head: int,
    *,
    dropout: bool = False,
    capped: bool = False,
    decoding: bool = False,
) -> str:
    """Returns what computes one layer's attention: "softmax" (ours), "xla" or "cudnn".

    Args:
      name: what the tower asks for, one of ATTENTIONS.
      dtype: of the values.
      queries: t, tokens that look.
      keys: s, tokens that are looked at.
      head: width of a head.
      dropout: attention weights are dropped out, which only ours can do.
      capped: scores are capped (Gemma 2): likewise.
      decoding: a cache is read; one query is then too little work a head for a matrix product.

    A mask decides nothing: each takes any.

    >>> choose_attention("cudnn_long", "bfloat16", 257, 257, 64), choose_attention("cudnn_long", "bfloat16", 50, 50, 64)
    ('cudnn', 'softmax')
    """
    check_attention(name)
    if name == "softmax" or dropout or capped or (decoding and queries == 1):
        return "softmax"
    if name == "xla":
        return "xla"
    takes = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head % 8 == 0 and head <= WIDEST_HEAD
    pays = min(queries, keys) >= LONG if name == "cudnn_long" else queries > 1
    return "cudnn" if takes and pays else "softmax"


def flash(
    q: Float[Array, "b t h e"],
    k: Float[Array, "b s kv e"],
    v: Float[Array, "b s kv e"],
    mask: Bool[Array, "#b 1 t s"] | None,
    implementation: Any,
) -> Float[Array, "b t h e"]:
    """Returns jax.nn.dot_product_attention of q, already scaled, over k and v, in v's dtype.

    For cuDNN, whose backward pass JAX refuses at odd lengths, these are padded to a multiple of 8: the added keys are
    hidden, what the added queries see is cut off.

    Args:
      q: queries; a row that may see nothing is never read.
      k: keys, each read by h / kv heads of queries.
      v: values.
      mask: True where a query may see a key, or None for everywhere.
      implementation: "xla" or "cudnn".
    """
    q, k = q.astype(v.dtype), k.astype(v.dtype)
    (b, t), s, lengths = q.shape[:2], k.shape[1], None
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, *mask.shape[1:]))
    if implementation == "cudnn" and (t % 2 or s % 2):
        more = [-n % 8 if n % 2 else 0 for n in (t, s)]
        q, k, v = (jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0))) for x, n in ((q, more[0]), (k, more[1]), (v, more[1])))
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))
        else:
            lengths = jnp.full((b,), s, jnp.int32)
    mixed = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=1.0, key_value_seq_lengths=lengths, implementation=implementation
    )
    return mixed[:, :t]

"""A LLaMA's shape and its blocks: RoPE, grouped-query attention, SwiGLU, and where an adapter enters them.

The shape also says in what other families differ that are built alike (mistral.py, qwen.py, gemma2.py, ...).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eim_jax.models.adapters.adapter import Adapter
from eim_jax.models.attention import check_attention, choose_attention, flash
from eim_jax.models.language.rope import RopeScaling, rotate
from eim_jax.models.layers import ACTIVATIONS
from eim_jax.models.products import mix
from eim_jax.models.quant import QDense
from eim_jax.models.soft_cap import soft_cap
from eim_jax.models.stacks import stack


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA; the defaults are LLaMA-7B (6,738,415,616 parameters).

    Attributes:
      kv_heads: heads of keys and values, each read by heads/kv_heads queries; 0 for as many as heads.
      own_head_width: of one head where it is not width / heads; else 0.
      eps: of RMSNorm (v1: 1e-6, Llama 2: 1e-5).
      tied: the head is the embedding.
      adapter: one of the adapters' objects (models/adapters), or None.
      quant: "none", or "nf4" for the blocks' linear layers.
      qkv_bias: biases of the query, key and value maps, which LLaMA lacks; Qwen2 and a folded adapter have them.
      out_bias: a bias of the attention's output map: with qkv_bias it is config.json's attention_bias.
      rope_scaling: how RoPE's frequencies are stretched (not those of `narrow` layers with a theta of their own).
      no_rope: for each layer whether it turns nothing (SmolLM3); () for none.
      window: how many tokens a `narrow` layer sees, itself included; 0 for all.
      narrow: for each layer whether `window` holds there; () for every layer.
      narrow_theta: RoPE's theta in narrow layers; 0 for rope_theta.
      qk_norm: an RMSNorm over each head's queries and keys, before RoPE (Qwen3, Gemma 3).
      query_scale: queries are divided by its root; 0 for head_width.
      norm_offset: norms add their scale to 1 (Gemma).
      post_norms: a norm behind the attention and one behind the MLP, before their sums (Gemma).
      activation: of the MLP's gate, a name in layers.ACTIVATIONS.
      embedding_scaled: token embeddings are multiplied by the root of the width (Gemma).
      attention_cap, logit_cap: attention scores and next-token logits x become cap tanh(x / cap) (Gemma 2); 0: as is.
      scan: stack the blocks' parameters and scan over them.
      remat: "none", "full" or "dots" (stacks.REMAT_POLICIES).
      attention: a name in attention.ATTENTIONS; an adapter's own softmax is ours.
      model_type: the family whose files hold it (models/language.FAMILIES).
    """

    vocab: int = 32000
    context: int = 2048
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 0
    own_head_width: int = 0
    mlp: int = 11008
    eps: float = 1e-6
    rope_theta: float = 10000.0
    tied: bool = False
    adapter: Adapter | None = None
    quant: str = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    rope_scaling: RopeScaling | None = None
    no_rope: tuple[bool, ...] = ()
    window: int = 0
    narrow: tuple[bool, ...] = ()
    narrow_theta: float = 0.0
    qk_norm: bool = False
    query_scale: int = 0
    norm_offset: bool = False
    post_norms: bool = False
    activation: str = "silu"
    embedding_scaled: bool = False
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    model_type: str = "llama"

    def __post_init__(self):  # noqa: D105
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.own_head_width * self.heads == self.width:
            object.__setattr__(self, "own_head_width", 0)
        if self.heads % self.kv_heads or (not self.own_head_width and self.width % self.heads):
            raise ValueError(f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}: each divides the last")
        if self.head_width % 2:
            raise ValueError(f"head width {self.head_width} is odd: RoPE turns pairs")
        for name in ("no_rope", "narrow"):
            if len(getattr(self, name)) not in (0, self.layers):
                raise ValueError(f"{name} is given for {len(getattr(self, name))} layers of {self.layers}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        check_attention(self.attention)
        if self.adapter is not None:
            self.adapter.check(self.width, self.layers)

    @property
    def dropout(self) -> float:
        """LLaMA has none."""
        return 0.0

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.own_head_width or self.width // self.heads


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose stored scale is what is added to 1 (Gemma's)."""

    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Norms over the last axis, in float32."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        exact = x.astype(jnp.float32)
        normed = exact * jax.lax.rsqrt(jnp.mean(exact**2, axis=-1, keepdims=True) + self.epsilon)
        factor = 1 + scale.astype(jnp.float32)
        return (normed * jnp.broadcast_to(factor, normed.shape)).astype(self.dtype)


def rms_norm(c: LlamaConfig) -> nn.Module:
    """Returns a norm of this shape's kind."""
    return (OffsetRMSNorm if c.norm_offset else nn.RMSNorm)(epsilon=c.eps, dtype=c.dtype)


class LlamaAttention(nn.Module):
    """Grouped-query attention with RoPE and float32 softmax; an adapter may add to what the heads give."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        inner, shared = c.heads * c.head_width, c.kv_heads * c.head_width
        self.q = QDense(c.width, inner, quant=c.quant, use_bias=c.qkv_bias, dtype=c.dtype)
        self.k = QDense(c.width, shared, quant=c.quant, use_bias=c.qkv_bias, dtype=c.dtype)
        self.v = QDense(c.width, shared, quant=c.quant, use_bias=c.qkv_bias, dtype=c.dtype)
        residual = nn.initializers.normal(0.02 * (2 * c.layers) ** -0.5)
        self.out = QDense(inner, c.width, quant=c.quant, use_bias=c.out_bias, dtype=c.dtype, kernel_init=residual)
        if c.qk_norm:
            self.q_norm, self.k_norm = rms_norm(c), rms_norm(c)

    def keys_values(self, x: Float[Array, "b t d"]) -> tuple[Array, Array]:
        """Returns x's keys (not turned) and values [b t kv e]."""
        shape = (*x.shape[:2], self.config.kv_heads, self.config.head_width)
        k, v = self.k(x).reshape(shape), self.v(x).reshape(shape)
        return self.k_norm(k) if self.config.qk_norm else k, v

    def __call__(self, x, turn, mask, start, beside, kv, packed=None):
        """Attends from x [b t d] to x, or (kv given) to cache slots after writing x at slot `start`.

        `beside` is an adapter's `attention_beside` without its leaf and row, or None. Where samples share rows
        (`packed`), it is asked of each in a row of its own.
        """
        c, (b, t, _) = self.config, x.shape
        k, v = self.keys_values(x)
        k = rotate(k, turn)
        q = self.q(x).reshape(b, t, c.heads, c.head_width)
        q = rotate(self.q_norm(q) if c.qk_norm else q, turn) * (c.query_scale or c.head_width) ** -0.5
        whole, q = q, q.reshape(b, t, c.kv_heads, c.heads // c.kv_heads, c.head_width)
        if kv is not None:
            at = (0, start, 0, 0)
            k = jax.lax.dynamic_update_slice(kv[0], k.astype(kv[0].dtype), at)
            v = jax.lax.dynamic_update_slice(kv[1], v.astype(kv[1].dtype), at)
            kv = (k, v)
        asked = {"capped": c.attention_cap > 0, "decoding": kv is not None}
        choice = choose_attention(c.attention, v.dtype, t, k.shape[1], c.head_width, **asked)
        if choice == "softmax":
            mixed = _attend(q, k, v, None if mask is None else mask[:, None], c.attention_cap)
        else:
            mixed = flash(whole, k, v, mask, choice).reshape(q.shape)
        if beside is not None:

            def attend(keys, values):
                rows = q if packed is None else packed.unpack(q)
                seen = _attend(rows, keys.astype(k.dtype), values.astype(v.dtype), None, c.attention_cap)
                return seen if packed is None else packed.pack(seen)

            more = beside(attend, self.keys_values)
            mixed = mixed if more is None else mixed + more
        return self.out(mixed.reshape(b, t, c.heads * c.head_width)), kv


def _attend(q, k, v, mask, cap):
    """Softmax attention of q [b t kv g e] over k, v [b s kv e]; mask [b 1 1 t s] or None; `cap` 0 leaves the scores."""
    logits = soft_cap(jnp.einsum("btkge,bske->bkgts", q, k, preferred_element_type=jnp.float32), cap)
    if mask is not None:  # finite, so that a row that may see nothing gives no NaN
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return mix("bkgts,bske->btkge", weights, v)


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or with another activation than silu."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.gate = QDense(c.width, c.mlp, quant=c.quant, dtype=c.dtype)
        self.up = QDense(c.width, c.mlp, quant=c.quant, dtype=c.dtype)
        residual = nn.initializers.normal(0.02 * (2 * c.layers) ** -0.5)
        self.down = QDense(c.mlp, c.width, quant=c.quant, dtype=c.dtype, kernel_init=residual)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token by itself."""
        return self.down(ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """x + attention(norm_1(x)), then x + mlp(norm_2(x)); an adapter enters at the attention.

    With `post_norms` what is added is normed before: post_1(attention(...)), post_2(mlp(...)).
    """

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.norm_1 = rms_norm(c)
        self.attn = LlamaAttention(c)
        self.norm_2 = rms_norm(c)
        self.mlp = LlamaMLP(c)
        if c.post_norms:
            self.post_1, self.post_2 = rms_norm(c), rms_norm(c)
        if c.adapter is not None:
            self.drop = nn.Dropout(c.adapter.dropout_rate)

    def keys_values(self, x: Float[Array, "b t d"]) -> tuple[Array, Array]:
        """Returns the attention's keys and values of x as it is, without norm and RoPE."""
        return self.attn.keys_values(x)

    def __call__(self, x, turn, mask, train, start, leaf, row, kv, which=None, packed=None):
        """Returns the output [b t d] and (the updated cache slots, what the adapter reports to its `steer`).

        `leaf` is the layer's part of the adapter's leaves, `row` its part of the steering; without leaves the block is
        the untouched LM's. Where layers differ, `turn` and `mask` have a leading axis of kinds, and `which` says the
        layer's place on it. `packed` says whose slots x has, where samples share rows.
        """
        if which is not None:
            turn, mask = jax.tree.map(lambda kinds: kinds[which], (turn, mask))
        z, adapter, report, beside = self.norm_1(x), self.config.adapter, None, None
        if adapter is not None and leaf is not None:
            drop = functools.partial(self.drop, deterministic=not train)
            # An adapter knows samples, not slots: it reads each in a row of its own.
            z, report = adapter.attention_input(leaf, row, z if packed is None else packed.unpack(z), drop)
            z = z if packed is None else packed.pack(z)
            beside = functools.partial(adapter.attention_beside, leaf, row)
        mixed, kv = self.attn(z, turn, mask, start, beside, kv, packed)
        post = self.config.post_norms
        x = x + (self.post_1(mixed) if post else mixed)
        made = self.mlp(self.norm_2(x))
        return x + (self.post_2(made) if post else made), (kv, report)


def make_blocks(c: LlamaConfig):
    """A list of blocks, or one scanned block, as stacks.make_blocks."""
    every = nn.broadcast
    axes = (every, every, every, every, 0, 0, 0, 0, every)
    # Argument 4 of __call__ (self is 0) is the Python bool `train`.
    return stack(LlamaBlock, c, c.layers, scan=c.scan, remat=c.remat, static=(4,), axes=axes)

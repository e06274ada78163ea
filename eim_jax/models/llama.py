"""LLaMA (v1, Llama 2, grouped-query attention) with LM_e, LM_block and head callable by themselves, and its adapters.

An adapter adds one subtree, "adapter", and changes the blocks only through what `steer` returns: without it, `hidden`
is the untouched language model.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.cache import Cache, visible
from eim_jax.models.layers import NORMAL, REMAT_POLICIES, check_attention, flash
from eim_jax.models.peft import ModalityAdapter, PromptAdapter, Router, ZeroInit, mix, route, shrink
from eim_jax.models.quant import QDense


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA; the defaults are LLaMA-7B (6,738,415,616 parameters).

    Attributes:
      kv_heads: heads of keys and values, each read by heads/kv_heads queries; 0 for as many as heads.
      eps: of RMSNorm (v1: 1e-6, Llama 2: 1e-5).
      tied: the head is the embedding.
      adapter: LaVIN's Router, LLaMA-Adapter's ZeroInit, or None.
      quant: "none", or "nf4" for the blocks' linear layers.
      qkv_bias: biases of the query, key and value maps, which LLaMA lacks and a folded adapter needs (fold.py).
      scan: stack the blocks' parameters and scan over them.
      remat: "none", "full" or "dots" (layers.REMAT_POLICIES).
      attention: a name in layers.ATTENTIONS, for all but the decoding of one token and the prompts' own softmax.
    """

    vocab: int = 32000
    context: int = 2048
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 0
    mlp: int = 11008
    eps: float = 1e-6
    rope_theta: float = 10000.0
    tied: bool = False
    adapter: Router | ZeroInit | None = None
    quant: str = "none"
    qkv_bias: bool = False
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):  # noqa: D105
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}: each divides the last")
        if self.head_width % 2:
            raise ValueError(f"head width {self.head_width} is odd: RoPE turns pairs")
        check_attention(self.attention)
        if isinstance(self.adapter, ZeroInit) and not 1 <= self.adapter.layers <= self.layers:
            raise ValueError(f"the adapter's {self.adapter.layers} topmost layers are not among {self.layers}")
        if isinstance(self.adapter, Router):
            self.adapter.check(self.width)

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.width // self.heads


class Steer(NamedTuple):
    """What an image (or its absence) changes inside the LM besides the input tokens; None where there is nothing."""

    weights: Float[Array, "L b 2"] | None = None  # LaVIN: each layer's routing weights
    keys: Float[Array, "l b K kv e"] | None = None  # LLaMA-Adapter: keys and values of the topmost layers' prompts
    values: Float[Array, "l b K kv e"] | None = None


def rotation(positions: Int[Array, "b t"], head_width: int, theta: float) -> tuple[Array, Array]:
    """Returns RoPE's cos and sin [b t 1 e/2], float32, for each position."""
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: Float[Array, "b t h e"], turn: tuple[Array, Array]) -> Float[Array, "b t h e"]:
    """Turns the pairs (x_i, x_{i+e/2}), as Hugging Face's files order them (Meta's pairs are adjacent)."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class LlamaAttention(nn.Module):
    """Grouped-query attention with RoPE, float32 softmax, and LLaMA-Adapter's gated second attention."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        inner, shared = c.heads * c.head_width, c.kv_heads * c.head_width
        self.q = QDense(c.width, inner, quant=c.quant, use_bias=c.qkv_bias, dtype=c.dtype)
        self.k = QDense(c.width, shared, quant=c.quant, use_bias=c.qkv_bias, dtype=c.dtype)
        self.v = QDense(c.width, shared, quant=c.quant, use_bias=c.qkv_bias, dtype=c.dtype)
        residual = nn.initializers.normal(0.02 * (2 * c.layers) ** -0.5)
        self.out = QDense(inner, c.width, quant=c.quant, dtype=c.dtype, kernel_init=residual)

    def keys_values(self, x: Float[Array, "b t d"]) -> tuple[Array, Array]:
        """Returns x's keys (not turned) and values [b t kv e]."""
        shape = (*x.shape[:2], self.config.kv_heads, self.config.head_width)
        return self.k(x).reshape(shape), self.v(x).reshape(shape)

    def __call__(self, x, turn, mask, start, prompt, kv):
        """Attends from x [b t d] to x, or (kv given) to cache slots after writing x at slot `start`.

        `prompt` = (keys, values [b K kv e], gate [h]) adds tanh(gate) times a softmax of its own over the prompts.
        """
        c, (b, t, _) = self.config, x.shape
        k, v = self.keys_values(x)
        k = rotate(k, turn)
        q = rotate(self.q(x).reshape(b, t, c.heads, c.head_width), turn) * c.head_width**-0.5
        whole, q = q, q.reshape(b, t, c.kv_heads, c.heads // c.kv_heads, c.head_width)
        if kv is not None:
            at = (0, start, 0, 0)
            k = jax.lax.dynamic_update_slice(kv[0], k.astype(kv[0].dtype), at)
            v = jax.lax.dynamic_update_slice(kv[1], v.astype(kv[1].dtype), at)
            kv = (k, v)
        if c.attention == "softmax" or (kv is not None and t == 1):
            mixed = _attend(q, k, v, None if mask is None else mask[:, None])
        else:
            mixed = flash(whole, k, v, mask, c.attention).reshape(q.shape)
        if prompt is not None:
            keys, values, gate = prompt
            gate = jnp.tanh(gate.astype(jnp.float32)).astype(mixed.dtype).reshape(1, 1, c.kv_heads, -1, 1)
            mixed = mixed + gate * _attend(q, keys.astype(k.dtype), values.astype(v.dtype), None)
        return self.out(mixed.reshape(b, t, c.heads * c.head_width)), kv


def _attend(q, k, v, mask):
    """Softmax attention of q [b t kv g e] over k, v [b s kv e]; mask [b 1 1 t s] or None."""
    logits = jnp.einsum("btkge,bske->bkgts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:  # finite, so that a row that may see nothing gives no NaN
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bske->btkge", weights, v)


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.gate = QDense(c.width, c.mlp, quant=c.quant, dtype=c.dtype)
        self.up = QDense(c.width, c.mlp, quant=c.quant, dtype=c.dtype)
        residual = nn.initializers.normal(0.02 * (2 * c.layers) ** -0.5)
        self.down = QDense(c.mlp, c.width, quant=c.quant, dtype=c.dtype, kernel_init=residual)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token by itself."""
        return self.down(nn.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """x + attention(norm_1(x)), then x + mlp(norm_2(x)); a router adapter stands between norm_1 and attention."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.norm_1 = nn.RMSNorm(epsilon=c.eps, dtype=c.dtype)
        self.attn = LlamaAttention(c)
        self.norm_2 = nn.RMSNorm(epsilon=c.eps, dtype=c.dtype)
        self.mlp = LlamaMLP(c)
        if isinstance(c.adapter, Router):
            self.drop = nn.Dropout(c.adapter.dropout)

    def keys_values(self, x: Float[Array, "b t d"]) -> tuple[Array, Array]:
        """Returns the attention's keys and values of x as it is, without norm and RoPE."""
        return self.attn.keys_values(x)

    def __call__(self, x, turn, mask, train, start, leaf, row, kv):
        """Returns the output [b t d] and (the updated cache slots, the routing weights used).

        `leaf` is the layer's part of the adapter, `row` its part of Steer: (weights [b 2],), (keys, values), or None,
        for which the weights come from the first row of the adapter's own input.
        """
        z, weights, prompt = self.norm_1(x), None, None
        if isinstance(self.config.adapter, Router) and leaf is not None:
            weights = route(leaf, z[:, 0], self.config.adapter.temperature) if row is None else row[0]
            z = mix(leaf, z, self.drop(shrink(leaf, z), deterministic=not train), weights)
        elif row is not None:
            prompt = (*row, leaf)
        mixed, kv = self.attn(z, turn, mask, start, prompt, kv)
        x = x + mixed
        return x + self.mlp(self.norm_2(x)), (kv, weights)


class Llama(nn.Module):
    """LLaMA language model, with or without an adapter."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.token_embedding = nn.Embed(c.vocab, c.width, embedding_init=NORMAL, dtype=c.dtype)
        self.blocks = _make_blocks(c)
        self.norm_f = nn.RMSNorm(epsilon=c.eps, dtype=c.dtype)
        if not c.tied:
            self.head = QDense(c.width, c.vocab, dtype=c.dtype)
        if isinstance(c.adapter, Router):
            self.adapter = ModalityAdapter(c.layers, c.width, c.adapter)
        elif c.adapter is not None:
            self.adapter = PromptAdapter(c.adapter, c.width, c.heads)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns the token embeddings: LM_e."""
        return self.token_embedding(tokens)

    def hidden(
        self,
        embeds: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
        steer: Steer | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns LM_block's output (after norm_f) for input embeddings, and the cache that now holds these tokens.

        Args:
          embeds: token embeddings or the ST's output.
          valid: False for padding, which nothing sees; None means all real.
          positions: of each token; 0..t-1 by default. Must be given with a cache.
          cache: what was read before; these tokens take its next t slots.
          train: dropout (of a router adapter) is on; needs the rng "dropout".
          steer: what the adapter needs, from `steer`; None is the LM without its adapter.

        Raises:
          ValueError: more tokens than the context, or a cache without positions.
        """
        c, (b, t) = self.config, embeds.shape[:2]
        if t > c.context:
            raise ValueError(f"{t} tokens do not fit LLaMA's context of {c.context}")
        if positions is None:
            if cache is not None:
                raise ValueError("with a cache the positions of the new tokens must be given")
            positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        mask, flags = visible(cache, valid, b, t)
        start, kv = (None, None) if cache is None else (cache.length, cache.kv)
        x, kv, _ = self._run(embeds.astype(c.dtype), positions, mask, train, start, self._leaves(steer), steer, kv)
        return self.norm_f(x), None if cache is None else Cache(kv, flags, cache.length + t)

    def steer(self, visual: Float[Array, "b K d"] | None, has_image: Bool[Array, "b"] | None) -> Steer:
        """Returns what the adapter needs for rows with these visual tokens (None: no row has an image).

        LaVIN: the modality row sees itself alone and nobody sees it, so in every layer its routing weights depend on
        the modality index only; they are computed once for both indices and looked up. LLaMA-Adapter: the visual tokens
        are added to every layer's prompts, which then pass through the frozen key and value maps.

        Args:
          visual: the ST's output; LaVIN's are input tokens and change nothing here.
          has_image: which rows have one; None with `visual` means all.

        Raises:
          ValueError: this LM has no adapter, or the number of visual tokens is not that of the prompts.
        """
        c = self.config
        if c.adapter is None:
            raise ValueError("this LLaMA has no adapter to steer")
        if isinstance(c.adapter, Router):
            table = self.routing_table()
            if has_image is None:
                raise ValueError("a router needs has_image: which rows have an image")
            return Steer(weights=table[:, has_image.astype(jnp.int32)])
        prompts = self.adapter.tokens.astype(c.dtype)[:, None]
        if visual is not None:
            if visual.shape[1] != c.adapter.prompts:
                raise ValueError(
                    f"the ST gives {visual.shape[1]} tokens for {c.adapter.prompts} prompts: make them equal"
                )
            if has_image is not None:
                visual = jnp.where(has_image[:, None, None], visual, 0)
            prompts = prompts + visual.astype(c.dtype)[None]
        first = c.layers - c.adapter.layers
        if c.scan:
            block, stack = LlamaBlock(c, parent=None), self.variables["params"]["blocks"]
            top = jax.tree.map(lambda leaf: leaf[first:], stack)
            project = jax.vmap(lambda leaf, x: block.apply({"params": leaf}, x, method="keys_values"))
            return Steer(None, *project(top, prompts))
        pairs = [block.keys_values(x) for block, x in zip(self.blocks[first:], prompts, strict=True)]
        return Steer(None, *(jnp.stack(part) for part in zip(*pairs, strict=True)))

    def routing_table(self) -> Float[Array, "L 2 2"]:
        """Returns LaVIN's routing weights of every layer for [text only, with image] (LaVIN, equation 4)."""
        x = self.adapter.modality.astype(self.config.dtype)[:, None]
        zero = jnp.zeros((2, 1), jnp.int32)
        return self._run(x, zero, None, False, None, self.adapter.leaves(), None, None)[2]

    def _leaves(self, steer):
        """The adapter's leaves by layer, or None for the LM without it."""
        if self.config.adapter is not None and self.is_initializing():
            self.adapter.leaves()
        return None if steer is None else self.adapter.leaves()

    def _run(self, x, positions, mask, train, start, leaves, steer, kv):
        """Runs the blocks: (output, cache slots in the form in which they came, routing weights [L b 2] or None)."""
        c = self.config
        turn = rotation(positions, c.head_width, c.rope_theta)
        rows = None if steer is None else tuple(part for part in steer if part is not None)
        if c.scan:
            if isinstance(c.adapter, ZeroInit) and leaves is not None:  # lower layers: a gate of 0
                below = c.layers - c.adapter.layers
                leaves, rows = jax.tree.map(
                    lambda part: jnp.pad(part, [(below, 0)] + [(0, 0)] * (part.ndim - 1)), (leaves, rows)
                )
            x, (kv, weights) = self.blocks(x, turn, mask, train, start, leaves, rows, kv)
            return x, kv, weights
        first = c.layers - c.adapter.layers if isinstance(c.adapter, ZeroInit) else 0
        slots, weights = [], []
        for i, block in enumerate(self.blocks):
            leaf, row = (jax.tree.map(lambda part, i=i: part[i - first], tree) for tree in (leaves, rows))
            if i < first:
                leaf = row = None
            x, (new, w) = block(x, turn, mask, train, start, leaf, row, None if kv is None else kv[i])
            slots.append(new)
            weights.append(w)
        routed = isinstance(c.adapter, Router) and leaves is not None
        return x, None if kv is None else tuple(slots), jnp.stack(weights) if routed else None

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Returns float32 next-token logits."""
        c = self.config
        weight, axis = self.head_weights()
        contract_width = (((2,), (1 - axis,)), ((), ()))
        weight = weight.astype(c.dtype)
        return jax.lax.dot_general(hidden.astype(c.dtype), weight, contract_width, preferred_element_type=jnp.float32)

    def head_weights(self) -> tuple[Float[Array, "_ _"], int]:
        """Returns the head's weights, [d V] or tied [V d], and which of their axes counts the vocabulary."""
        return (self.token_embedding.embedding, 0) if self.config.tied else (self.head.kernel, 1)

    def __call__(
        self, tokens: Int[Array, "b t"], valid: Bool[Array, "b t"] | None = None, train: bool = False
    ) -> Float[Array, "b t V"]:
        """Returns the logits of text alone, by the LM without its adapter."""
        hidden, _ = self.hidden(self.embed(tokens), valid=valid, train=train)
        return self.logits(hidden)


def _make_blocks(c: LlamaConfig):
    """A list of blocks, or one scanned block, as layers.make_blocks."""
    if c.remat not in REMAT_POLICIES:
        raise ValueError(f"remat {c.remat!r} is not one of {sorted(REMAT_POLICIES)}")
    block = LlamaBlock
    if c.remat != "none":  # argument 4 of __call__ (self is 0) is the Python bool `train`
        block = nn.remat(block, policy=REMAT_POLICIES[c.remat], static_argnums=(4,), prevent_cse=not c.scan)
    if not c.scan:
        return [block(c) for _ in range(c.layers)]
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0, 0, 0),
        length=c.layers,
    )
    return scanned(c)

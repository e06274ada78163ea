"""What the towers are built of: attention, the MLP, and the pre-norm block (stacks.py makes towers of blocks).

`Block` is the block of CLIP, GPT-2 and the ST's Transformers (LLaMA's is in language/llama_block.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import Adapter
from eim_jax.models.attention import check_attention, choose_attention, flash
from eim_jax.models.linear import Dense, DenseGeneral
from eim_jax.models.products import mix

ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

NORMAL = nn.initializers.normal(0.02)


def zero_bias(fan_in: int) -> Callable:
    """Returns the initialiser of biases that start at zero, whatever the number of their layer's inputs."""
    return nn.initializers.zeros


def uniform_bias(fan_in: int) -> Callable:
    """Returns the initialiser U(+-1/sqrt(fan_in)), from which the biases of a torch.nn.Linear start."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


KeyValue = tuple[Float[Array, "b s h e"], Float[Array, "b s h e"]]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Shape of one block; `init` is for kernels that read the residual stream, `residual_init` for those that write.

    `gated` splits what `mlp`'s first layer gives into two of that width, of which the activated one scales the other
    (SwiGLU). `layer_scale` gives both branches a trained factor a channel (DINOv2). `bias_init` gives the biases'
    initialiser by their layer's fan-in. An `adapter` stands between ln_1 and attention; its leaves come with the
    block's input.
    """

    width: int
    heads: int
    mlp: int
    activation: str
    eps: float = 1e-5
    qkv_bias: bool = True
    gated: bool = False
    layer_scale: bool = False
    dropout: float = 0.0
    adapter: Adapter | None = None
    init: Callable = NORMAL
    residual_init: Callable = NORMAL
    bias_init: Callable[[int], Callable] = zero_bias
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):  # noqa: D105
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        check_attention(self.attention)


def layer_norm(eps: float, dtype: DTypeLike) -> nn.LayerNorm:
    """Returns a LayerNorm with float32 statistics (two-pass variance, as PyTorch) and its result in `dtype`."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False)


class Attention(nn.Module):
    """Multi-head attention with fused qkv, float32 softmax and dropout on the attention weights.

    JAX's implementations take over where `choose_attention` says so.
    """

    config: BlockConfig

    def setup(self):  # noqa: D102
        c = self.config
        # [d, 3, d], not [d, 3 d]: split over devices along its last dimension, it is split by heads.
        bias = c.bias_init(c.width)
        self.qkv = DenseGeneral((3, c.width), use_bias=c.qkv_bias, kernel_init=c.init, bias_init=bias, dtype=c.dtype)
        self.out = Dense(c.width, kernel_init=c.residual_init, bias_init=bias, dtype=c.dtype)
        self.drop = nn.Dropout(c.dropout)

    def _heads(self, x: Float[Array, "b t d"]) -> list[Float[Array, "b t h e"]]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.config.heads, -1)
        return [qkv[:, :, i] for i in range(3)]

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "#b 1 t s"] | None,
        train: bool,
        start: Int[Array, ""] | None,
        prompt: Float[Array, "1 p d"] | None,
        kv: KeyValue | None,
    ) -> tuple[Float[Array, "b t d"], KeyValue | None]:
        """Attends from x to x, to the prompt's tokens, or (kv given) to cache slots after writing x at slot `start`."""
        q, k, v = self._heads(x)
        if prompt is not None:  # the same for every row: projected once, then broadcast
            _, k_prompt, v_prompt = (jnp.broadcast_to(a, (x.shape[0], *a.shape[1:])) for a in self._heads(prompt))
            k, v = jnp.concatenate([k, k_prompt], 1), jnp.concatenate([v, v_prompt], 1)
        if kv is not None:
            at: Any = (0, start, 0, 0)
            k = jax.lax.dynamic_update_slice(kv[0], k.astype(kv[0].dtype), at)
            v = jax.lax.dynamic_update_slice(kv[1], v.astype(kv[1].dtype), at)
            kv = (k, v)
        q = q * q.shape[-1] ** -0.5
        dropped, shape = train and self.config.dropout > 0, (q.shape[1], k.shape[1], q.shape[3])
        choice = choose_attention(self.config.attention, v.dtype, *shape, dropout=dropped, decoding=kv is not None)
        if choice != "softmax":
            return self.out(flash(q, k, v, mask, choice).reshape(x.shape).astype(x.dtype)), kv
        one = kv is not None and q.shape[1] == 1  # decoding: too little work a head for a matrix product
        if one:
            logits = jnp.sum(q * k, axis=-1, dtype=jnp.float32).transpose(0, 2, 1)[:, :, None]
        else:
            logits = jnp.einsum("bthe,bshe->bhts", q, k, preferred_element_type=jnp.float32)
        if mask is not None:  # finite, so that a row that may see nothing gives no NaN
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        weights = self.drop(weights, deterministic=not train)
        if one:
            mixed = jnp.sum(weights[:, :, 0].transpose(0, 2, 1)[..., None] * v, 1, dtype=jnp.float32, keepdims=True)
        else:
            mixed = mix("bhts,bshe->bthe", weights, v)
        return self.out(mixed.reshape(x.shape).astype(x.dtype)), kv


class MLP(nn.Module):
    """Two linear layers around an activation."""

    config: BlockConfig

    def setup(self):  # noqa: D102
        c = self.config
        width = 2 * c.mlp if c.gated else c.mlp
        self.up = Dense(width, kernel_init=c.init, bias_init=c.bias_init(c.width), dtype=c.dtype)
        self.down = Dense(c.width, kernel_init=c.residual_init, bias_init=c.bias_init(c.mlp), dtype=c.dtype)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps every token by itself."""
        inner, activation = self.up(x), ACTIVATIONS[self.config.activation]
        if self.config.gated:
            gate, inner = jnp.split(inner, 2, axis=-1)
            return self.down(activation(gate) * inner)
        return self.down(activation(inner))


class LayerScale(nn.Module):
    """A trained factor a channel, from 1."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Scales every channel."""
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)[None, None]


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)), with dropout on both branches.

    Prompt tokens are keys and values only: deep prompts are replaced at the next block's input, so what attention and
    the MLP would compute *for* them is never read. An adapter changes x's tokens, not the prompt's.
    """

    config: BlockConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.ln_1 = layer_norm(c.eps, c.dtype)
        self.attn = Attention(c)
        self.ln_2 = layer_norm(c.eps, c.dtype)
        self.mlp = MLP(c)
        self.drop = nn.Dropout(c.dropout)
        if c.layer_scale:
            self.ls_1, self.ls_2 = LayerScale(c.dtype), LayerScale(c.dtype)
        if c.adapter is not None:
            self.drop_inner = nn.Dropout(c.adapter.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "#b 1 t s"] | None,
        train: bool,
        start: Int[Array, ""] | None,
        prompt: Float[Array, "1 p d"] | None,
        leaf: dict | None,
        kv: KeyValue | None,
        watch: bool,
    ) -> tuple[Float[Array, "b t d"], tuple[KeyValue | None, Float[Array, "b d"] | None]]:
        """Returns the block's output, its updated cache slots if it was given any, and `watch`ed its output's token 0.

        `leaf` is this layer's part of the adapter, which nothing steers here: it sees each row's own input alone.
        """
        prompt = None if prompt is None else self.ln_1(prompt)
        z, adapter = self.ln_1(x), self.config.adapter
        if adapter is not None and leaf is not None:
            drop = functools.partial(self.drop_inner, deterministic=not train)
            z, _ = adapter.attention_input(leaf, None, z, drop)
        mixed, kv = self.attn(z, mask, train, start, prompt, kv)
        scaled = self.config.layer_scale
        x = x + self.drop(self.ls_1(mixed) if scaled else mixed, deterministic=not train)
        mapped = self.mlp(self.ln_2(x))
        x = x + self.drop(self.ls_2(mapped) if scaled else mapped, deterministic=not train)
        return x, (kv, x[:, 0] if watch else None)


def causal_mask(length: int) -> Bool[Array, "1 1 t t"]:
    """Returns the mask under which position i sees positions 0..i."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))

"""The semantic-space transformation network (ST) between CLIP and the LM: ClipCap's two mappers and EIM's FFN."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eim_jax.models.layers import ACTIVATIONS, BlockConfig, make_blocks, run_blocks

# torch.nn.Linear's own initialisation, U(+-1/sqrt(fan_in)), from which ClipCap's mappers start.
LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
DEFAULT_ACTIVATION = {"mlp": "tanh", "transformer": "relu", "ffn": "gelu"}


@dataclasses.dataclass(frozen=True)
class STConfig:
    """Shape of an ST.

    Attributes:
      kind: "mlp" and "transformer" are ClipCap's mappers from one image feature to `tokens` embeddings; "ffn" is EIM's,
        which maps every visual token by itself.
      width_in: width of what CLIP gives (joint space for ClipCap, CLIP.visual's width for the FFN).
      width_out: the LM's width.
      tokens: output tokens of the mappers (the FFN gives as many as it gets).
      hidden: width inside the MLPs; 0 for ClipCap's width_out * tokens / 2 ("mlp") and 2 x width_out ("transformer"),
        EIM's 4 x width_in ("ffn").
      layers, heads, clip_length: of the "transformer" mapper; clip_length tokens are made from the image feature.
      activation: None for tanh ("mlp"), relu ("transformer"), gelu ("ffn").
    """

    kind: str = "ffn"
    width_in: int = 768
    width_out: int = 768
    tokens: int = 10
    hidden: int = 0
    layers: int = 8
    heads: int = 8
    clip_length: int = 10
    activation: str | None = None
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):  # noqa: D105
        if self.kind not in DEFAULT_ACTIVATION:
            raise ValueError(f"ST kind {self.kind!r} is not one of {sorted(DEFAULT_ACTIVATION)}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")

    @property
    def activation_name(self) -> str:
        """The activation in use."""
        return self.activation or DEFAULT_ACTIVATION[self.kind]

    @property
    def hidden_width(self) -> int:
        """The hidden width in use."""
        default = {
            "mlp": self.width_out * self.tokens // 2,
            "transformer": 2 * self.width_out,
            "ffn": 4 * self.width_in,
        }
        return self.hidden or default[self.kind]

    def output_tokens(self, visual_tokens: int) -> int:
        """Returns m, the number of embeddings made from n visual tokens."""
        return visual_tokens if self.kind == "ffn" else self.tokens


class MLPMapper(nn.Module):
    """ClipCap's MLP: one image feature -> hidden -> `tokens` embeddings; 31,468,800 parameters at 512-3840-7680."""

    config: STConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.up = nn.Dense(c.hidden_width, kernel_init=LINEAR_INIT, dtype=c.dtype)
        self.down = nn.Dense(c.width_out * c.tokens, kernel_init=LINEAR_INIT, dtype=c.dtype)

    def __call__(self, seen: Float[Array, "b n v"]) -> Float[Array, "b m d"]:
        """Maps token 0 of each image."""
        x = self.down(ACTIVATIONS[self.config.activation_name](self.up(seen[:, 0])))
        return x.reshape(x.shape[0], self.config.tokens, self.config.width_out)


class TransformerMapper(nn.Module):
    """ClipCap's Transformer: tokens made from the image feature, then learned constants, whose outputs are kept."""

    config: STConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.linear = nn.Dense(c.clip_length * c.width_out, kernel_init=LINEAR_INIT, dtype=c.dtype)
        self.constant = self.param("constant", nn.initializers.normal(1.0), (c.tokens, c.width_out))
        block = BlockConfig(
            width=c.width_out,
            heads=c.heads,
            mlp=c.hidden_width,
            activation=c.activation_name,
            qkv_bias=False,
            init=LINEAR_INIT,
            residual_init=LINEAR_INIT,
            dtype=c.dtype,
        )
        self.blocks = make_blocks(block, c.layers, scan=False, remat="none")

    def __call__(self, seen: Float[Array, "b n v"]) -> Float[Array, "b m d"]:
        """Maps token 0 of each image."""
        c, b = self.config, seen.shape[0]
        image = self.linear(seen[:, 0]).reshape(b, c.clip_length, c.width_out)
        constants = jnp.broadcast_to(self.constant.astype(image.dtype), (b, c.tokens, c.width_out))
        x, _ = run_blocks(self.blocks, jnp.concatenate([image, constants], axis=1))
        return x[:, c.clip_length :]


class FFN(nn.Module):
    """EIM's ST: a two-layer feed-forward network on every visual token; 4,722,432 parameters at 768 -> 3072 -> 768."""

    config: STConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.up = nn.Dense(c.hidden_width, kernel_init=LINEAR_INIT, dtype=c.dtype)
        self.down = nn.Dense(c.width_out, kernel_init=LINEAR_INIT, dtype=c.dtype)

    def __call__(self, seen: Float[Array, "b n v"]) -> Float[Array, "b n d"]:
        """Maps every token."""
        return self.down(ACTIVATIONS[self.config.activation_name](self.up(seen)))


def make_st(config: STConfig) -> nn.Module:
    """Returns the ST of the given kind, a module from [b n width_in] to [b m width_out]."""
    return {"mlp": MLPMapper, "transformer": TransformerMapper, "ffn": FFN}[config.kind](config)

"""The semantic-space transformation network (ST) between CLIP and the LM, as ClipCap, EIM, LaVIN and LLaMA-Adapter do.

ClipCap has two mappers of one image feature, EIM and LaVIN a two-layer network on every visual token, LLaMA-Adapter
learned queries that read the visual tokens.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eim_jax.config import Config, ConfigError
from eim_jax.models.layers import ACTIVATIONS, BlockConfig, layer_norm, uniform_bias, zero_bias
from eim_jax.models.linear import Dense
from eim_jax.models.stacks import make_blocks, run_blocks

# torch.nn.Linear's own initialisation, U(+-1/sqrt(fan_in)), from which ClipCap's mappers start.
LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# config.arm.*.st_bias -> (fan-in -> the biases' initialiser).
BIASES = {"zeros": zero_bias, "uniform": uniform_bias}


@dataclasses.dataclass(frozen=True)
class STConfig:
    """Shape of an ST.

    Attributes:
      kind: "mlp" and "transformer" are ClipCap's mappers from one image feature to `tokens` embeddings; "ffn" is EIM's
        and "projector" LaVIN's, which map every visual token by itself; "queries" is LLaMA-Adapter's, whose `tokens`
        learned queries attend to all visual tokens.
      width_in: width of what CLIP gives (joint space for ClipCap, CLIP.visual's width for the others).
      width_out: the LM's width.
      tokens: output tokens of the mappers and of the queries (the others give as many as they get).
      hidden: width inside; 0 for the kind's own.
      layers, heads: of the kinds that are Transformers; 0 for the kind's own.
      clip_length: tokens that the "transformer" makes from the image feature.
      activation: None for the kind's own.
      bias: how biases start, a name in BIASES.
    """

    kind: str = "ffn"
    width_in: int = 768
    width_out: int = 768
    tokens: int = 10
    hidden: int = 0
    layers: int = 0
    heads: int = 0
    clip_length: int = 10
    activation: str | None = None
    bias: str = "zeros"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):  # noqa: D105
        if self.kind not in ST_KINDS:
            raise ValueError(f"ST kind {self.kind!r} is not one of {sorted(ST_KINDS)}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        layers, heads = ST_KINDS[self.kind].depth
        object.__setattr__(self, "layers", self.layers or layers)
        object.__setattr__(self, "heads", self.heads or heads)

    @property
    def bias_init(self) -> Callable[[int], Callable]:
        """How the biases of a layer of some fan-in start."""
        return BIASES[self.bias]

    @property
    def activation_name(self) -> str:
        """The activation in use."""
        return self.activation or ST_KINDS[self.kind].activation

    @property
    def hidden_width(self) -> int:
        """The hidden width in use."""
        return self.hidden or ST_KINDS[self.kind].hidden(self)


class MLPMapper(nn.Module):
    """ClipCap's MLP: one image feature -> hidden -> `tokens` embeddings; 31,468,800 parameters at 512-3840-7680."""

    config: STConfig

    def setup(self):  # noqa: D102
        c = self.config
        bias, hidden = c.bias_init, c.hidden_width
        self.up = Dense(hidden, kernel_init=LINEAR_INIT, bias_init=bias(c.width_in), dtype=c.dtype)
        self.down = Dense(c.width_out * c.tokens, kernel_init=LINEAR_INIT, bias_init=bias(hidden), dtype=c.dtype)

    def __call__(self, seen: Float[Array, "b n v"]) -> Float[Array, "b m d"]:
        """Maps token 0 of each image."""
        x = self.down(ACTIVATIONS[self.config.activation_name](self.up(seen[:, 0])))
        return x.reshape(x.shape[0], self.config.tokens, self.config.width_out)


class TransformerMapper(nn.Module):
    """ClipCap's Transformer: tokens made from the image feature, then learned constants, whose outputs are kept."""

    config: STConfig

    def setup(self):  # noqa: D102
        c = self.config
        bias = c.bias_init(c.width_in)
        self.linear = Dense(c.clip_length * c.width_out, kernel_init=LINEAR_INIT, bias_init=bias, dtype=c.dtype)
        self.constant = self.param("constant", nn.initializers.normal(1.0), (c.tokens, c.width_out))
        block = BlockConfig(
            width=c.width_out,
            heads=c.heads,
            mlp=c.hidden_width,
            activation=c.activation_name,
            qkv_bias=False,
            init=LINEAR_INIT,
            residual_init=LINEAR_INIT,
            bias_init=c.bias_init,
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
    """A two-layer feed-forward network on every visual token.

    EIM's ST has 4,722,432 parameters at 768 -> 3072 -> 768 with GELU, LaVIN's projector 659,584 at 1024 -> 128 -> 4096
    with SiLU and Xavier's initialisation.
    """

    config: STConfig
    kernel_init: Callable = LINEAR_INIT

    def setup(self):  # noqa: D102
        c = self.config
        bias, hidden = c.bias_init, c.hidden_width
        self.up = Dense(hidden, kernel_init=self.kernel_init, bias_init=bias(c.width_in), dtype=c.dtype)
        self.down = Dense(c.width_out, kernel_init=self.kernel_init, bias_init=bias(hidden), dtype=c.dtype)

    def __call__(self, seen: Float[Array, "b n v"]) -> Float[Array, "b n d"]:
        """Maps every token."""
        return self.down(ACTIVATIONS[self.config.activation_name](self.up(seen)))


class QueryMapper(nn.Module):
    """LLaMA-Adapter's ST: learned queries in front of the visual tokens, ViT blocks over both, the queries' outputs.

    8,814,080 parameters at 768 -> 512 -> 4096 with 2 blocks (8,945,152 from 1024), 60,460,800 at 768 -> 768 -> 4096
    with 8. The queries start from N(0, 1), as torch.nn.Embedding does.
    """

    config: STConfig

    def setup(self):  # noqa: D102
        c, width = self.config, self.config.hidden_width
        bias = c.bias_init
        self.down = Dense(width, kernel_init=LINEAR_INIT, bias_init=bias(c.width_in), dtype=c.dtype)
        self.ln_in = layer_norm(1e-5, c.dtype)
        self.queries = self.param("queries", nn.initializers.normal(1.0), (c.tokens, width))
        block = BlockConfig(
            width=width,
            heads=c.heads,
            mlp=4 * width,
            activation=c.activation_name,
            init=LINEAR_INIT,
            residual_init=LINEAR_INIT,
            bias_init=c.bias_init,
            dtype=c.dtype,
        )
        self.blocks = make_blocks(block, c.layers, scan=False, remat="none")
        self.up = Dense(c.width_out, kernel_init=LINEAR_INIT, bias_init=bias(width), dtype=c.dtype)
        self.ln_out = layer_norm(1e-5, c.dtype)

    def __call__(self, seen: Float[Array, "b n v"]) -> Float[Array, "b m d"]:
        """Reads all tokens of each image."""
        c = self.config
        image = self.ln_in(self.down(seen))
        queries = jnp.broadcast_to(self.queries.astype(image.dtype), (image.shape[0], *self.queries.shape))
        x, _ = run_blocks(self.blocks, jnp.concatenate([queries, image], axis=1))
        return self.ln_out(self.up(x[:, : c.tokens]))


@dataclasses.dataclass(frozen=True)
class STKind:
    """A kind of ST; an entry of `ST_KINDS`.

    Attributes:
      build: STConfig -> module from [b n width_in] to [b m width_out].
      activation: the default, a name in layers.ACTIVATIONS.
      hidden: STConfig -> the default width inside.
      depth: the default layers and heads, of a Transformer.
      reads_one: it maps the first visual token alone, so config.arm.*.features must be "cls".
      token_mlp: it is two layers ("up", "down") on each token by itself, as LLaVA's connector is.
      sized_by_arm: config.arm.*.st_hidden sets its width inside; otherwise it keeps its own.
    """

    build: Callable[[STConfig], nn.Module]
    activation: str
    hidden: Callable[[STConfig], int]
    depth: tuple[int, int] = (0, 0)
    reads_one: bool = False
    token_mlp: bool = False
    sized_by_arm: bool = True


def _make_projector(config: STConfig) -> nn.Module:
    return FFN(config, nn.initializers.xavier_uniform())


# config.arm.*.st -> the kind; from outside the package, ST_KINDS["mine"] = STKind(...) adds one.
ST_KINDS: dict[str, STKind] = {
    "ffn": STKind(FFN, "gelu", lambda c: 4 * c.width_in, token_mlp=True),
    "mlp": STKind(MLPMapper, "tanh", lambda c: c.width_out * c.tokens // 2, reads_one=True, sized_by_arm=False),
    "transformer": STKind(
        TransformerMapper, "relu", lambda c: 2 * c.width_out, (8, 8), reads_one=True, sized_by_arm=False
    ),
    "projector": STKind(_make_projector, "silu", lambda c: 128, token_mlp=True),
    "queries": STKind(QueryMapper, "gelu", lambda c: 512, (2, 16)),
}


def make_st(config: STConfig) -> nn.Module:
    """Returns the ST of the given kind, a module from [b n width_in] to [b m width_out].

    >>> import jax, jax.numpy as jnp
    >>> st = make_st(STConfig("ffn", width_in=6, width_out=8))
    >>> jax.eval_shape(lambda x: st.init_with_output(jax.random.key(0), x)[0], jnp.ones((2, 5, 6))).shape
    (2, 5, 8)
    """
    return ST_KINDS[config.kind].build(config)


def check(config: Config) -> None:
    """Raises ConfigError where an arm names no kind of ST, or gives one more tokens than it reads."""
    for name, arm in config.arm.items():
        if arm.st not in ST_KINDS:
            raise ConfigError(f"config.arm.{name}.st: {arm.st!r} is none of {', '.join(ST_KINDS)}")
    for name in config.arms:
        arm = config.arm[name]
        if ST_KINDS[arm.st].reads_one and arm.features != "cls":
            raise ConfigError(f"config.arm.{name}.st: {arm.st!r} maps one token: set config.arm.{name}.features='cls'")

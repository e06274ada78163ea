"""CLIP's two towers: images to [CLS] and patch features, captions to the [EOS] feature."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eim_jax.models.adapters.adapter import Adapter
from eim_jax.models.adapters.prompts import DeepPrompts
from eim_jax.models.layers import BlockConfig, causal_mask, layer_norm
from eim_jax.models.stacks import first_tokens, make_blocks, run_blocks
from eim_jax.models.vision.features import FEATURES, select
from eim_jax.models.vision.patches import flat_patches
from eim_jax.utils.images import CLIP_MEAN, CLIP_STD

EVERY = 4  # features="blocks": the [CLS] row after every fourth block


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of a CLIP vision tower; the defaults are ViT-B/32.

    Attributes:
      joint: width of the joint space, the output projection's result.
      activation: "quick_gelu" (OpenAI's weights), "gelu" (most OpenCLIP weights) or "gelu_new" (its tanh form).
      prompts: deep prompt tokens at every block's input; 0 for none.
      prompt_hidden: width of the prompts' re-parametrising MLPs; 0 for plain prompt tokens.
      adapter: an adapter's object (models/adapters) on every block's attention input, which sees each image alone.
      mean, std: the channel statistics by which images in [0, 1] are normalised before `tokens`.
      scan: stack the blocks' parameters and scan over them.
      remat: "none", "full" or "dots" (stacks.REMAT_POLICIES).
      attention: a name in attention.ATTENTIONS.
      model_type: the family whose files hold it (models/vision.VISION_TOWERS).
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    joint: int = 512
    activation: Literal["quick_gelu", "gelu", "gelu_new"] = "quick_gelu"
    eps: float = 1e-5
    prompts: int = 0
    prompt_hidden: int = 0
    adapter: Adapter | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    # Not in the repr, by which caches of features know their tower.
    model_type: str = dataclasses.field(default="clip", repr=False)

    def __post_init__(self):  # noqa: D105
        if self.adapter is not None:
            self.adapter.check(self.width, self.layers)

    @property
    def tokens(self) -> int:
        """Number of visual tokens: [CLS] and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a CLIP text tower; the defaults are ViT-B/32's.

    Attributes:
      eos_id: the token whose first position is pooled; None pools each row at its largest id, as transformers does for
        OpenAI's configs, whose eos_token_id 2 is not their [EOS].
    """

    vocab: int = 49408
    context: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp: int = 2048
    joint: int = 512
    activation: Literal["quick_gelu", "gelu", "gelu_new"] = "quick_gelu"
    eps: float = 1e-5
    eos_id: int | None = 49407
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    model_type: str = dataclasses.field(default="clip", repr=False)


def _block_config(c: CLIPVisionConfig | CLIPTextConfig) -> BlockConfig:
    init = nn.initializers.normal(c.width**-0.5)
    residual = nn.initializers.normal(c.width**-0.5 * (2 * c.layers) ** -0.5)
    return BlockConfig(
        c.width,
        c.heads,
        c.mlp,
        c.activation,
        c.eps,
        adapter=c.adapter if isinstance(c, CLIPVisionConfig) else None,
        init=init,
        residual_init=residual,
        attention=c.attention,
        dtype=c.dtype,
    )


class CLIPVision(nn.Module):
    """CLIP's vision Transformer, a VisionTower; its output layer (post_ln and projection) is a step of its own."""

    config: CLIPVisionConfig
    has_cls: ClassVar[bool] = True
    features: ClassVar[tuple[str, ...]] = (*FEATURES, "blocks")

    def setup(self):  # noqa: D102
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        self.class_embedding = self.param("class_embedding", init, (c.width,))
        self.patch_embedding = nn.DenseGeneral(c.width, axis=(-3, -2, -1), use_bias=False, dtype=c.dtype)
        self.position_embedding = self.param("position_embedding", init, (c.tokens, c.width))
        self.pre_ln = layer_norm(c.eps, c.dtype)
        self.blocks = make_blocks(_block_config(c), c.layers, scan=c.scan, remat=c.remat)
        self.post_ln = layer_norm(c.eps, c.dtype)
        self.projection = nn.Dense(c.joint, use_bias=False, dtype=c.dtype, kernel_init=init)
        if c.prompts:
            self.prompt = DeepPrompts(c.layers, c.prompts, c.width, c.prompt_hidden)
        if c.adapter is not None:
            self.adapter = c.adapter.vision_parameters(c.layers, c.width)

    def tokens(
        self, pixels: Float[Array, "b h w 3"], features: str = "full", train: bool = False
    ) -> Float[Array, "b n v"]:
        """Returns visual tokens before the output layer (EIM, "CLIP features").

        Args:
          pixels: images of config.image_size, normalised by config.mean and config.std.
          features: which of them (`features.select`), or "blocks": [CLS] after every fourth block, stock LaVIN's.
          train: the adapter's dropout is on; needs the rng "dropout".

        Raises:
          ValueError: images of another size, or an unknown choice.
        """
        if features == "blocks":
            return self.cls_of_blocks(pixels, EVERY, train)
        return select(run_blocks(self.blocks, self._embed(pixels), train=train, **self._steering())[0], features)

    def pooled(self, tokens: Float[Array, "b n v"], features: str = "full") -> Float[Array, "b v"]:
        """Returns [CLS] as the last block leaves it, from what `tokens` gave for these features."""
        return tokens[:, -1] if features == "blocks" else tokens[:, 0]

    def cls_of_blocks(
        self, pixels: Float[Array, "b h w 3"], every: int = 4, train: bool = False
    ) -> Float[Array, "b n v"]:
        """Returns [CLS] of the residual stream after blocks every, 2 every, ... (LaVIN: six tokens of ViT-L/14).

        Neither ln_post nor the projection is applied. The arguments are those of `tokens`.

        Raises:
          ValueError: images of another size, or `every` outside 1..layers.
        """
        c = self.config
        if not 1 <= every <= c.layers:
            raise ValueError(f"every {every} is not among this CLIP's {c.layers} blocks")
        rows = first_tokens(self.blocks, self._embed(pixels), train=train, **self._steering())
        return rows[every - 1 :: every].transpose(1, 0, 2)

    def _steering(self) -> dict:
        """The added parameters by layer, as run_blocks takes them."""
        c = self.config
        return {
            "prompts": self.prompt().astype(c.dtype) if c.prompts else None,
            "leaves": self.adapter.leaves() if c.adapter is not None else None,
        }

    def _embed(self, pixels):
        """The first block's input [b n v]."""
        c = self.config
        patches = self.patch_embedding(flat_patches(pixels, c.image_size, c.patch_size, "CLIP").astype(c.dtype))
        cls = jnp.broadcast_to(self.class_embedding.astype(c.dtype), (pixels.shape[0], 1, c.width))
        x = jnp.concatenate([cls, patches], axis=1) + self.position_embedding.astype(c.dtype)[None]
        return self.pre_ln(x)

    def project(self, tokens: Float[Array, "*n v"]) -> Float[Array, "*n j"]:
        """Returns the output layer's view of tokens, in the joint space of image and text."""
        return self.projection(self.post_ln(tokens))

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n v"], Float[Array, "b j"]]:
        """Returns all tokens and the projected [CLS], CLIP's image feature (not normalised)."""
        tokens = self.tokens(pixels)
        return tokens, self.project(self.pooled(tokens))


class CLIPText(nn.Module):
    """CLIP's causal text Transformer, a TextTower; EIM uses it only to build the caption queue K_t."""

    config: CLIPTextConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.token_embedding = nn.Embed(c.vocab, c.width, embedding_init=nn.initializers.normal(0.02), dtype=c.dtype)
        self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.01), (c.context, c.width))
        self.blocks = make_blocks(_block_config(c), c.layers, scan=c.scan, remat=c.remat)
        self.final_ln = layer_norm(c.eps, c.dtype)
        init = nn.initializers.normal(c.width**-0.5)
        self.projection = nn.Dense(c.joint, use_bias=False, dtype=c.dtype, kernel_init=init)

    def hidden(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s w"]:
        """Returns every position's feature after the final LayerNorm."""
        c, s = self.config, tokens.shape[1]
        if s > c.context:
            raise ValueError(f"{s} tokens do not fit CLIP's context of {c.context}")
        x = self.token_embedding(tokens) + self.position_embedding[:s].astype(c.dtype)[None]
        x, _ = run_blocks(self.blocks, x, mask=causal_mask(s))
        return self.final_ln(x)

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """Returns what `encode` does."""
        return self.encode(tokens)

    def encode(self, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """Returns the projected feature of each row's first [EOS], CLIP's text feature (not normalised).

        Under jit, where no value can be looked at, the feature of a row without [EOS] is NaN.

        Raises:
          ValueError: a row has no [EOS], so that nothing says which position is the text's.
        """
        eos = self.config.eos_id
        if eos is None:
            return self._project_at(tokens, jnp.argmax(tokens, axis=1))
        ends = tokens == eos
        has_end = ends.any(axis=1)
        if not isinstance(has_end, Tracer) and not self.is_initializing() and not has_end.all():
            row = int(jnp.argmin(has_end))
            raise ValueError(f"row {row} of the texts has no EOS token (id {eos}): end it with one")
        return jnp.where(has_end[:, None], self._project_at(tokens, jnp.argmax(ends, axis=1)), jnp.nan)

    def _project_at(self, tokens, place):
        return self.projection(jnp.take_along_axis(self.hidden(tokens), place[:, None, None], axis=1)[:, 0])

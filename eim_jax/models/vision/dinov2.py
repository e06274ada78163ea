"""DINOv2's vision tower: images to [CLS] and patch features, trained without texts (Oquab et al., 2023).

There is no text tower and no joint space: where a run names a text tower of another model, a projection that is drawn
by the seed takes [CLS] to that tower's space, and some stage trains it.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eim_jax.models.adapters.adapter import Adapter
from eim_jax.models.adapters.prompts import DeepPrompts
from eim_jax.models.layers import BlockConfig, layer_norm
from eim_jax.models.stacks import make_blocks, run_blocks
from eim_jax.models.vision.features import FEATURES, select
from eim_jax.models.vision.patches import flat_patches
from eim_jax.utils.images import IMAGENET_MEAN, IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Shape of a DINOv2 tower; the defaults are ViT-B/14's, as it is given out (positions for 518 pixels).

    Attributes:
      joint: width of the space of another model's text tower; 0 without one.
      gated: the MLP is a SwiGLU of width `mlp` (ViT-g/14).
      others: those of CLIPVisionConfig.
    """

    image_size: int = 518
    patch_size: int = 14
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    joint: int = 0
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    eps: float = 1e-6
    prompts: int = 0
    prompt_hidden: int = 0
    adapter: Adapter | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    model_type: str = "dinov2"

    def __post_init__(self):  # noqa: D105
        if self.adapter is not None:
            self.adapter.check(self.width, self.layers)

    @property
    def tokens(self) -> int:
        """Number of visual tokens: [CLS] and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


class DINOv2(nn.Module):
    """DINOv2's vision Transformer, a VisionTower: its tokens are transformers' `last_hidden_state`."""

    config: DINOv2Config
    has_cls: ClassVar[bool] = True
    features: ClassVar[tuple[str, ...]] = FEATURES

    def setup(self):  # noqa: D102
        c = self.config
        init = nn.initializers.normal(0.02)
        self.class_embedding = self.param("class_embedding", init, (c.width,))
        self.patch_embedding = nn.DenseGeneral(c.width, axis=(-3, -2, -1), dtype=c.dtype)
        self.position_embedding = self.param("position_embedding", init, (c.tokens, c.width))
        block = BlockConfig(
            c.width,
            c.heads,
            c.mlp,
            c.activation,
            c.eps,
            qkv_bias=c.qkv_bias,
            gated=c.gated,
            layer_scale=True,
            adapter=c.adapter,
            attention=c.attention,
            dtype=c.dtype,
        )
        self.blocks = make_blocks(block, c.layers, scan=c.scan, remat=c.remat)
        self.post_ln = layer_norm(c.eps, c.dtype)
        if c.joint:
            self.projection = nn.Dense(
                c.joint, use_bias=False, dtype=c.dtype, kernel_init=nn.initializers.normal(c.width**-0.5)
            )
        if c.prompts:
            self.prompt = DeepPrompts(c.layers, c.prompts, c.width, c.prompt_hidden)
        if c.adapter is not None:
            self.adapter = c.adapter.vision_parameters(c.layers, c.width)

    def tokens(
        self, pixels: Float[Array, "b h w 3"], features: str = "full", train: bool = False
    ) -> Float[Array, "b n v"]:
        """Returns the visual tokens after the last LayerNorm.

        Args:
          pixels: images of config.image_size, normalised by config.mean and config.std.
          features: which of them (`features.select`).
          train: the adapter's dropout is on; needs the rng "dropout".

        Raises:
          ValueError: images of another size, or an unknown choice.
        """
        c = self.config
        patches = self.patch_embedding(flat_patches(pixels, c.image_size, c.patch_size, "DINOv2").astype(c.dtype))
        cls = jnp.broadcast_to(self.class_embedding.astype(c.dtype), (pixels.shape[0], 1, c.width))
        x = jnp.concatenate([cls, patches], axis=1) + self.position_embedding.astype(c.dtype)[None]
        prompts = self.prompt().astype(c.dtype) if c.prompts else None
        leaves = self.adapter.leaves() if c.adapter is not None else None
        x, _ = run_blocks(self.blocks, x, train=train, prompts=prompts, leaves=leaves)
        return select(self.post_ln(x), features)

    def pooled(self, tokens: Float[Array, "b n v"], features: str = "full") -> Float[Array, "b v"]:
        """Returns [CLS], which every choice of features keeps."""
        return tokens[:, 0]

    def project(self, tokens: Float[Array, "*n v"]) -> Float[Array, "*n j"]:
        """Returns the view of tokens in another model's joint space; the tokens themselves where there is none."""
        return self.projection(tokens) if self.config.joint else tokens

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n v"], Float[Array, "b j"]]:
        """Returns all tokens and the projected [CLS]."""
        tokens = self.tokens(pixels)
        return tokens, self.project(self.pooled(tokens))

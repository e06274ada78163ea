"""CLIP's two towers: images to [CLS] and patch features, captions to the [EOS] feature."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eim_jax.models.layers import BlockConfig, causal_mask, layer_norm, make_blocks, run_blocks
from eim_jax.models.peft import DeepPrompts, fold_prompts

__all__ = ["CLIPText", "CLIPTextConfig", "CLIPVision", "CLIPVisionConfig", "fold_prompts"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of a CLIP vision tower; the defaults are ViT-B/32.

    Attributes:
      joint: width of the joint space, the output projection's result.
      activation: "quick_gelu" (OpenAI's weights) or "gelu" (most OpenCLIP weights).
      prompts: deep prompt tokens at every block's input; 0 for none.
      prompt_hidden: width of the prompts' re-parametrising MLPs; 0 for plain prompt tokens.
      mean, std: the channel statistics by which images in [0, 1] are normalised before `see`.
      scan: stack the blocks' parameters and scan over them.
      remat: "none", "full" or "dots" (layers.REMAT_POLICIES).
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    joint: int = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    prompts: int = 0
    prompt_hidden: int = 0
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @property
    def tokens(self) -> int:
        """Number of visual tokens: [CLS] and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a CLIP text tower; the defaults are ViT-B/32's. `eos_id` marks the position that is pooled."""

    vocab: int = 49408
    context: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp: int = 2048
    joint: int = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    eos_id: int = 49407
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32


def _block_config(c: CLIPVisionConfig | CLIPTextConfig) -> BlockConfig:
    init = nn.initializers.normal(c.width**-0.5)
    residual = nn.initializers.normal(c.width**-0.5 * (2 * c.layers) ** -0.5)
    return BlockConfig(c.width, c.heads, c.mlp, c.activation, c.eps, init=init, residual_init=residual, dtype=c.dtype)


class CLIPVision(nn.Module):
    """CLIP's vision Transformer, with its output layer (post_ln and projection) as a step of its own."""

    config: CLIPVisionConfig

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

    def see(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n v"]:
        """Returns [CLS] and all patch features before the output layer (EIM, "CLIP features").

        Args:
          pixels: images of config.image_size, normalised by config.mean and config.std.
        """
        c = self.config
        if pixels.shape[1:3] != (c.image_size, c.image_size):
            raise ValueError(f"images are {pixels.shape[1:3]}, this CLIP sees {c.image_size} x {c.image_size}")
        b, p, side = pixels.shape[0], c.patch_size, c.image_size // c.patch_size
        # A convolution whose stride is its kernel size is one matmul over the patches.
        patches = pixels[:, : side * p, : side * p].reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = self.patch_embedding(patches.reshape(b, side * side, p, p, 3).astype(c.dtype))
        cls = jnp.broadcast_to(self.class_embedding.astype(c.dtype), (b, 1, c.width))
        x = jnp.concatenate([cls, patches], axis=1) + self.position_embedding.astype(c.dtype)[None]
        prompts = self.prompt().astype(c.dtype) if c.prompts else None
        x, _ = run_blocks(self.blocks, self.pre_ln(x), prompts=prompts)
        return x

    def project(self, seen: Float[Array, "*tokens v"]) -> Float[Array, "*tokens j"]:
        """Returns the output layer's view of `see`'s tokens, in the joint space of image and text."""
        return self.projection(self.post_ln(seen))

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n v"], Float[Array, "b j"]]:
        """Returns `see`'s tokens and the projected [CLS], CLIP's image feature (not normalised)."""
        seen = self.see(pixels)
        return seen, self.project(seen[:, 0])


class CLIPText(nn.Module):
    """CLIP's causal text Transformer; EIM uses it only to build the caption queue K_t."""

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
        """Returns the projected feature of each row's first [EOS], CLIP's text feature (not normalised).

        A row without [EOS] is pooled at position 0, as in transformers.
        """
        eos = jnp.argmax(tokens == self.config.eos_id, axis=1)
        pooled = jnp.take_along_axis(self.hidden(tokens), eos[:, None, None], axis=1)[:, 0]
        return self.projection(pooled)

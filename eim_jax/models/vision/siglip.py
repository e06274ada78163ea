"""SigLIP's two towers: images to patch features and one attention-pooled vector, captions to the last token's feature.

SigLIP 2 in its form of a fixed resolution has the same modules. Neither tower has a projection: the joint space is the
pooled vector's own (Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eim_jax.models.adapters.adapter import Adapter
from eim_jax.models.adapters.prompts import DeepPrompts
from eim_jax.models.layers import MLP, BlockConfig, layer_norm
from eim_jax.models.linear import Dense, DenseGeneral
from eim_jax.models.stacks import make_blocks, run_blocks
from eim_jax.models.vision.features import grid
from eim_jax.models.vision.patches import flat_patches

HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and standard deviation of every channel


@dataclasses.dataclass(frozen=True)
class SigLIPVisionConfig:
    """Shape of a SigLIP vision tower; the defaults are B/16's at 224 pixels, the fields CLIPVisionConfig's."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = "gelu_new"
    eps: float = 1e-6
    prompts: int = 0
    prompt_hidden: int = 0
    adapter: Adapter | None = None
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    model_type: str = "siglip"

    @property
    def joint(self) -> int:
        """Width of the joint space, which is the tower's."""
        return self.width

    @property
    def tokens(self) -> int:
        """Number of visual tokens, which are the patches."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class SigLIPTextConfig:
    """Shape of a SigLIP text tower; the defaults are B/16's. `joint` is its head's width."""

    vocab: int = 32000
    context: int = 64
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    joint: int = 768
    activation: str = "gelu_new"
    eps: float = 1e-6
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    model_type: str = "siglip"


def block_config(c: SigLIPVisionConfig | SigLIPTextConfig) -> BlockConfig:
    """Returns the shape of every block of a tower."""
    return BlockConfig(c.width, c.heads, c.mlp, c.activation, c.eps, attention=c.attention, dtype=c.dtype)


class AttentionPooling(nn.Module):
    """One vector of an image: a learned query attends to all patches, then a residual MLP.

    The maps of query, key and value are one leaf [v, 3, v], as they are one tensor in the files.
    """

    config: SigLIPVisionConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.probe = self.param("probe", nn.initializers.normal(0.02), (c.width,))
        self.qkv = DenseGeneral((3, c.width), dtype=c.dtype)
        self.out = Dense(c.width, dtype=c.dtype)
        self.ln = layer_norm(c.eps, c.dtype)
        self.mlp = MLP(block_config(c))

    def __call__(self, tokens: Float[Array, "b n v"]) -> Float[Array, "b v"]:
        """Returns the pooled vector."""
        heads = self.config.heads
        query = self.qkv(self.probe.astype(self.config.dtype)[None])[0, 0].reshape(heads, -1)
        keys = self.qkv(tokens).reshape(*tokens.shape[:2], 3, heads, -1)
        scaled = query * query.shape[-1] ** -0.5
        logits = jnp.einsum("he,bnhe->bhn", scaled, keys[:, :, 1], preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(keys.dtype)
        x = self.out(jnp.einsum("bhn,bnhe->bhe", weights, keys[:, :, 2]).reshape(tokens.shape[0], 1, -1))
        return (x + self.mlp(self.ln(x)))[:, 0]


class SigLIPVision(nn.Module):
    """SigLIP's vision Transformer, a VisionTower: its tokens are transformers' `last_hidden_state`."""

    config: SigLIPVisionConfig
    has_cls: ClassVar[bool] = False
    features: ClassVar[tuple[str, ...]] = ("full", "pooled", "grid")

    def setup(self):  # noqa: D102
        c = self.config
        self.patch_embedding = nn.DenseGeneral(c.width, axis=(-3, -2, -1), dtype=c.dtype)
        init = nn.initializers.normal(c.width**-0.5)
        self.position_embedding = self.param("position_embedding", init, (c.tokens, c.width))
        self.blocks = make_blocks(block_config(c), c.layers, scan=c.scan, remat=c.remat)
        self.post_ln = layer_norm(c.eps, c.dtype)
        self.pool = AttentionPooling(c)
        if c.prompts:
            self.prompt = DeepPrompts(c.layers, c.prompts, c.width, c.prompt_hidden)

    def tokens(
        self, pixels: Float[Array, "b h w 3"], features: str = "full", train: bool = False
    ) -> Float[Array, "b n v"]:
        """Returns the visual tokens after the last LayerNorm.

        Args:
          pixels: images of config.image_size, normalised by config.mean and config.std.
          features: "full" all patches; "pooled" the attention-pooled vector alone; "grid" that vector and the patches
            average-pooled to 7 x 7.
          train: without meaning here: nothing in the tower has dropout.

        Raises:
          ValueError: images of another size, or an unknown choice.
        """
        if features not in self.features:
            raise ValueError(f"features {features!r} is not one of {self.features}")
        c = self.config
        patches = flat_patches(pixels, c.image_size, c.patch_size, "SigLIP").astype(c.dtype)
        x = self.patch_embedding(patches) + self.position_embedding.astype(c.dtype)[None]
        prompts = self.prompt().astype(c.dtype) if c.prompts else None
        x = self.post_ln(run_blocks(self.blocks, x, train=train, prompts=prompts)[0])
        if features == "full":
            return x
        one = self.pool(x)[:, None]
        return one if features == "pooled" else jnp.concatenate([one, grid(x)], axis=1)

    def pooled(self, tokens: Float[Array, "b n v"], features: str = "full") -> Float[Array, "b v"]:
        """Returns the attention-pooled vector, from what `tokens` gave for these features."""
        return self.pool(tokens) if features == "full" else tokens[:, 0]

    def project(self, tokens: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
        """Returns its argument: the joint space is the pooled vector's own."""
        return tokens

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n v"], Float[Array, "b v"]]:
        """Returns all tokens and the image feature (not normalised)."""
        tokens = self.tokens(pixels)
        return tokens, self.pooled(tokens)


class SigLIPText(nn.Module):
    """SigLIP's text Transformer, a TextTower: every place sees all, padding included, and the last one is read."""

    config: SigLIPTextConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.token_embedding = nn.Embed(c.vocab, c.width, embedding_init=nn.initializers.normal(0.02), dtype=c.dtype)
        self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.01), (c.context, c.width))
        self.blocks = make_blocks(block_config(c), c.layers, scan=c.scan, remat=c.remat)
        self.final_ln = layer_norm(c.eps, c.dtype)
        self.projection = Dense(c.joint, dtype=c.dtype)

    def hidden(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s w"]:
        """Returns every position's feature after the final LayerNorm."""
        c, s = self.config, tokens.shape[1]
        if s > c.context:
            raise ValueError(f"{s} tokens do not fit SigLIP's context of {c.context}")
        x = self.token_embedding(tokens) + self.position_embedding[:s].astype(c.dtype)[None]
        return self.final_ln(run_blocks(self.blocks, x)[0])

    def encode(self, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """Returns the head's view of the last place, SigLIP's text feature (not normalised)."""
        return self.projection(self.hidden(tokens)[:, -1])

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """Returns what `encode` does."""
        return self.encode(tokens)

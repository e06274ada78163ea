"""The towers and the connector as pure functions: see -> connect -> answer, and read for text alone.

There is no monolithic model: each stage composes only what its losses need (EIM section 3).
Parameters are one nested tree {"visual", "text", "st", "lm"}.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from eim_jax.data.image import normalise
from eim_jax.models.clip import CLIPText, CLIPVision
from eim_jax.models.gpt2 import GPT2


@dataclass(frozen=True)
class VLM:
    """CLIP.visual -> ST -> LM, with CLIP.text beside it for the caption queue; holds no parameters."""

    visual: CLIPVision
    text: CLIPText
    st: nn.Module
    lm: GPT2
    features: str = "full"  # full: [CLS] and patches go to the ST; cls: [CLS] alone
    output_layer: bool = False  # apply ln_post and the projection before the ST (stock ClipCap does, EIM does not)

    def see(self, params: dict, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b n v"]:
        """[CLS] and patch tokens before CLIP's output layer; with features="cls" [CLS] alone (n = 1)."""
        config = self.visual.config
        pixels = normalise(images, config.mean, config.std)
        seen = self.visual.apply({"params": params["visual"]}, pixels, method="see")
        return seen[:, :1] if self.features == "cls" else seen

    def project(self, params: dict, seen: Float[Array, "b n v"]) -> Float[Array, "b j"]:
        """[CLS] through CLIP's frozen output layer into the joint space: loss_IE's query (eim.md 6.3)."""
        return self.visual.apply({"params": params["visual"]}, seen[:, 0], method="project")

    def connect(self, params: dict, seen: Float[Array, "b n v"]) -> Float[Array, "b m d"]:
        """The ST's output tokens, in the LM's embedding space (Table 9's two switches choose its input)."""
        if self.output_layer:
            seen = self.visual.apply({"params": params["visual"]}, seen, method="project")
        return self.st.apply({"params": params["st"]}, seen)

    def embed(self, params: dict, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """LM_e: the LM's input embeddings."""
        return self.lm.apply({"params": params["lm"]}, tokens, method="embed")

    def read(
        self,
        params: dict,
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        visual: Float[Array, "b m d"] | None = None,
        has_image: Bool[Array, "b"] | None = None,
        dropout: Array | None = None,
    ) -> Float[Array, "b _ d"]:
        """LM_block's output over [visual tokens ;] text; `dropout` is a key, None = deterministic."""
        embeds = self.embed(params, tokens)
        positions = None
        if visual is not None:
            b, m, _ = visual.shape
            shown = jnp.ones((b, m), bool) if has_image is None else jnp.broadcast_to(has_image[:, None], (b, m))
            embeds = jnp.concatenate([visual.astype(embeds.dtype), embeds], axis=1)
            valid = jnp.concatenate([shown, valid], axis=1)
            if has_image is not None:  # a text-only row starts at position 0, its visual slots hidden
                positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        hidden, _ = self.lm.apply(
            {"params": params["lm"]},
            embeds,
            valid=valid,
            positions=positions,
            train=dropout is not None,
            method="hidden",
            rngs=None if dropout is None else {"dropout": dropout},
        )
        return hidden

    def answer(
        self,
        params: dict,
        visual: Float[Array, "b m d"],
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        has_image: Bool[Array, "b"] | None = None,
        dropout: Array | None = None,
    ) -> Float[Array, "b t V"]:
        """Logits where [:, i] predicts tokens[:, i], given the visual tokens and tokens[:, :i]."""
        hidden = self.read(params, tokens, valid, visual=visual, has_image=has_image, dropout=dropout)
        m = visual.shape[1]
        return self.logits(params, hidden[:, m - 1 : -1])

    def logits(self, params: dict, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Next-token logits in float32."""
        return self.lm.apply({"params": params["lm"]}, hidden, method="logits")

    def caption_feature(self, params: dict, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """[EOS] feature of CLIP.text: a row of K_t."""
        return self.text.apply({"params": params["text"]}, tokens)


def mean_tokens(values: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """Mean over the marked tokens, in float32."""
    mask = mask[..., None].astype(jnp.float32)
    return (values.astype(jnp.float32) * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)


def last_token(values: Float[Array, "b t d"], valid: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """The vector at each row's last valid token (the appended EOS)."""
    t = values.shape[1]
    last = jnp.max(jnp.where(valid, jnp.arange(t)[None], 0), axis=1)
    return jax.vmap(lambda row, i: row[i])(values, last)

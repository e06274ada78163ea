"""VIRAL: the visual tokens inside the LM are drawn to CLIP's, by a head that the loss brings along.

Yoon et al., Visual Representation Alignment for Multimodal Large Language Models (arXiv 2509.07979): beside loss_base,
with weight 0.5, the negative cosine between a middle layer's visual tokens, behind an MLP of three layers with SiLU,
and a frozen vision model's patch features. Theirs are DINOv2's or the model's own CLIP's; here they are those that the
ST reads, as constants, and 1 is added, so that 0 is the least.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eim_jax.config import Config, ConfigError, Losses
from eim_jax.losses.kinds import Forward
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM
from experiments.integration import block_outputs


class Head(nn.Module):
    """From the LM's width to the vision tower's."""

    hidden: int
    width: int

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Each token by itself."""
        tokens = nn.silu(nn.Dense(self.hidden, name="up")(tokens))
        tokens = nn.silu(nn.Dense(self.hidden, name="middle")(tokens))
        return nn.Dense(self.width, name="down")(tokens)


@dataclass(frozen=True)
class VisualAlignment:
    """loss_VRA: the mean over an image's tokens of 1 - cos(head(LM layer's token), CLIP's token).

    Args:
      hidden: the head's width (VIRAL: 2048).
    """

    hidden: int
    name: str = "viral"
    title: str = "loss_VRA"
    queue: None = None
    needs_image: bool = True
    unit: str = "1 - cosine"

    def drawn(self, vlm: VLM, key: Array) -> dict:
        """The head's parameters.

        Raises:
          ConfigError: the LM reads no visual tokens.
        """
        adapter = vlm.lm.config.adapter
        if adapter is not None and not adapter.visual_tokens:
            raise ConfigError(f"{self.title} draws the LM's visual tokens, and with this adapter it reads none")
        tokens = jnp.zeros((1, 1, vlm.lm.config.width))
        return self._head(vlm).init(key, tokens)["params"]

    def _head(self, vlm: VLM) -> Head:
        return Head(self.hidden, vlm.visual.config.width)

    def fields(self, settings: Losses) -> frozenset[str]:
        """Images alone: nothing that the LM reads before its text depends on the text."""
        return frozenset({"image", "has_image"})

    def normaliser(self, vlm: VLM, batch: Batch) -> Float[Array, ""]:
        """The rows with an image."""
        return jnp.float32(batch.read("has_image").sum())

    def value(self, forward: Forward, queue: Queue | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum over the rows with an image; nothing more to log.

        Raises:
          ConfigError: the ST does not give one token for each that it reads.
        """
        vlm, params, batch = forward.vlm, forward.params, forward.batch
        seen, visual = jax.lax.stop_gradient(forward.image_tokens), forward.connected
        if seen.shape[1] != visual.shape[1]:
            raise ConfigError(
                f"{self.title} compares token by token, and the ST makes {visual.shape[1]} of CLIP's {seen.shape[1]}: "
                "set config.arm.*.st='ffn'"
            )
        shown = batch.read("has_image")
        nothing = jnp.zeros((visual.shape[0], 0), jnp.int32)
        read = vlm.lm_input(params, nothing, nothing.astype(bool), visual=visual, has_image=shown)
        middle = block_outputs(vlm, params, read)[vlm.lm.config.layers // 2 - 1]
        found = self._head(vlm).apply(
            {"params": params["loss"][self.name]}, middle[:, -visual.shape[1] :].astype(jnp.float32)
        )
        cosine = (_unit(found) * _unit(seen.astype(jnp.float32))).sum(axis=-1)
        return jnp.where(shown, (1 - cosine).mean(axis=1), 0).sum(), {}

    def check(self, config: Config) -> None:
        """Takes any settings."""


def _unit(vectors: Float[Array, "b n v"]) -> Float[Array, "b n v"]:
    return vectors / jnp.sqrt(jnp.square(vectors).sum(axis=-1, keepdims=True) + 1e-12)

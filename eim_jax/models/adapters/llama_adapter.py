"""LLaMA-Adapter's prompts: keys and values of their own in the topmost layers, behind gates that start at zero."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from eim_jax.models.adapters.adapter import Adapter

if TYPE_CHECKING:
    from eim_jax.config import Arm, Decode


@dataclass(frozen=True)
class ZeroInit(Adapter):
    """LLaMA-Adapter's prompts with zero-initialised gates, on the topmost `layers` layers.

    Attributes:
      prompts: of each layer.
      layers: how many of the topmost layers have them.
      squashed: the gates pass through tanh; always in training.
      projected: the prompts' keys and values of all layers are made before the blocks run, once for all tokens that are
        generated. In training each block makes its own, where its maps are read anyhow.
    """

    title: ClassVar[str] = "LLaMA-Adapter's prompts"
    trained_leaf: ClassVar[str] = "tokens"
    visual_tokens: ClassVar[bool] = False  # they are added to the prompts
    decode_fields: ClassVar[tuple[str, ...]] = ("raw_gates",)

    prompts: int = 10
    layers: int = 30
    squashed: bool = True
    projected: bool = False

    @classmethod
    def from_arm(cls, arm: "Arm") -> "ZeroInit":
        """Returns the prompts with an arm's settings: as many as the ST gives tokens."""
        return cls(arm.st_tokens, arm.adapter_layers)

    def check(self, width: int, layers: int) -> None:
        """Raises ValueError when the tower has fewer layers."""
        if not 1 <= self.layers <= layers:
            raise ValueError(f"the adapter's {self.layers} topmost layers are not among {layers}")

    def in_generation(self, settings: "Decode") -> "ZeroInit":
        """Returns the prompts with gates as in training, or without tanh as in LLaMA-Adapter's v1 inference."""
        return replace(self, squashed=not settings.raw_gates, projected=True)

    def depth(self, layers: int) -> int:
        """Returns how many of the topmost layers have prompts."""
        return self.layers

    def lm_parameters(self, config: Any) -> nn.Module:
        """Returns the prompts and gates."""
        return PromptAdapter(self, config.width, config.heads)

    def steer(
        self, lm: Any, visual: Float[Array, "b m d"] | None, has_image: Bool[Array, "b"] | None
    ) -> Float[Array, "l #b K d"] | tuple[Float[Array, "l #b K kv e"], Float[Array, "l #b K kv e"]]:
        """Returns each of the topmost layers' prompts, to which the visual tokens are added.

        Where `projected`: their keys and values, as the frozen maps of each layer make them.

        Raises:
          ValueError: the number of visual tokens is not that of the prompts.
        """
        prompts = lm.adapter.tokens.astype(lm.config.dtype)[:, None]
        if visual is not None:
            if visual.shape[1] != self.prompts:
                raise ValueError(f"the ST gives {visual.shape[1]} tokens for {self.prompts} prompts: make them equal")
            if has_image is not None:
                visual = jnp.where(has_image[:, None, None], visual, 0)
            prompts = prompts + visual.astype(lm.config.dtype)[None]
        return lm.keys_values(prompts) if self.projected else prompts

    def attention_beside(
        self,
        leaf: Float[Array, "h"],
        row: Array | tuple[Array, Array],
        attend: Callable[[Array, Array], Array],
        project: Callable[[Array], tuple[Array, Array]],
    ) -> Float[Array, "b t kv g e"]:
        """Returns tanh(gate), or the gate where it is not `squashed`, times a softmax of its own over the prompts."""
        keys, values = project(row) if isinstance(row, jax.Array) else row
        mixed = attend(keys, values)
        gate = leaf.astype(jnp.float32)
        gate = (jnp.tanh(gate) if self.squashed else gate).astype(mixed.dtype)
        return gate.reshape(1, 1, mixed.shape[2], -1, 1) * mixed


class PromptAdapter(nn.Module):
    """LLaMA-Adapter's prompts and gates of the topmost layers: 1,229,760 parameters for 10 prompts in 30 layers of 7B.

    (The released file also holds gates of the two layers below, 1,229,824 in all; nothing reads them.)
    """

    config: ZeroInit
    width: int
    heads: int

    def setup(self):  # noqa: D102
        c = self.config
        self.tokens = self.param("tokens", nn.initializers.normal(1.0), (c.layers, c.prompts, self.width))
        self.gate = self.param("gate", nn.initializers.zeros, (c.layers, self.heads))

    def leaves(self) -> Float[Array, "layers h"]:
        """Returns the gates; the prompts enter as keys and values (`ZeroInit.steer`)."""
        return self.gate

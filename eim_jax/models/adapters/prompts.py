"""EIM's deep visual prompts: trained tokens beside those of the image in every block of a frozen vision tower."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class LayerDense(nn.Module):
    """One Dense a layer, stacked: kernel [L in out], bias [L out]."""

    layers: int
    width_in: int
    width_out: int

    def setup(self):  # noqa: D102
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        self.kernel = self.param("kernel", init, (self.layers, self.width_in, self.width_out))
        self.bias = self.param("bias", nn.initializers.zeros, (self.layers, self.width_out))

    def __call__(self, x: Float[Array, "layers p a"]) -> Float[Array, "layers p c"]:
        """Maps layer l's tokens by layer l's kernel."""
        return jnp.einsum("lpa,lac->lpc", x, self.kernel) + self.bias[:, None]


class DeepPrompts(nn.Module):
    """Prompt tokens for every block's input, optionally re-parametrised by an MLP a block.

    The paper gives the count of the prompt network (26.07M on ViT-B/32) but not its structure. Ours: 10 tokens a block
    and an MLP width -> 1408 -> width with tanh a block, 12 x (10 x 768 + MLP) = 26,070,528. `hidden` 0 leaves plain
    tokens.
    """

    layers: int
    prompts: int
    width: int
    hidden: int = 0

    def setup(self):  # noqa: D102
        shape = (self.layers, self.prompts, self.width)
        self.tokens = self.param("tokens", nn.initializers.normal(0.02), shape)
        if self.hidden:
            self.up = LayerDense(self.layers, self.width, self.hidden)
            self.down = LayerDense(self.layers, self.hidden, self.width)

    def __call__(self) -> Float[Array, "{self.layers} {self.prompts} {self.width}"]:
        """Returns each block's prompt tokens."""
        if not self.hidden:
            return self.tokens
        return self.down(jnp.tanh(self.up(self.tokens)))

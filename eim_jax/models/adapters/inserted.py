"""Parameters added to frozen towers: EIM's deep visual prompts, LaVIN's router adapters, LLaMA-Adapter's shape.

Each lives in one subtree of its tower ("visual/prompt", "visual/adapter", "lm/adapter") with a leading layer axis.
"""

import dataclasses
from collections.abc import Mapping

import jax
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


def fold_prompts(visual: dict) -> dict:
    """Returns CLIP.visual's parameters with the prompts' MLPs evaluated away: plain tokens, same output.

    The matching configuration is the old one with prompt_hidden=0. Parameters without MLPs come back as they are.

    Raises:
      KeyError: the tree holds no prompts.
    """
    if "prompt" not in visual:
        raise KeyError("these CLIP.visual parameters hold no prompts (no entry 'prompt')")
    prompt = visual["prompt"]
    if "up" not in prompt:
        return visual
    layers, tokens, width = prompt["tokens"].shape
    module = DeepPrompts(layers, tokens, width, hidden=prompt["up"]["bias"].shape[-1])
    return {**visual, "prompt": {"tokens": module.apply({"params": prompt})}}


@dataclasses.dataclass(frozen=True)
class Router:
    """LaVIN's mixture-of-modality adapter, one a layer on the attention's input.

    Attributes:
      rank: width inside (8 in LaVIN).
      groups: of the second linear map: its first width/groups outputs read the first rank/groups inputs, and so on.
      temperature: of the routing softmax (LaVIN: 10 for 7B, 5 for 13B).
      dropout: on the inner vector, in training.
    """

    rank: int = 8
    groups: int = 2
    temperature: float = 10.0
    dropout: float = 0.1

    def check(self, width: int) -> None:
        """Raises ValueError when the groups divide neither the rank nor a tower's width evenly."""
        if self.rank % self.groups or width % self.groups:
            raise ValueError(
                f"the adapter's {self.groups} groups must divide its rank {self.rank} and the width {width} evenly"
            )


@dataclasses.dataclass(frozen=True)
class ZeroInit:
    """LLaMA-Adapter's prompts with zero-initialised gates, on the topmost `layers` layers."""

    prompts: int = 10
    layers: int = 30


class RouterAdapter(nn.Module):
    """The leaves of a tower's router adapters, stacked over its layers: 20 x width + 10 a layer at rank 8."""

    layers: int
    width: int
    config: Router

    def setup(self):  # noqa: D102
        c, n, d = self.config, self.layers, self.width
        zeros = nn.initializers.zeros
        torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
        self.router = Leaves({"kernel": ((n, d, 2), torch_linear), "bias": ((n, 2), zeros)})
        xavier = nn.initializers.xavier_uniform(batch_axis=(0,))
        self.down = Leaves({"kernel": ((n, d, c.rank), xavier), "bias": ((n, c.rank), zeros)})
        up = (n, 2, c.groups, c.rank // c.groups, d // c.groups)
        self.up = Leaves({"kernel": (up, zeros), "bias": ((n, 2, d), zeros)})  # zeros: the identity at first

    def leaves(self) -> dict[str, dict[str, Array]]:
        """Returns {"router", "down", "up"}: {"kernel", "bias"}, each with a leading layer axis."""
        return {"router": self.router(), "down": self.down(), "up": self.up()}


class ModalityAdapter(RouterAdapter):
    """Router adapters of the LM with the embedding of the two modalities, 0 text only and 1 image, that route it."""

    def setup(self):  # noqa: D102
        super().setup()
        self.modality = self.param("modality", nn.initializers.normal(1.0), (2, self.width))


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
        """Returns the gates; the prompts enter as keys and values (Llama.steer)."""
        return self.gate


class Leaves(nn.Module):
    """Parameters by name; `shapes` maps each to (shape, initialiser)."""

    shapes: Mapping[str, tuple]

    def setup(self):  # noqa: D102
        self.values = {name: self.param(name, init, shape) for name, (shape, init) in self.shapes.items()}

    def __call__(self) -> dict[str, Array]:
        """Returns them."""
        return dict(self.values)


def route(leaf: Mapping, z0: Float[Array, "b d"], temperature: float) -> Float[Array, "b 2"]:
    """Returns one layer's routing weights softmax((W_r z_0 + b_r) / t), in float32 (LaVIN, equation 4)."""
    router = leaf["router"]
    logits = jnp.dot(z0.astype(jnp.float32), router["kernel"], precision="highest") + router["bias"][None]
    return jax.nn.softmax(logits / temperature, axis=-1)


def shrink(leaf: Mapping, z: Float[Array, "b t d"]) -> Float[Array, "b t r"]:
    """Returns one layer's inner vector A z + a, which both paths read."""
    down = leaf["down"]
    return z @ down["kernel"].astype(z.dtype) + down["bias"].astype(z.dtype)[None, None]


def mix(
    leaf: Mapping, z: Float[Array, "b t d"], u: Float[Array, "b t r"], w: Float[Array, "b 2"]
) -> Float[Array, "b t d"]:
    """Returns z + sum_k w_k (B_k u + b_k), the output of one layer's adapter (LaVIN, equations 3 and 5)."""
    up, (b, t, d) = leaf["up"], z.shape
    kernel = up["kernel"].astype(z.dtype)
    _, groups, width, _ = kernel.shape
    inner = u[:, :, None] * w.astype(z.dtype)[:, None, :, None]  # B_k (w_k u): one product serves both paths
    out = jnp.einsum("btkgi,kgio->btgo", inner.reshape(b, t, 2, groups, width), kernel).reshape(b, t, d)
    bias = jnp.dot(w, up["bias"], precision="highest").astype(z.dtype)
    return z + out + bias[:, None]

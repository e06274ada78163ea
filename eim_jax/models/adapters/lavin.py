"""LaVIN's mixture-of-modality adapter: a router a layer that mixes two paths by what the modality embedding says."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import Adapter, Markers
from eim_jax.models.adapters.folding import fold_router

if TYPE_CHECKING:
    from eim_jax.config import Arm, Decode


@dataclass(frozen=True)
class Router(Adapter):
    """LaVIN's mixture-of-modality adapter, one a layer on the attention's input.

    Attributes:
      rank: width inside (8 in LaVIN).
      groups: of the second linear map: its first width/groups outputs read the first rank/groups inputs, and so on.
      temperature: of the routing softmax (LaVIN: 10 for 7B, 5 for 13B).
      dropout: on the inner vector, in training.
      scale: factor of both paths (LaVIN's adapter_scale).
    """

    title: ClassVar[str] = "LaVIN's router"
    trained_leaf: ClassVar[str] = "up/kernel"
    unstacked: ClassVar[tuple[str, ...]] = ("modality",)
    first_position: ClassVar[int] = 1  # the modality row has position 0, though it is nowhere among the slots
    adapts_vision: ClassVar[bool] = True
    decode_fields: ClassVar[tuple[str, ...]] = ("rope",)

    rank: int = 8
    groups: int = 2
    temperature: float = 10.0
    dropout: float = 0.1
    scale: float = 1.0

    def __repr__(self) -> str:
        """Leaves a scale of 1 out: caches of features know their tower by its repr, and older ones lack the field."""
        shown = [f.name for f in dataclasses.fields(self) if f.name != "scale" or self.scale != 1.0]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @classmethod
    def from_arm(cls, arm: "Arm") -> "Router":
        """Returns the router with an arm's settings."""
        return cls(
            arm.adapter_rank,
            temperature=arm.adapter_temperature,
            dropout=arm.adapter_dropout,
            scale=arm.adapter_scale,
        )

    def in_vision(self, arm: "Arm") -> "Router":
        """Returns the router that each image's own first token steers, or LaVIN's own, which positions do."""
        return PositionRouter(**vars(self)) if arm.visual_routing == "position" else self

    def in_generation(self, settings: "Decode") -> "Router":
        """Returns the router with the positions of the training forward, or with those of LaVIN's generator."""
        return LateRouter(**vars(self)) if settings.rope == "lavin" else self

    def check(self, width: int, layers: int) -> None:
        """Raises ValueError when the groups divide neither the rank nor a tower's width evenly."""
        if self.rank % self.groups or width % self.groups:
            raise ValueError(
                f"the adapter's {self.groups} groups must divide its rank {self.rank} and the width {width} evenly"
            )

    def markers(self, tokenizer) -> Markers:
        """Returns the ids of "Image: " and "Image: N/A"."""
        return Markers(
            *(tuple(tokenizer(words, add_special_tokens=False)["input_ids"]) for words in ("Image: ", "Image: N/A"))
        )

    @property
    def dropout_rate(self) -> float:
        """The rate on the inner vector."""
        return self.dropout

    def lm_parameters(self, config: Any) -> nn.Module:
        """Returns the LM's adapters with the embedding of the two modalities."""
        return ModalityAdapter(config.layers, config.width, self)

    def vision_parameters(self, layers: int, width: int) -> nn.Module:
        """Returns a vision tower's adapters, which each image's own first token routes."""
        return RouterAdapter(layers, width, self)

    def steer(
        self, lm: Any, visual: Float[Array, "b m d"] | None, has_image: Bool[Array, "b"] | None
    ) -> Float[Array, "L b 2"]:
        """Returns every layer's routing weights for each row; the visual tokens are input tokens, and change nothing.

        The modality row sees itself alone and nobody sees it, so in every layer its routing weights depend on the
        modality index only (LaVIN, equation 4): they are computed once for both indices and looked up.

        Raises:
          ValueError: `has_image` is missing.
        """
        if has_image is None:
            raise ValueError("a router needs has_image: which rows have an image")
        rows = lm.adapter.modality.astype(lm.config.dtype)[:, None]  # text alone, with an image
        table = lm.run(rows, jnp.zeros((2, 1), jnp.int32), leaves=lm.adapter.leaves())[2]
        return table[:, has_image.astype(jnp.int32)]

    def attention_input(
        self, leaf: Mapping, row: Float[Array, "b 2"] | None, z: Float[Array, "b t d"], drop: Callable[[Array], Array]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 2"]]:
        """Returns the adapter's output and the routing weights used: the row's, or those of z's own first token."""
        weights = route(leaf, z[:, 0], self.temperature) if row is None else row
        return mix(leaf, z, drop(shrink(leaf, z)), self._scaled(weights)), weights

    def _scaled(self, weights: Float[Array, "_ 2"]) -> Float[Array, "_ 2"]:
        """The routing weights times `scale`: both paths are linear in them."""
        return weights if self.scale == 1.0 else self.scale * weights

    def fold(self, lm: nn.Module, params: dict, modality: int) -> tuple[Any, dict]:
        """Returns the LM with the adapters inside its query, key and value maps (folding.py)."""
        return fold_router(lm, params, modality)


@dataclass(frozen=True, repr=False)
class PositionRouter(Router):
    """In CLIP as LaVIN's code runs it: the token at position p of every image is routed by the first image's at p.

    Their adapter takes the first entry of the second axis for the class token, but CLIP's tensors are [tokens batch
    width] there. What an image gives depends on which image stands first in its batch.
    """

    mixes_rows: ClassVar[bool] = True

    def attention_input(
        self, leaf: Mapping, row: Float[Array, "b 2"] | None, z: Float[Array, "b t d"], drop: Callable[[Array], Array]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "t 2"]]:
        """Returns the adapter's output, and the routing weights of each position."""
        weights = route(leaf, z[0], self.temperature)
        return mix(leaf, z, drop(shrink(leaf, z)), self._scaled(weights), axis=0), weights


@dataclass(frozen=True, repr=False)
class LateRouter(Router):
    """In generation as LaVIN's code runs it: what is read token by token stands one position too low.

    Its first read ends with the shortest prompt of the batch and holds the modality row, which is not counted later:
    of longer prompts the rest, and every new token, has the position of the token before it.
    """

    def generation_positions(self, positions: Int[Array, "b s"]) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
        """Returns theirs: beyond the batch's shortest prompt one lower, so that one position occurs twice."""
        last = positions[:, -1]
        return positions - (positions > last.min()), last - 1


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
    leaf: Mapping, z: Float[Array, "b t d"], u: Float[Array, "b t r"], w: Float[Array, "_ 2"], axis: int = 1
) -> Float[Array, "b t d"]:
    """Returns z + sum_k w_k (B_k u + b_k), the output of one layer's adapter (LaVIN, equations 3 and 5).

    The weights w are each row's [b 2], or with axis=0 each position's [t 2].
    """
    up, (b, t, d) = leaf["up"], z.shape
    kernel = up["kernel"].astype(z.dtype)
    _, groups, width, _ = kernel.shape
    inner = (
        u[:, :, None] * jnp.expand_dims(w.astype(z.dtype), axis)[..., None]
    )  # B_k (w_k u): one product serves both paths
    out = jnp.einsum("btkgi,kgio->btgo", inner.reshape(b, t, 2, groups, width), kernel).reshape(b, t, d)
    bias = jnp.dot(w, up["bias"], precision="highest").astype(z.dtype)
    return z + out + jnp.expand_dims(bias, axis)

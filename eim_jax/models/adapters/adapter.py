"""What an adapter of a frozen tower is to the rest of the package: an object with a method for each place it enters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
    from eim_jax.config import Arm, Decode

# Pytrees. Leaves [L ...] are an adapter's parameters, steering [L b ...] is what an image changes for each row.
LayerLeaves = Any
Steering = Any


class Markers(NamedTuple):
    """Token ids that stand before the visual tokens of a row with an image, or before the text of one without."""

    with_image: tuple[int, ...] = ()
    without_image: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """Trained parameters inside a frozen decoder LM, and possibly inside the vision tower; an entry of `ADAPTERS`.

    A subclass is a frozen dataclass whose fields are the adapter's settings: it is part of the tower's shape, and two
    equal ones compile to the same program. Its parameters live under "lm/adapter/" ("visual/adapter/"), each with a
    leading axis that counts layers. All that is not overridden does nothing, so that a subclass holds only what it is.

    Attributes:
      title: its name in messages.
      trained_leaf: a leaf below ".../adapter/" that some stage must train, or the adapter would stay as it was drawn.
      unstacked: the leaves below ".../adapter/" whose first axis does not count layers (they alone are decayed as
        they are).
      visual_tokens: the ST's output enters as input tokens; False where `steer` takes it elsewhere.
      first_position: the position of a text's first token.
      adapts_vision: `arm.visual_adapter` may put it into the vision tower's blocks too.
      mixes_rows: in the vision tower, what an image gives depends on the images beside it.
      decode_fields: fields of config.decode that it alone reads (`in_generation`).
    """

    title: ClassVar[str] = "the adapter"
    trained_leaf: ClassVar[str] = ""
    unstacked: ClassVar[tuple[str, ...]] = ()
    visual_tokens: ClassVar[bool] = True
    first_position: ClassVar[int] = 0
    adapts_vision: ClassVar[bool] = False
    mixes_rows: ClassVar[bool] = False
    decode_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_arm(cls, arm: "Arm") -> "Adapter":
        """Returns the adapter with an arm's settings (config.arm.NAME)."""
        return cls()

    def check(self, width: int, layers: int) -> None:
        """Raises ValueError where the settings do not fit a tower of this width and depth."""

    def markers(self, tokenizer) -> Markers:
        """Returns the token ids that it wants before an image, or in its place."""
        return Markers()

    def in_vision(self, arm: "Arm") -> "Adapter":
        """Returns what stands in the vision tower's blocks, by an arm's settings; its parameters are the same."""
        return self

    def in_generation(self, settings: "Decode") -> "Adapter":
        """Returns what stands in the LM while it generates text, by config.decode; its parameters are the same."""
        return self

    def generation_positions(self, positions: Int[Array, "b s"]) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
        """Returns the positions of what is read before the first new token, and the one after which that stands.

        Args:
          positions: as in the training forward; a row's padding, all behind its tokens, repeats its last one.
        """
        return positions, positions[:, -1]

    @property
    def dropout_rate(self) -> float:
        """The rate of the dropout that `attention_input` is given, in training."""
        return 0.0

    def depth(self, layers: int) -> int:
        """Returns how many of the tower's topmost layers have it: the length of its leaves' layer axis.

        Below them a scanned tower has leaves of zeros, with which it must change nothing.
        """
        return layers

    def lm_parameters(self, config: Any) -> nn.Module:
        """Returns the module that holds its parameters in a decoder LM of this shape.

        The module's method `leaves()` returns what its blocks read, a pytree of [L ...].
        """
        raise NotImplementedError(f"{type(self).__name__}.lm_parameters")

    def vision_parameters(self, layers: int, width: int) -> nn.Module:
        """Returns the module that holds its parameters in a vision tower, as `lm_parameters`."""
        raise NotImplementedError(f"{type(self).__name__}.vision_parameters")

    def steer(self, lm: Any, visual: Float[Array, "b m d"] | None, has_image: Bool[Array, "b"] | None) -> Steering:
        """Returns what these images change inside the LM besides the input tokens, as a pytree of [L b ...].

        Args:
          lm: the bound decoder, whose `adapter` is the module of `lm_parameters`.
          visual: the ST's output; None where no row has an image.
          has_image: which rows have one; None with `visual` means all.
        """
        return ()

    def attention_input(
        self, leaf: LayerLeaves, row: Steering, z: Float[Array, "b t d"], drop: Callable[[Array], Array]
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns what a block's attention reads in place of its normed input z, and what `steer` wants to know of it.

        Args:
          leaf: the layer's part of the leaves.
          row: the layer's part of the steering [b ...]; None in a vision tower, and while `steer` itself runs the LM.
          z: the block's input after its first norm.
          drop: dropout at `dropout_rate`; the identity outside training.
        """
        return z, None

    def attention_beside(
        self,
        leaf: LayerLeaves,
        row: Steering,
        attend: Callable[[Array, Array], Array],
        project: Callable[[Array], tuple[Array, Array]],
    ) -> Float[Array, "b t kv g e"] | None:
        """Returns what is added to the heads' output (kv groups of g heads), or None; decoder LMs only.

        Args:
          leaf: the layer's part of the leaves.
          row: the layer's part of the steering.
          attend: (keys, values) [b s kv e] -> the layer's queries' own softmax attention over them.
          project: x [b s d] -> the layer's keys, not turned, and values of it.
        """
        return None

    def fold(self, lm: nn.Module, params: dict, modality: int) -> tuple[Any, dict]:
        """Returns the shape and parameters of an LM without adapter that gives the same logits.

        Args:
          lm: the LM's module.
          params: its tree, the adapter's included.
          modality: 1 for rows with an image, 0 for text alone.

        Raises:
          ValueError: it cannot be folded, or not into these kernels.
        """
        raise ValueError(f"{self.title} cannot be folded into the language model's own weights")

"""What a vision tower and a text tower are to the rest of the package, and the record of a family of such towers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flax import linen as nn
from jaxtyping import Array, Float, Int

from eim_jax.models.hugging_face import Row


@runtime_checkable
class VisionTower(Protocol):
    """An image encoder as linen module: `tower.apply(variables, x, method=...)`.

    Attributes:
      config: a frozen dataclass with `model_type` (its family's), `image_size`, `patch_size`, `width` (v), `joint`
        (j, the width of the space shared with the text tower, 0 for none), `layers`, `mean` and `std` (by which images
        in [0, 1] are normalised), `adapter`, `prompts`, `prompt_hidden`, and the fields of `stacks.Form`.
      has_cls: whether the first of all its tokens is a summary of the image that no patch belongs to.
      features: the choices of visual tokens that `tokens` can give, values of config.arm.*.features.
    """

    config: Any
    has_cls: bool
    features: tuple[str, ...]

    def tokens(
        self, pixels: Float[Array, "b h w 3"], features: str = "full", train: bool = False
    ) -> Float[Array, "b n v"]:
        """Returns the visual tokens before the output layer; with `train` an adapter's dropout is on."""
        ...

    def pooled(self, tokens: Float[Array, "b n v"], features: str = "full") -> Float[Array, "b v"]:
        """Returns the one vector of an image that `project` takes to the joint space, from what `tokens` gave."""
        ...

    def project(self, tokens: Float[Array, "*n v"]) -> Float[Array, "*n j"]:
        """Returns the output layer's view of tokens or of `pooled`, in the joint space of image and text."""
        ...


@runtime_checkable
class TextTower(Protocol):
    """A text encoder whose features share a space with a vision tower's: it makes the caption queue K_t, no more.

    Attributes:
      config: a frozen dataclass with `vocab`, `context` (the longest text, in tokens of its own tokenizer, which
        puts in the special tokens that `encode` looks for), `joint`, and the fields of `stacks.Form`.
    """

    config: Any

    def encode(self, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """Returns each text's feature in the joint space, not normalised; tokens are padded on the right."""
        ...


@dataclass(frozen=True)
class VisionFamily:
    """Everything that tells one family of vision towers (and the text towers beside them) from another.

    Attributes:
      model_type: config.json's name for the family, and the shapes' own `model_type`.
      features: the choices of visual tokens that its towers can give.
      build: vision shape -> module (a VisionTower, whose `init` takes pixels [b h w 3]).
      build_text: text shape -> module (a TextTower, whose `init` takes tokens [b s]).
        A family without a text tower has None here, and in place of every text shape.
      read: (config.json, {"image_mean": ..., "image_std": ...} as pretrained/image_processor.py reads them) -> the two
        shapes. Raises WeightsError for a field that is not supported; the
        caller puts the file's name in front.
      write: (vision shape, text shape, logit_scale) -> config.json's content, as transformers reads it.
      write_preprocessor: vision shape -> preprocessor_config.json's content.
      rows: the key table, or vision shape -> the key table: leaves are "visual/..." and "text/...", blocks
        "visual/blocks_{i}/...".
      eos: the text shape's field for the id of [EOS], which is the tokenizer's where the folder has one; "" for a text
        tower that looks for none.
      ignored: a regular expression over keys of the file that hold no parameter.
      processor: the image processor whose defaults hold where the folder's file leaves a field out, or there is none:
        a name in pretrained/image_processor.DEFAULTS.
      pads: whether the text tower reads every text padded to its `context`, as its tokenizer frames it. Else a text
        stands between the tokenizer's BOS and EOS, at its own length.
      resizes: the tower sees pictures of the image processor's size, whatever the size it was trained at last, as
        transformers has it; else that of config.json. Positions are interpolated where the two differ.
      drawn: the tower's own parameters, by their first name below "visual/", that no file holds and the run draws.
      in_llava: transformers' LLaVA class reads its tokens as `tokens` gives them: what the last block leaves.
      published: hub ids -> the two shapes, for `--mode=plan` where config.json is not at hand.
    """

    model_type: str
    features: tuple[str, ...]
    build: Callable[[Any], nn.Module]
    build_text: Callable[[Any], nn.Module] | None
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, Any]]
    write: Callable[[Any, Any, float], dict[str, Any]]
    write_preprocessor: Callable[[Any], dict[str, Any]]
    rows: tuple[Row, ...] | Callable[[Any], tuple[Row, ...]]
    eos: str = ""
    ignored: str = r"(?!)"
    processor: str = "CLIP"
    pads: bool = False
    resizes: bool = False
    drawn: tuple[str, ...] = ()
    in_llava: bool = False
    published: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def rows_of(self, vision: Any) -> tuple[Row, ...]:
        """Returns the key table of a tower of this shape."""
        return self.rows(vision) if callable(self.rows) else self.rows

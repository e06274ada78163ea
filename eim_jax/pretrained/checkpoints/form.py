"""What a form of checkpoint says of itself: how it is known, which of our leaves its keys fill, what must agree."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from eim_jax.config import Arm
from eim_jax.models.language import family_of
from eim_jax.pretrained.reader import Leaf, leaves_of

Shape = tuple[int, ...]
EXPORT = "trained.safetensors"  # the file of --mode=export that has all that training changed or added


class Target(NamedTuple):
    """The arm that a checkpoint is to fill.

    Attributes:
      name: the arm's, in config.arm.
      arm: its fields.
      shapes: our path -> shape of each of its leaves.
      towers: which of these the pretrained towers have; the others must come from the checkpoint.
      visual: the vision tower's shape.
      lm: the language model's shape.
    """

    name: str
    arm: Arm
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    towers: Collection[str]
    visual: Any
    lm: Any

    def differs(self, field_name: str, wanted: Any, why: str) -> list[str]:
        """Returns a line on a field of the arm that the checkpoint says otherwise, or none."""
        held = getattr(self.arm, field_name)
        if held == wanted:
            return []
        return [f"config.arm.{self.name}.{field_name} is {held!r}, and {why}: set it to {wanted!r}"]


def other_tower(config: Any, field_name: str, width: int, layers: int) -> list[str]:
    """Returns a line on a checkpoint whose tower has another width or depth than the config's, or none.

    Args:
      config: the tower's shape.
      field_name: the field of config.towers that names it.
      width: the checkpoint's; layers too.
      layers: its number of blocks.
    """
    if (width, layers) == (config.width, config.layers):
        return []
    return [
        f"it was trained on {layers} layers of width {width}, and config.towers.{field_name} has {config.layers} of "
        f"width {config.width}: set config.towers.{field_name} to the one that it was trained on"
    ]


class Content(NamedTuple):
    """What a file holds.

    Attributes:
      path: the file.
      shapes: its keys -> shapes.
      settings: what stands beside the tensors (LaVIN's command line), {} where nothing does.
      record: the arm.json beside our own exports, {} where there is none.
    """

    path: Path
    shapes: Mapping[str, Shape]
    settings: Mapping[str, Any] = {}
    record: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Form:
    """One form of checkpoint; an entry of `FORMS`.

    Attributes:
      title: its name in messages.
      fits: keys -> whether they are of this form.
      leaves: what fills our leaves, from a file of this form.
      problems: lines on the config's fields that contradict the file, each with what to set.
      ignored: (content, target) -> a regular expression over keys that hold no parameter of ours.
      lacking: content -> the beginning of our paths which such a file does not have ("st/"); "" where it has all.
      tied: content -> (a key, the key that it must repeat), or None.
      made_with: dotted fields of the config -> what its authors made such files with, where no leaf says it: the log
        names those that differ.
    """

    title: str
    fits: Callable[[Collection[str]], bool]
    leaves: Callable[[Content, Target], dict[str, Leaf]]
    problems: Callable[[Content, Target], list[str]]
    ignored: Callable[[Content, Target], str] = field(default=lambda content, target: r"(?!)")
    lacking: Callable[[Content], str] = field(default=lambda content: "")
    tied: Callable[[Content], tuple[str, str] | None] = field(default=lambda content: None)
    made_with: Mapping[str, Any] = field(default_factory=dict)


def lm_leaves(target: Target, prefix: str) -> dict[str, Leaf]:
    """Returns what fills the language model from Hugging Face's keys with a prefix before them."""
    rows = family_of(target.lm).rows(target.lm)
    leaves = leaves_of(rows, {"lm": target.lm.layers}, target.lm.scan)
    return {
        path: leaf._replace(keys=[tuple(f"{prefix}{key}" for key in keys) for keys in leaf.keys])
        for path, leaf in leaves.items()
    }


def count(keys: Collection[str], before: str) -> int:
    """Returns how many different names follow `before` in the keys: "layers." -> the number of layers.

    >>> count(["layers.0.a", "layers.0.b", "layers.1.a"], "layers.")
    2
    """
    return len({key.removeprefix(before).partition(".")[0] for key in keys if key.startswith(before)})

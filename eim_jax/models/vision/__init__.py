"""The vision towers: one family a file or two, with its modules and its `VisionFamily` record, and the table of them.

A family is added by writing its file and one line in `VISION_TOWERS`; from outside the package,
`VISION_TOWERS["mine"] = VisionFamily(...)` does the same.
"""

import re
from typing import Any

from flax import linen as nn

from eim_jax.config import Config, ConfigError
from eim_jax.models.vision.clip_files import CLIP_FAMILY
from eim_jax.models.vision.dinov2_files import DINOV2_FAMILY
from eim_jax.models.vision.siglip_files import SIGLIP_FAMILY
from eim_jax.models.vision.tower import TextTower, VisionFamily, VisionTower

__all__ = ["REFUSED", "VISION_TOWERS", "TextTower", "VisionFamily", "VisionTower", "build_text", "check", "text_family"]

# model_type of a config.json -> the family that reads it.
VISION_TOWERS: dict[str, VisionFamily] = {
    family.model_type: family for family in (CLIP_FAMILY, SIGLIP_FAMILY, DINOV2_FAMILY)
}


# model_type of relatives that are not read -> why, and what to take.
_ALONE = "it is a part saved alone, without the text tower: give the folder of the whole model"
REFUSED = {
    "siglip2": "it is SigLIP 2 in the NaFlex form, whose pictures keep their aspect as patches of varying number, "
    "which is not supported: take one of a fixed resolution (google/siglip2-base-patch16-224, ...)",
    **dict.fromkeys(("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model"), _ALONE),
}


def text_family(vision: Any, text: Any) -> VisionFamily:
    """Returns the family of the text tower beside a vision tower: by its own `model_type`, else the vision tower's."""
    return VISION_TOWERS[getattr(text, "model_type", vision.model_type)]


def build_text(vision: Any, text: Any) -> nn.Module:
    """Returns the text tower of this shape beside a vision tower."""
    build = text_family(vision, text).build_text
    assert build is not None, "a family that has read a text shape builds it"
    return build(text)


_RESNET = r"(?i)(.*/)?(openai[-_:])?(clip[-_])?(rn|resnet)[-_]?\d+(x\d+)?([-_]clip)?([-_.:]\w+)?"


def check(config: Config) -> None:
    """Raises ConfigError where an arm's ST is to receive visual tokens that no tower gives, or for CLIP's ResNets."""
    if re.fullmatch(_RESNET, config.towers.clip):
        raise ConfigError(
            f"config.towers.clip: {config.towers.clip!r} is a CLIP of the ResNet kind, which is not supported: take "
            "one of its ViTs (openai/clip-vit-base-patch32, openai/clip-vit-large-patch14)"
        )
    known = tuple(dict.fromkeys(name for family in VISION_TOWERS.values() for name in family.features))
    for name, arm in config.arm.items():
        if arm.features not in known:
            raise ConfigError(f"config.arm.{name}.features: {arm.features!r} is none of {', '.join(known)}")

"""The vision towers: one family a file or two, with its modules and its `VisionFamily` record, and the table of them.

A family is added by writing its file and one line in `VISION_TOWERS`; from outside the package,
`VISION_TOWERS["mine"] = VisionFamily(...)` does the same.
"""

import re

from eim_jax.config import Config, ConfigError
from eim_jax.models.vision.clip_files import CLIP_FAMILY
from eim_jax.models.vision.tower import TextTower, VisionFamily, VisionTower

__all__ = ["VISION_TOWERS", "TextTower", "VisionFamily", "VisionTower", "check"]

# model_type of a config.json -> the family that reads it.
VISION_TOWERS: dict[str, VisionFamily] = {family.model_type: family for family in (CLIP_FAMILY,)}


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

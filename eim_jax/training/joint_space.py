"""Whether an arm's losses and adapters find in its vision tower what they read: a text tower, a projection, a [CLS]."""

import re

from eim_jax.config import Arm, Config, ConfigError, patterns
from eim_jax.losses.table import LOSSES
from eim_jax.models.vision import VISION_TOWERS


def check(config: Config, arm: Arm, vision, text) -> None:
    """Raises ConfigError where an arm asks for what its vision tower does not have.

    Args:
      config: the run's.
      arm: one of config.arm.
      vision: the vision tower's shape.
      text: the text tower's; None where there is none.
    """
    family, name = VISION_TOWERS[vision.model_type], config.towers.clip
    if arm.features not in family.features:
        raise ConfigError(f"config.arm.*.features={arm.features!r}: {name} gives {', '.join(family.features)}")
    if arm.visual_adapter and not family.build(vision).has_cls:
        raise ConfigError(
            f"config.arm.*.visual_adapter: an image's [CLS] routes the adapters, and {name} has none: set it to False"
        )
    if arm.output_layer and not vision.joint:
        raise ConfigError(f"config.arm.*.output_layer: {name} has no output layer: set it to False")
    drawn = [f"visual/{part}/kernel" for part in family.drawn]
    trained: set[str] = set()
    for stage in arm.sequence:
        trained |= {pattern for pattern, _ in patterns(config.stages[stage])}
        if not any(_reads_captions(loss) for loss, weight in config.stages[stage].losses.items() if weight):
            continue
        if text is None:
            raise ConfigError(
                f"config.stages.{stage}.losses: K_t is made by a text tower, and {name} has none: name one as "
                "config.towers.text (a CLIP's or SigLIP's folder), or leave loss_IE out"
            )
        for path in drawn:
            if not any(re.fullmatch(pattern, path) for pattern in trained):
                raise ConfigError(
                    f"config.stages.{stage}.losses: loss_IE's query reaches the space of config.towers.text by "
                    f"{path!r}, which is drawn by the seed and trained by no stage up to here: add "
                    f"{path.rpartition('/')[0] + '/.*'!r} to config.stages.{stage}.train"
                )


def _reads_captions(loss: str) -> bool:
    """Whether a loss's keys are a text tower's."""
    kind = LOSSES.get(loss)
    return kind is not None and kind.queue is not None and kind.queue.source.tower == "text"

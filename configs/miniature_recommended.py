"""What our experiments recommend, on the drawn world: all of CLIP's tokens, a short ST stage, then loss_base alone.

The measures of EIM that were seen to help (docs/results/report.md), and no other: no LM stage, no prompts, no loss_IE,
and the rate that suits full features, four times the demo's. `baseline` stands beside it as in configs/miniature.py.
"""

import ml_collections

from eim_jax.config import Arm
from eim_jax.configs import miniature

RATE = 4e-3  # EIM's best of four on the validation split; the baseline's is 1e-3


def get_config() -> ml_collections.ConfigDict:
    config = miniature.get_config()
    arm = Arm(description="full features -> FFN -> LM, stages ST -> base", st_hidden=512, sequence=("st", "tune"))
    with config.unlocked():
        config.arm.recommended = vars(arm)
        config.stages.tune = config.stages.base.copy_and_resolve_references()
    config.stages.tune.lr = RATE
    config.arms = ("baseline", "recommended")
    return config

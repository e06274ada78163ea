"""ClipCap_eim on COCO captions: full CLIP features -> FFN -> GPT-2 small, stages ST -> LM -> IE (the paper's best row).

N = 566,747 captions of 113,287 images (Karpathy train + restval) = 14,168 steps of 40 an epoch, 10 epochs a stage:
141,680 steps a stage. Trained: ST 4,722,432; LM 124,439,808; prompts 26,070,528 -> 155.23M of 306.11M (the output layer
not counted). The paper's times on one RTX-3090, an epoch: ST 0.9 min + LM 6.4 min + IE 43.7 min = 51 min.
Queues, bfloat16: K_t 566,747 x 512 = 0.58 GB, K_e and K_b x 768 = 0.87 GB each; a stage holds only its own.

The paper's other rows by override (stages are those of clipcap_small_coco.py):
  Table 4, cumulative      --config.arm.eim.prompts=0 with --config.arm.eim.sequence="('base',)", then "('st','base')",
                           then "('st','lm','base')"; then this config
  Table 5, one stage       --config.arm.eim.sequence="('joint',)"
  Table 6, ST+LM together  --config.arm.eim.sequence="('st_lm','ie')"
  Table 7, LM before ST    --config.arm.eim.sequence="('lm','st','ie')"
  Table 8, IE first        --config.arm.eim.sequence="('ie','st','lm')"
  Table 9, CLIP's features --config.arm.eim.output_layer=True, --config.arm.eim.features=cls
  loss_IE's own share      --config.stages.ie.losses.ie=0
"""

import ml_collections

from eim_jax.config import Arm
from eim_jax.configs import clipcap_small_coco


def get_config() -> ml_collections.ConfigDict:
    config = clipcap_small_coco.get_config()
    eim = Arm(
        description="EIM: full features -> FFN -> LM, trained in stages ST -> LM -> IE",
        prompts=10,
        prompt_hidden=1408,
        st_bias="uniform",  # as the baseline's
        sequence=("st", "lm", "ie"),
    )
    with config.unlocked():
        config.arm.eim = vars(eim)
    config.arms = ("eim",)
    return config

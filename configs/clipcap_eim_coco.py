"""ClipCap_eim on COCO captions: full CLIP features -> FFN -> GPT-2 small, stages ST -> LM -> IE (the paper's best row).

N = 566,747 captions of 113,287 images (Karpathy train + restval) = 14,168 steps of 40 an epoch, 10 epochs a stage:
141,680 steps a stage. Trained: ST 4,722,432; LM 124,439,808; prompts 26,070,528 -> 155.23M of 306.11M (the output layer
not counted). The paper's times on one RTX-3090, an epoch: ST 0.9 min + LM 6.4 min + IE 43.7 min = 51 min.
Queues, bfloat16: K_t 566,747 x 512 = 0.58 GB, K_e and K_b x 768 = 0.87 GB each; a stage holds only its own.
"""

import ml_collections

from configs import clipcap_small_coco
from eim_jax.config import Arm


def get_config() -> ml_collections.ConfigDict:
    config = clipcap_small_coco.get_config()
    eim = Arm(
        description="EIM: full features -> FFN -> LM, trained in stages ST -> LM -> IE",
        prompts=10,
        prompt_hidden=1408,
        sequence=("st", "lm", "ie"),
    )
    with config.unlocked():
        config.arm.eim = vars(eim)
    config.arms = ("eim",)
    return config

"""ClipCap_large on COCO captions: the same baseline with GPT-2 large (774,030,080 parameters).

ClipCap's MLP is counted by the paper at 31.47M: 956.78M in all. One-epoch time in the paper: 75 min on an RTX-3090.
"""

import ml_collections

from eim_jax.configs import clipcap_small_coco


def get_config() -> ml_collections.ConfigDict:
    config = clipcap_small_coco.get_config()
    config.towers.lm = "gpt2-large"
    config.towers.scan = True  # 36 layers compile as one
    return config

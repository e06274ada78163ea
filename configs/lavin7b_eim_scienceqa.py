"""LaVIN-7B with EIM on ScienceQA: 50 CLIP tokens, stages ST -> LM -> Adapter -> IE (CLIP's adapters train in the
last).

The paper keeps 50 of 257 tokens and does not say which: here [CLS] and a 7 x 7 pooled grid
(--config.arm.eim.features=first for the first 50). Queues at N = 12,726: K_t x 768, K_e and K_b x 4096. The paper:
+1.65 / +2.05 points over LaVIN-7B-lite.

"lite": --config.towers.quant=nf4
"""

import dataclasses

import ml_collections

from eim_jax.configs import lavin7b_scienceqa


def get_config() -> ml_collections.ConfigDict:
    config = lavin7b_scienceqa.get_config()
    eim = dataclasses.replace(
        lavin7b_scienceqa.ORIGINAL,
        description="EIM on LaVIN: 50 CLIP tokens, stages ST -> LM -> Adapter -> IE",
        features="grid",
        sequence=("st", "lm", "adapter", "ie"),
    )
    with config.unlocked():
        config.arm.eim = vars(eim)
    config.arms = ("eim",)
    config.data.max_tokens = lavin7b_scienceqa.text_length(50)
    return config

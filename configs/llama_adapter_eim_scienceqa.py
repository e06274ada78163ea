"""LLaMA-Adapter (7B) with EIM on ScienceQA: stages ST -> LM -> Adapter -> IE; with --config.arms="('eim3',)" the first
three.

CLIP's output layer is gone (ST 8,945,152 instead of 8,814,080). The last stage adds deep prompts to the frozen CLIP;
`eim3` has none, as the paper's row without new parameters. The paper's accuracies: 87.62 (three stages), 87.95 (four).
Queues at N = 12,726: K_t x 768, K_e and K_b x 4096; text-only questions (51 %) take part in loss_base and loss_LM
alone.

The larger variant (LLaMA-Adapter V2's sizes, ST 60,460,800): --config.arm.eim.st_hidden=768
--config.arm.eim.st_layers=8 --config.arm.eim.adapter_layers=31
"""

import dataclasses

import ml_collections

from eim_jax.configs import llama_adapter_scienceqa


def get_config() -> ml_collections.ConfigDict:
    config = llama_adapter_scienceqa.get_config()
    three = dataclasses.replace(
        llama_adapter_scienceqa.ORIGINAL,
        description="EIM on LLaMA-Adapter without new parameters: full CLIP features, stages ST -> LM -> Adapter",
        output_layer=False,
        sequence=("st", "lm", "adapter"),
    )
    four = dataclasses.replace(
        three,
        description="EIM on LLaMA-Adapter: full CLIP features, stages ST -> LM -> Adapter -> IE",
        prompts=10,
        prompt_hidden=1408,
        sequence=("st", "lm", "adapter", "ie"),
    )
    with config.unlocked():
        config.arm.eim = vars(four)
        config.arm.eim3 = vars(three)
    config.arms = ("eim",)
    return config

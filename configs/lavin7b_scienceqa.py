"""LaVIN-7B on ScienceQA, the baseline: [CLS] of every 4th CLIP block, router adapters on LLaMA and CLIP.

Trained 3,781,296: LLaMA's adapters 2,621,760, the modality embedding 8,192, CLIP's adapters 491,760, the projector
659,584. Recipe as LLaMA-Adapter's (20 epochs, 2 warm-up, base rate 9e-3 for 256). LaVIN's images are stretched to a
square and normalised by ImageNet's statistics; CLIP's adapters are routed by position; strings, ids, labels and where a
row is cut are its own. The paper reports 89.37 (reruns by others: 88.3 to 89.2).

"lite", the LLM's linear layers in 4 bits: --config.towers.quant=nf4 (the paper: 88.35)
"""

import dataclasses

import ml_collections

from eim_jax.config import Arm, Checkpoint, Config, Data, Decode, LossWeights, Stage, Towers
from eim_jax.configs.llama_adapter_scienceqa import LENGTH, RECIPE, stages
from eim_jax.training.kinds import to_config_dict

VISUAL = 6  # tokens that the ST gives: 24 blocks / 4
BASELINE = Arm(
    description="LaVIN: [CLS] of every 4th block -> projector -> LLaMA with router adapters, trained on loss_base",
    features="blocks",
    st="projector",
    st_hidden=128,
    adapter="lavin",
    adapter_temperature=10.0,
    visual_adapter=True,
    sequence=("base",),
)


# As BASELINE, with CLIP's adapters routed as in LaVIN's code; the miniature's run keeps each picture's own routing.
ORIGINAL = dataclasses.replace(BASELINE, visual_routing="position")


def text_length(visual: int) -> int:
    """What is left for the text of LENGTH tokens: less the modality row, BOS, "Image: " (3) and the visual tokens."""
    return LENGTH - 5 - visual


def get_config() -> ml_collections.ConfigDict:
    adapters = ("visual/adapter/.*",)
    base = Stage(train=(*adapters, "lm/adapter/.*", "st/.*"), losses=LossWeights(base=1.0), **RECIPE)
    config = Config(
        towers=Towers(
            clip="openai/clip-vit-large-patch14",
            lm="huggyllama/llama-7b",
            image_stats="imagenet",
            scan=True,
            remat="full",
        ),
        data=Data(
            kind="scienceqa",
            folder="data/scienceqa",
            form="QCM-ALE",
            wording="official",
            fit="stretch",
            max_tokens=text_length(VISUAL),
            max_tokens_text_only=LENGTH - 7,  # less the modality row, BOS and "Image: N/A" (5)
            cut="end",
        ),
        arms=("baseline",),
        arm={"baseline": ORIGINAL},
        stages={**stages(adapters, RECIPE), "base": base},
        decode=Decode(methods=("greedy",), max_tokens=64, batch=32),
        checkpoint=Checkpoint(every_steps=500),
    )
    return to_config_dict(config)

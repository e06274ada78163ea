"""ClipCap_small on COCO captions, the baseline: projected [CLS] -> MLP (prefix 10) -> GPT-2 small, loss_base alone.

566,747 captions (Karpathy train + restval) / 40 = 14,168 steps an epoch, 10 epochs; AdamW, 5,000 warm-up steps to 2e-5,
linear to 0, eps 1e-6 added before the bias correction, no weight decay, `!` never scored, biases as PyTorch draws them
(ClipCap's recipe). Trained 155.91M of 307.19M. The paper: 23 min an epoch on an RTX-3090, BLEU-4 31.2.

The stages of every experiment are defined here; an arm's `sequence` chooses. Single losses (Table 3), by override:
  --config.arm.baseline.sequence="('st','base')"
  --config.arm.baseline.sequence="('lm','base')"
  --config.arm.baseline.sequence="('ie',)" --config.arm.baseline.prompts=10
"""

import dataclasses

import ml_collections

from eim_jax.config import Arm, Checkpoint, Config, Data, LossWeights, Stage, Towers
from eim_jax.training.kinds import to_config_dict

BASELINE = Arm(
    description="ClipCap: projected [CLS] -> MLP -> LM, trained end to end on loss_base",
    features="cls",
    output_layer=True,
    st="mlp",
    sequence=("base",),
)


def get_config() -> ml_collections.ConfigDict:
    recipe = {"epochs": 10, "batch": 40, "lr": 2e-5, "warmup_steps": 5000, "eps_added": "before"}
    prompts, st, lm = "visual/prompt/.*", "st/.*", "lm/.*"
    config = Config(
        towers=Towers(clip="openai/clip-vit-base-patch32", lm="gpt2"),
        data=Data(annotations="data/coco/dataset_coco.json", images="data/coco/images", ignore_token=0),
        arms=("baseline",),
        arm={"baseline": dataclasses.replace(BASELINE, st_bias="uniform")},  # the miniature's starts from zeros
        stages={
            "base": Stage(train=(st, lm), losses=LossWeights(base=1.0), **recipe),
            "st": Stage(train=(st,), losses=LossWeights(st=1.0), **recipe),
            "lm": Stage(train=(lm,), losses=LossWeights(lm=1.0), **recipe),
            "st_lm": Stage(train=(st, lm), losses=LossWeights(st=1.0, lm=1.0), **recipe),
            "ie": Stage(train=(prompts, st, lm), losses=LossWeights(base=1.0, ie=1.0), **recipe),
            "joint": Stage(train=(prompts, st, lm), losses=LossWeights(base=1.0, ie=1.0, st=1.0, lm=1.0), **recipe),
        },
        checkpoint=Checkpoint(every_steps=2000),
    )
    values = to_config_dict(config)
    values.data.strip = False  # ClipCap keeps the white space around captions
    return values

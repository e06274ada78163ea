"""LLaVA-1.5-7B with LoRA: CLIP-L/14 at 336 pixels, an MLP projector, low-rank terms on Vicuna; two stages against EIM.

`baseline` has LLaVA-1.5's order and its rates with LoRA: the projector alone (1e-3, batch 256), then projector (2e-5)
and terms of rank 128 (2e-4, batch 128), an epoch each, both on loss_base. `eim` puts stages on loss_ST and loss_LM
before an epoch on loss_base and loss_IE. Trained: terms 319,815,680, projector 20,979,712.

Unlike LLaVA-1.5 both stages read the same rows (its first has 558k captions of its own; train `align` as a run of its
own and start from it by --init), and the projector reads CLIP's last layer with [CLS], not the last but one without.
In 4 bits (QLoRA): --config.towers.quant=nf4
"""

import dataclasses

import ml_collections

from eim_jax.config import Arm, Checkpoint, Config, Data, Decode, LossWeights, Stage, Towers
from eim_jax.training.kinds import to_config_dict

ST, LOW_RANK = "st/.*", "lm/.*/lora/.*"
RECIPE = {"epochs": 1, "warmup_epochs": 0.03, "schedule": "cosine", "eps": 1e-8, "clip_norm": 1.0}
ALIGN = {**RECIPE, "batch": 256, "accumulate": 4, "lr": 1e-3}
TUNE = {**RECIPE, "batch": 128, "accumulate": 2, "lr": 2e-4}
BASELINE = Arm(
    description="LLaVA-1.5 with LoRA: CLIP tokens -> MLP -> Vicuna, the projector first, trained on loss_base",
    st="ffn",
    st_hidden=4096,
    st_bias="uniform",
    lora=("lm/blocks.*",),  # all linear layers of all blocks
    lora_rank=128,
    lora_alpha=256.0,
    lora_dropout=0.05,
    sequence=("align", "tune"),
)
EIM = dataclasses.replace(BASELINE, description="EIM on it: stages ST -> LM -> IE", sequence=("st", "lm", "ie"))


def get_config() -> ml_collections.ConfigDict:
    both = ((ST, 0.1), LOW_RANK)
    config = Config(
        towers=Towers(
            clip="openai/clip-vit-large-patch14-336", lm="lmsys/vicuna-7b-v1.5", scan=True, remat="full", dropout=0.0
        ),
        data=Data(
            kind="instruct",
            sources=("data/llava/llava_v1_5_mix665k.json",),
            images="data/llava",
            multi_turn=True,
            max_tokens=1024,
            buckets=8,
            on_bad="drop",
        ),
        arms=("baseline", "eim"),
        arm={"baseline": BASELINE, "eim": EIM},
        stages={
            "align": Stage(train=(ST,), losses=LossWeights(base=1.0), **ALIGN),
            "tune": Stage(train=both, losses=LossWeights(base=1.0), **TUNE),
            "st": Stage(train=(ST,), losses=LossWeights(st=1.0), **ALIGN),
            "lm": Stage(train=(LOW_RANK,), losses=LossWeights(lm=1.0), **TUNE),
            "ie": Stage(train=both, losses=LossWeights(base=1.0, ie=1.0), **TUNE),
        },
        decode=Decode(methods=("greedy",), max_tokens=128, batch=32),
        checkpoint=Checkpoint(every_steps=500),
    )
    return to_config_dict(config)

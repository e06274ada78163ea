"""LLaVA with LoRA in miniature: questions over drawn scenes, two stages against EIM, in a few minutes on two cores.

`baseline` is LLaVA-1.5's order: the projector alone, then projector and low-rank terms, both on loss_base. `eim` is
trained on loss_base for as many steps, after brief stages on loss_ST and loss_LM. The LM's own weights stay frozen.
"""

import dataclasses

import ml_collections

from eim_jax.config import Arm, Config, Data, Decode, LossWeights, Stage, Towers
from eim_jax.configs import miniature_lavin
from eim_jax.training.kinds import to_config_dict

ST, LOW_RANK = "st/.*", "lm/.*/lora/.*"
BASELINE = Arm(
    description="LLaVA-1.5's two stages: CLIP tokens -> MLP -> LM with LoRA, trained on loss_base",
    features="grid",
    st="ffn",
    st_hidden=256,
    lora=("lm/blocks.*",),  # all linear layers of all blocks
    lora_rank=16,
    lora_alpha=32.0,
    sequence=("align", "tune"),
)
EIM = dataclasses.replace(
    BASELINE, description="EIM on it: stages ST -> LM -> base -> IE", sequence=("st", "lm", "adapter", "ie")
)


def stages(recipe: dict, brief: dict) -> dict[str, Stage]:
    """The baseline's two stages and EIM's four; `recipe` has half of the steps on loss_base."""
    both = (ST, LOW_RANK)
    return {
        "align": Stage(train=(ST,), losses=LossWeights(base=1.0), **recipe),
        "tune": Stage(train=both, losses=LossWeights(base=1.0), **recipe),
        "st": Stage(train=(ST,), losses=LossWeights(st=1.0), **brief),
        "lm": Stage(train=(LOW_RANK,), losses=LossWeights(lm=1.0), **brief),
        "adapter": Stage(train=both, losses=LossWeights(base=1.0), **recipe),
        "ie": Stage(train=both, losses=LossWeights(base=1.0, ie=1.0), **recipe),
    }


def get_config() -> ml_collections.ConfigDict:
    recipe = {**miniature_lavin.RECIPE, "lr": 5e-3, "weight_decay": 0.0}
    config = Config(
        towers=Towers(clip="miniature/clip", lm="miniature/llama", dropout=0.0),
        data=Data(kind="miniature_qa", scenes=4800, form="QCM-EA", max_tokens=140, buckets=1),
        arms=("baseline", "eim"),
        arm={"baseline": BASELINE, "eim": EIM},
        stages=stages(recipe, {**recipe, "steps": 75}),
        decode=Decode(methods=("greedy",), max_tokens=50, batch=50),
        log_every=25,
    )
    return to_config_dict(config)

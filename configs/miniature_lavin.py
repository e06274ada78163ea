"""LaVIN in miniature: questions over drawn scenes, baseline against EIM, in a few minutes on two cores."""

import dataclasses

import ml_collections

from eim_jax.config import Config, Data, Decode, LossWeights, Stage, Towers
from eim_jax.configs import lavin7b_scienceqa, llama_adapter_scienceqa
from eim_jax.training.kinds import to_config_dict

# As the full-size recipe, with a rate for few steps. Baseline and EIM take 600 steps of loss_base each, EIM in two
# parts. The explanation, which says what the picture shows, comes before the answer (EA, not ALE): trained on the
# letter alone, these models never look at their pictures.
RECIPE = {**llama_adapter_scienceqa.RECIPE, "lr": 1e-2, "epochs": 2, "warmup_epochs": 0.2}


def get_config() -> ml_collections.ConfigDict:
    adapters = ("visual/adapter/.*",)
    baseline = dataclasses.replace(lavin7b_scienceqa.BASELINE, st_hidden=128)
    eim = dataclasses.replace(
        baseline,
        description="EIM on LaVIN: all CLIP tokens, stages ST -> LM -> Adapter -> IE",
        features="grid",
        sequence=("st", "lm", "adapter", "ie"),
    )
    lm, st = "lm/adapter/.*", "st/.*"
    long, brief = {**RECIPE, "epochs": 4}, {**RECIPE, "steps": 75}
    stages = {
        **llama_adapter_scienceqa.stages(adapters, RECIPE),
        "base": Stage(train=(*adapters, lm, st), losses=LossWeights(base=1.0), **long),
        "st": Stage(train=(st,), losses=LossWeights(st=1.0), **{**RECIPE, "lr": 3e-3}),
        "lm": Stage(train=(lm,), losses=LossWeights(lm=1.0), **{**brief, "lr": 3e-3}),
    }
    config = Config(
        towers=Towers(clip="miniature/clip", lm="miniature/llama", dropout=0.0),
        data=Data(kind="miniature_qa", scenes=4800, form="QCM-EA", max_tokens=140, buckets=1),
        arms=("baseline", "eim"),
        arm={"baseline": baseline, "eim": eim},
        stages=stages,
        decode=Decode(methods=("greedy",), max_tokens=50, batch=50),
        log_every=25,
    )
    return to_config_dict(config)

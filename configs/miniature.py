"""The embedded default: the drawn world, its own pretrained towers, baseline against EIM in under five minutes."""

import ml_collections

from eim_jax.config import Arm, Config, Data, Decode, LossWeights, Stage, Towers
from eim_jax.configs.clipcap_small_coco import BASELINE
from eim_jax.training.kinds import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    # The LM stage is one epoch: loss_LM is down within 100 steps, and the demo stays under five minutes on two cores.
    short = {"batch": 40, "warmup_steps": 50, "lr": 1e-3, "epochs": 4}
    config = Config(
        towers=Towers(clip="miniature/clip", lm="miniature/gpt2", dropout=0.0),
        # One caption in a hundred is longer. One program a stage: compiling more would cost what short texts save.
        data=Data(kind="miniature", scenes=1200, max_tokens=28, buckets=1),
        arms=("baseline", "eim"),
        arm={
            "baseline": BASELINE,
            "eim": Arm(
                description="EIM: full features -> FFN -> LM, trained in stages ST -> LM -> IE",
                st_hidden=512,
                prompts=4,
                prompt_hidden=128,
                sequence=("st", "lm", "ie"),
            ),
        },
        stages={
            "base": Stage(train=("st/.*", "lm/.*"), losses=LossWeights(base=1.0), **short),
            "st": Stage(train=("st/.*",), losses=LossWeights(st=1.0), **short),
            "lm": Stage(train=("lm/.*",), losses=LossWeights(lm=1.0), **{**short, "lr": 1e-4, "epochs": 1}),
            "st_lm": Stage(
                train=(("st/.*", 10.0), "lm/.*"), losses=LossWeights(st=1.0, lm=1.0), **{**short, "lr": 1e-4}
            ),
            "joint": Stage(
                train=("visual/prompt/.*", "st/.*", "lm/.*"),
                losses=LossWeights(base=1.0, ie=1.0, st=1.0, lm=1.0),
                **short,
            ),
            "ie": Stage(train=("visual/prompt/.*", "st/.*", "lm/.*"), losses=LossWeights(base=1.0, ie=1.0), **short),
        },
        decode=Decode(max_tokens=28),  # one caption in a hundred is longer
        log_every=25,
    )
    return to_config_dict(config)

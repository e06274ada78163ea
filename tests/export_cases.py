"""Arms on the miniature's towers whose added leaves are far from where training starts, ready to be exported."""

import numpy as np
import tiny

from eim_jax.training import arm_model, partition, setup

CLIPCAP = {"st": "ffn", "adapter": "none", "visual_adapter": False, "features": "full"}
RECIPES = {
    "clipcap": ("miniature_lavin", CLIPCAP),
    "lora": ("miniature_lavin", {**CLIPCAP, "lora": ("lm/blocks.*",), "lora_rank": 4, "lora_alpha": 4.0}),
    "llama_adapter": ("miniature_llama_adapter", {}),
    "lavin": ("miniature_lavin", {"visual_adapter": False, "features": "full"}),
}
LM_TOO = "lm/(blocks|norm|token|head).*"


def config_of(recipe: str, tuned: bool = False, **changes):
    """The recipe's baseline in one stage; `tuned` trains the whole language model too."""
    name, arm = RECIPES[recipe]
    train = {"clipcap": ("st/.*",), "lora": ("st/.*", "lm/.*/lora/.*")}
    train |= dict.fromkeys(("lavin", "llama_adapter"), ("st/.*", "lm/adapter/.*"))
    values = {"arms": ("baseline",), "arm.baseline.sequence": ("base",), "data.scenes": 8}
    values |= {f"arm.baseline.{field}": value for field, value in arm.items()}
    values["stages.base.train"] = (*train[recipe], *((LM_TOO,) if tuned else ()))
    values |= {
        "stages.base.steps": 2,
        "stages.base.batch": 8,
        "stages.base.warmup_steps": 1,
        "stages.base.warmup_epochs": 0.0,
    }
    return tiny.config_of(name, **{**values, **changes})


def loud_arm(config, workdir, size: float = 0.3):
    """(inputs, model, parameters) of the baseline, where all that its stage trains is moved away from its start."""
    inputs = setup.load(config, workdir, data=False)
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
    trained = {path for group in partition.groups(config.stages["base"], params) for path in group.paths}
    rng = np.random.default_rng(3)

    def moved(path, leaf):
        spread = size if path not in inputs.towers else 0.1 * float(np.abs(leaf).mean())
        return leaf + spread * rng.standard_normal(leaf.shape).astype(np.float32)

    return inputs, vlm, {path: moved(path, leaf) if path in trained else leaf for path, leaf in params.items()}

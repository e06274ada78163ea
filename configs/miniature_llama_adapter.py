"""LLaMA-Adapter in miniature: questions over drawn scenes, baseline against EIM, in a few minutes on two cores."""

import dataclasses

import ml_collections

from eim_jax.configs import llama_adapter_scienceqa, miniature_lavin


def get_config() -> ml_collections.ConfigDict:
    config = miniature_lavin.get_config()
    baseline = dataclasses.replace(
        llama_adapter_scienceqa.BASELINE, st_hidden=96, st_heads=4, st_tokens=8, adapter_layers=3
    )
    eim = dataclasses.replace(
        baseline,
        description="EIM on LLaMA-Adapter: full CLIP features, stages ST -> LM -> Adapter -> IE",
        output_layer=False,
        prompts=4,
        prompt_hidden=128,
        sequence=("st", "lm", "adapter", "ie"),
    )
    config.data.fit = "crop"
    with config.unlocked():
        config.arm.baseline = vars(baseline)
        config.arm.eim = vars(eim)
    # The gates need the high rate; with it, in trials, the ST's transformer did not learn to look at the picture.
    st, lm, prompts = ("st/.*", 0.1), "lm/adapter/.*", "visual/prompt/.*"
    config.stages.base.train = (lm, st)
    config.stages.adapter.train = (lm, st)
    config.stages.ie.train = (prompts, lm, st)
    for name in ("base", "adapter", "ie"):
        config.stages[name].lr = 2e-2
    return config

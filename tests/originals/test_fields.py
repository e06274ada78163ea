"""The fields of a config that make a run an original's reach the model, the texts and the optimizer."""

import dataclasses

import numpy as np
import pytest
import tiny

from eim_jax.config import ConfigError
from eim_jax.data.datasets import load_split
from eim_jax.evaluation import scoring
from eim_jax.generation import batched_inference
from eim_jax.generation.visual_tokens import VisualTokens
from eim_jax.models.adapters.lavin import LateRouter, PositionRouter, Router
from eim_jax.training import arm_model, kinds, setup

CLIPCAP = {
    "data.scenes": 24,
    "data.ignore_token": 13,
    "arms": ("baseline",),
    "arm.baseline.st": "transformer",
    "arm.baseline.st_clip_length": 4,
    "arm.baseline.st_layers": 1,
    "arm.baseline.st_bias": "uniform",
    "arm.baseline.normalize_prefix": True,
}


def test_clipcaps_fields_reach_its_mapper_and_its_texts(tmp_path):
    config = tiny.config_of("miniature", **CLIPCAP)
    inputs = setup.load(config, tmp_path)
    vlm = arm_model.model(inputs, config.arm["baseline"])
    assert (vlm.st.config.clip_length, vlm.st.config.bias, vlm.normalize) == (4, "uniform", True)
    texts = inputs.encoded
    has_it = texts.valid & (texts.tokens == 13)
    assert has_it.any() and not texts.supervised[has_it].any()
    np.testing.assert_array_equal(texts.supervised, texts.valid & (texts.tokens != 13))  # a caption has no prompt


def test_an_id_that_the_vocabulary_lacks_is_refused(tmp_path):
    config = tiny.config_of("miniature", **{"data.scenes": 24, "data.ignore_token": 1 << 20})
    with pytest.raises(ConfigError, match=r"config.data.ignore_token=1048576: config.towers.lm has"):
        setup.load(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm.baseline.st_clip_length": 0}, "st_clip_length: 0 is not in 1"),
        ({"arm.baseline.st_bias": "normal"}, "'normal' is none of zeros, uniform"),
        ({"stages.base.eps_added": "inside"}, "'inside' is none of after, before"),
        ({"stages.base.decay_also": "st/.*"}, "weight_decay is 0: set it too"),
        ({"stages.base.decay_also": "(", "stages.base.weight_decay": 0.1}, "is no regular expression"),
        ({"data.ignore_token": -2}, "-2 is not in -1"),
        ({"stages.base.loss_mean": "mean"}, "'mean' is none of tokens, rows, microbatch"),
        ({"stages.base.loss_mean": "microbatch"}, "there is one: set config.stages.base.accumulate too"),
        ({"arm.baseline.visual_routing": "position"}, "needs config.arm.baseline.visual_adapter=True"),
        ({"decode.raw_gates": True}, "decode.raw_gates changes LLaMA-Adapter's prompts alone, which no arm"),
        ({"decode.rope": "lavin"}, "decode.rope changes LaVIN's router alone, which no arm"),
        ({"decode.rope": "theirs"}, "'theirs' is none of training, lavin"),
        ({"arm.baseline.adapter_scale": 0.0}, "adapter_scale: 0.0 is not in"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        tiny.config_of("miniature", **changes)


def test_clipcaps_presets_take_its_choices_and_the_miniature_keeps_its_own():
    for name in ("clipcap_small_coco", "clipcap_large_coco", "clipcap_eim_coco"):
        config = tiny.config_of(name)
        assert config.data.ignore_token == 0 and config.arm[config.arms[0]].st_bias == "uniform"
        assert {stage.eps_added for stage in config.stages.values()} == {"before"}
    demo = tiny.config_of("miniature")
    assert demo.data.ignore_token == -1 and {arm.st_bias for arm in demo.arm.values()} == {"zeros"}
    assert {stage.eps_added for stage in demo.stages.values()} == {"after"}


def test_llama_adapters_and_lavins_presets_take_their_choices_and_their_miniatures_keep_their_own():
    for name in ("llama_adapter_scienceqa", "llama_adapter_eim_scienceqa"):
        config = tiny.config_of(name)
        gates = {stage: one.decay_also for stage, one in config.stages.items()}
        assert gates == {stage: "" if stage == "st" else "lm/adapter/gate" for stage in gates}
        assert config.arm[config.arms[0]].st_bias == "uniform"
    for name in ("lavin7b_scienceqa", "lavin13b_scienceqa", "lavin7b_eim_scienceqa", "lavin7b_eim_chat"):
        assert {arm.visual_routing for arm in tiny.config_of(name).arm.values()} == {"position"}
    for name in ("miniature_lavin", "miniature_llama_adapter"):
        config = tiny.config_of(name)
        assert {stage.decay_also for stage in config.stages.values()} == {""}
        assert {(arm.visual_routing, arm.st_bias) for arm in config.arm.values()} == {("sample", "zeros")}


def test_adapters_fields_reach_the_towers_and_the_generator(tmp_path):
    changes = {"arm.baseline.visual_routing": "position", "arm.baseline.adapter_scale": 0.5, "decode.rope": "lavin"}
    config = tiny.config_of("miniature_lavin", **{"data.scenes": 24, "arms": ("baseline",), **changes})
    inputs = setup.load(config, tmp_path, data=False)
    vlm = arm_model.model(inputs, config.arm["baseline"])
    assert isinstance(vlm.visual.config.adapter, PositionRouter) and vlm.visual.config.adapter.scale == 0.5
    assert type(vlm.lm.config.adapter) is Router and vlm.lm.config.adapter.scale == 0.5
    assert isinstance(vlm.in_generation(config.decode).lm.config.adapter, LateRouter)
    test = load_split(config, "test", tmp_path)
    assert ", positions as LaVIN's generator" in scoring.settings_of(inputs, "greedy", test)
    plain = tiny.config_of("miniature_lavin", **{"data.scenes": 24, "arms": ("baseline",)})
    vlm = arm_model.model(dataclasses.replace(inputs, config=plain), plain.arm["baseline"])
    assert type(vlm.visual.config.adapter) is Router
    # Caches of features of older runs know their tower by these words.
    assert repr(vlm.visual.config.adapter) == "Router(rank=8, groups=2, temperature=10.0, dropout=0.1)"


def test_micro_batches_decide_the_result_where_each_has_its_own_mean():
    """Elsewhere a run may be resumed with other ones: the gradient is the same."""
    for mean, decides in (("tokens", False), ("rows", False), ("microbatch", True)):
        two, four = (
            tiny.config_of("miniature", **{"stages.base.loss_mean": mean, "stages.base.accumulate": parts})
            for parts in (2, 4)
        )
        assert bool(kinds.differences(two, four)) == decides


@pytest.mark.parametrize(
    ("name", "field", "value"), [("miniature_lavin", "rope", "lavin"), ("miniature_llama_adapter", "raw_gates", True)]
)
def test_generated_text_is_read_by_the_configs_fields(tmp_path, monkeypatch, name, field, value):
    class Read(Exception):
        """What the language model was given, and itself."""

    def stop(lm, params, read, config, **options):
        raise Read(lm.config.adapter, read)

    monkeypatch.setattr(batched_inference, "continue_text", stop)
    config = tiny.config_of(name, **{"data.scenes": 24, "arms": ("baseline",), f"decode.{field}": value})
    inputs = setup.load(config, tmp_path, data=False)
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
    nothing = np.zeros((1, vlm.st.config.tokens, vlm.st.config.width_out), np.float32)
    seen, prompts = VisualTokens(nothing, {None: 0}), ["What is it?", "What colour is the large circle?"]
    with pytest.raises(Read) as found:
        batched_inference.generate_text(inputs, vlm, params, seen, [None, None], prompts, "greedy", "text", quiet=True)
    adapter, read = found.value.args
    if field == "raw_gates":
        assert not adapter.squashed and vlm.lm.config.adapter.squashed
    else:
        last = np.asarray(read.valid).sum(1)  # the modality row stands at 0, so that the n-th token is at n
        np.testing.assert_array_equal(read.last_position, last - 1)
        np.testing.assert_array_equal(read.positions[:, -1], np.where(last > last.min(), last - 1, last))

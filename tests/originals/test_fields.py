"""The fields of a config that make a run an original's reach the model, the texts and the optimizer."""

import numpy as np
import pytest
import tiny

from eim_jax.config import ConfigError
from eim_jax.training import setup

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
    vlm = setup.model(inputs, config.arm["baseline"])
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

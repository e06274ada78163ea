"""Claims about CLIP's config.json: which part wins, and where [EOS] comes from; oracle: transformers' CLIPConfig."""

import json
import shutil

import pytest
from transformers import CLIPConfig

from eim_jax.pretrained import WeightsError, clip_config, load_clip, resolve

OURS = {"hidden_size": "width", "hidden_act": "activation", "num_hidden_layers": "layers", "intermediate_size": "mlp"}
OLD = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 3}


def assert_read_as_transformers_does(folder):
    theirs = CLIPConfig.from_pretrained(folder)
    for ours, part in zip(clip_config(folder), (theirs.vision_config, theirs.text_config), strict=True):
        assert [getattr(ours, name) for name in OURS.values()] == [getattr(part, name) for name in OURS]
        assert ours.joint == theirs.projection_dim
    return clip_config(folder)


def test_fields_that_stand_in_the_older_parts_alone_are_read(shared_case):
    vision, text = assert_read_as_transformers_does(shared_case("clip_config_dicts"))
    assert vision.activation == text.activation == "gelu"


@pytest.mark.parametrize(
    "parts",
    [
        {"vision_config": OLD, "vision_config_dict": {**OLD, "hidden_act": "gelu"}},
        {"vision_config": {**OLD, "hidden_act": "gelu"}, "vision_config_dict": {"hidden_size": 24}},
        {"text_config": {**OLD, "hidden_act": "gelu"}, "text_config_dict": {}},
        {"text_config": {**OLD, "hidden_act": "gelu"}, "text_config_dict": None},
        {"text_config_dict": OLD, "vision_config_dict": OLD},
    ],
    ids=["added", "other", "empty", "null", "alone"],
)
def test_an_older_part_wins_as_a_whole(tmp_path, parts):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 24, **parts}))
    assert_read_as_transformers_does(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Returns a function: the miniature's CLIP with other fields of its text_config, with or without its tokenizer."""

    def write(tokenizer=True, **fields):
        shutil.copytree(resolve("miniature/clip"), tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"] |= fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        if not tokenizer:
            for file in tmp_path.glob("tokenizer*"):
                file.unlink()
        return tmp_path

    return write


def test_eos_is_the_tokenizers_else_the_configs_or_the_largest_id(folder):
    assert clip_config(folder())[1].eos_id == 723
    assert clip_config(folder(eos_token_id=2))[1].eos_id == 723
    # OpenCLIP's exports carry any id here; what the texts end with is the tokenizer's.
    assert clip_config(folder(eos_token_id=5))[1].eos_id == 723
    assert clip_config(folder(tokenizer=False, eos_token_id=5))[1].eos_id == 5
    assert clip_config(folder(tokenizer=False, eos_token_id=2))[1].eos_id is None
    assert load_clip(folder(tokenizer=False, eos_token_id=2)).text.eos_id is None


def test_a_tokenizer_whose_eos_the_weights_do_not_have_is_refused(folder):
    with pytest.raises(WeightsError, match=r"its tokenizer's EOS is 723, but .*vocab_size is 700"):
        clip_config(folder(vocab_size=700, eos_token_id=2))

"""Claims: which weights are read of a folder, and that what is none is named. Oracle: the known answer."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eim_jax.models.hugging_face import LARGEST
from eim_jax.pretrained import WeightsError, clip_config, fingerprint, lm_config, load_clip, load_lm, resolve

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def folder(tmp_path):
    """Returns a function: a small tower with its tensors changed (dict -> dict) and config fields replaced."""

    def write(source="gpt2", change=None, **fields):
        place = GOLDENS / source if source != "llama" else resolve("miniature/llama")
        tensors = load_file(place / "model.safetensors")
        save_file(change(tensors) if change else tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((place / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_the_single_file_is_read_before_an_index_and_that_is_said(folder, capsys):
    alone = fingerprint(folder())
    (folder() / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "absent"}}))
    load_lm(folder())
    assert fingerprint(folder()) == alone
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("model.safetensors.index.json beside it is not") == 1


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ([], r"index\.json holds \[\], not an object"),
        ({}, r"index\.json: weight_map is None"),
        ({"weight_map": ["a"]}, r"index\.json: weight_map is \['a'\]"),
        ({"weight_map": {"wte.weight": 5}}, r"index\.json: weight_map\.wte\.weight is 5, not the name of a file"),
        ({"weight_map": {"wte.weight": "../x.safetensors"}}, r"weight_map\.wte\.weight is '\.\./x\.safetensors'"),
    ],
)
def test_an_index_of_wrong_types_is_named_by_field(folder, index, match):
    path = folder()
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=match):
        load_lm(path)


@pytest.mark.parametrize(("kind", "match"), [("int8w", r"bitsandbytes"), ("fp8", r"\(fp8\).* of F8_E4M3")])
def test_int8_codes_and_fp8_are_refused_in_one_message_with_the_remedy(kind, match, shared_case):
    with pytest.raises(WeightsError, match=rf"weights_int8_fp8/{kind}/.*{match}.*(?i:dequantise them in transformers)"):
        load_lm(shared_case("weights_int8_fp8") / kind)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_a_quantization_config_is_refused_by_its_method_before_any_weight_is_read(folder, method):
    place = folder(quantization_config={"quant_method": method, "bits": 4})
    (place / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=rf"config\.json: quantization_config .*{method}.*dequantise"):
        lm_config(place)
    assert lm_config(folder(quantization_config=None)).width == 24


@pytest.mark.parametrize("kind", [np.float64, np.int8, np.int32, np.uint8])
def test_other_number_formats_are_refused_by_file_key_and_format(folder, kind):
    def change(tensors):
        return {**tensors, "transformer.h.1.mlp.c_fc.weight": tensors["transformer.h.1.mlp.c_fc.weight"].astype(kind)}

    with pytest.raises(WeightsError, match=r"model\.safetensors: 1 tensors .*'h\.1\.mlp\.c_fc\.weight' of [FIU]\d+"):
        load_lm(folder(change=change))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_named_by_file_and_key(folder, kind, value):
    def change(tensors):
        tensors = {key: array.astype(kind) for key, array in tensors.items()}
        tensors["transformer.h.2.ln_1.bias"][3] = value
        return tensors

    with pytest.raises(WeightsError, match=r"model\.safetensors: key 'transformer\.h\.2\.ln_1\.bias' holds NaN or inf"):
        load_lm(folder(change=change))


def test_the_largest_numbers_of_each_format_are_no_infinity(folder):
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16):

        def change(tensors, kind=kind):
            tensors = {key: array.astype(kind) for key, array in tensors.items()}
            tensors["transformer.h.2.ln_1.bias"][:2] = ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).min
            return tensors

        load_lm(folder(change=change))


@pytest.mark.parametrize("source", ["gpt2", "clip", "llama"])
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_keys_of_a_wrapped_model_are_named_as_that(folder, source, wrapper):
    place = folder(source, lambda tensors: {wrapper + key: array for key, array in tensors.items()})
    with pytest.raises(WeightsError, match=rf"'{re.escape(wrapper)}[a-z.]*' stands before its keys .*a wrapper was"):
        (load_clip if source == "clip" else load_lm)(place)


def test_keys_of_the_part_inside_a_model_are_named_as_that(folder):
    place = folder("llama", lambda tensors: {key.removeprefix("model."): array for key, array in tensors.items()})
    with pytest.raises(WeightsError, match=r"'model\.' is missing before its keys .*only a part of the model was"):
        load_lm(place)


def test_lora_folders_and_keys_are_named_as_what_they_are(folder, tmp_path):
    def inside(tensors):
        name = "transformer.h.0.attn.c_attn"
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        return {**tensors, f"{name}.lora_A.weight": np.zeros((2, 24), np.float32)}

    with pytest.raises(WeightsError, match=r"PEFT \(LoRA\) model's.*merge_and_unload"):
        load_lm(folder(change=inside))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (tmp_path / "model.safetensors").unlink()
    for _ in range(2):  # with a config.json, then without one
        with pytest.raises(WeightsError, match=r"PEFT adapter \(LoRA or a relative\) of some/base, not a model"):
            load_lm(tmp_path)
        (tmp_path / "config.json").unlink(missing_ok=True)


def test_gpt2s_dropout_fields_are_the_runs_to_set(folder):
    assert lm_config(folder(attn_pdrop=0.3, embd_pdrop=0.0, resid_pdrop=0.2)).dropout == 0.2
    load_lm(folder(attn_pdrop=0.3))


@pytest.mark.parametrize(
    ("source", "fields", "match"),
    [
        ("gpt2", {"n_layer": 10**12}, "n_layer is 1000000000000, not a whole number from 1 to 10,000"),
        ("gpt2", {"n_layer": 10_000}, "'lm' 10,000 layers, but the safetensors hold 40 tensors"),
        ("gpt2", {"n_layer": 0}, "n_layer is 0"),
        ("gpt2", {"n_layer": True}, "n_layer is True"),
        ("gpt2", {"n_embd": "24"}, "n_embd is '24'"),
        ("gpt2", {"n_embd": float("inf")}, "n_embd is inf"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon is 10"),
        ("gpt2", {"n_embd": 24.5}, r"n_embd is 24\.5"),
        ("gpt2", {"n_head": -4}, "n_head is -4"),
        ("gpt2", {"n_head": 5}, "n_embd 24 is not a multiple of n_head 5"),
        ("gpt2", {"vocab_size": [97]}, r"vocab_size is \[97\]"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ("gpt2", {"resid_pdrop": 1.0}, r"resid_pdrop is 1\.0"),
        ("gpt2", {"activation_function": 3}, "activation_function is 3, not a text"),
        ("gpt2", {"model_type": ["gpt2"]}, r"model_type is \['gpt2'\]"),
        ("llama", {"num_hidden_layers": 9_999}, "'lm' 9,999 layers, but"),
        ("llama", {"hidden_size": None, "num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        ("llama", {"rope_parameters": "default"}, "rope_parameters or rope_scaling is 'default'"),
        ("llama", {"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1, not a number above 0"),
        ("clip", {"projection_dim": 10**12}, "projection_dim is 1000000000000"),
        ("clip", {"text_config": "none"}, "text_config is 'none', not an object"),
        ("clip", {"vision_config": {"patch_size": 0}}, r"vision_config\.patch_size is 0"),
        ("clip", {"vision_config": {"image_size": [24, 24]}}, r"vision_config\.image_size is \[24, 24\]"),
        ("clip", {"vision_config": {"num_channels": 4}}, r"vision_config\.num_channels 4"),
        ("clip", {"text_config": {"num_hidden_layers": 9_999}}, "'text' 9,999 layers, but"),
        ("clip", {"text_config": {"eos_token_id": "2"}}, r"text_config\.eos_token_id is '2'"),
        ("clip", {"text_config": {"num_attention_heads": 5}}, r"text_config\.hidden_size 512 is not a multiple"),
    ],
)
def test_numbers_of_a_config_are_checked_before_any_shape_is_made(folder, source, fields, match):
    with pytest.raises(WeightsError, match=rf"{re.escape(str(folder(source, **fields)))}/config\.json:? .*{match}"):
        (clip_config if source == "clip" else lm_config)(folder(source, **fields))


def test_sizes_that_the_weights_do_not_have_are_named_without_being_made(folder):
    with pytest.raises(WeightsError, match=r"has shape \(97, 24\), while our .* has \(97, 16000000\)"):
        load_lm(folder(n_embd=16_000_000, n_head=1))
    assert max(LARGEST.values()) < 2**31

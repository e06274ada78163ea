"""LLaMA's Hugging Face directories: what is read, what is written, what is refused, and weights in 4 bits."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from close import NEEDS_FLOAT16, assert_close
from flax.traverse_util import flatten_dict
from llama_oracle import random_params, stacked, tokens_of
from safetensors.numpy import load_file, save_file

from eim_jax.models.adapters.lavin import Router
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.quant import dequantise, quantise
from eim_jax.parallel import sharding
from eim_jax.pretrained import LM, WeightsError, export_lm, fingerprint, lm_config, lm_shapes, load_lm, with_quant

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TINY = LlamaConfig(vocab=61, context=24, width=64, layers=2, heads=4, kv_heads=2, mlp=128, eps=1e-5, rope_theta=500.0)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(TINY, random_params(TINY))


@pytest.fixture
def written(lm, tmp_path):
    """Returns a function: writes the tiny LLaMA with its tensors changed (dict -> dict) and config fields replaced."""

    def write(change=None, **fields) -> pathlib.Path:
        export_lm(tmp_path, lm)
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(change(tensors) if change else tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text()) | fields
        config = {k: v for k, v in config.items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_export_and_load_give_back_every_leaf(tmp_path, tied, scan):
    config = dataclasses.replace(TINY, tied=tied)
    params = random_params(config)
    export_lm(tmp_path, LM(config, params))
    loaded = load_lm(tmp_path, scan=scan, remat="dots", dtype=jnp.bfloat16)
    assert loaded.config == dataclasses.replace(config, scan=scan, remat="dots", dtype=jnp.bfloat16)
    assert_same(loaded.params, stacked(params, 2) if scan else params)
    assert {k: x.shape for k, x in lm_shapes(loaded.config).items()} == {
        k: x.shape for k, x in flatten_dict({"lm": loaded.params}, sep="/").items()
    }
    before = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in before) != tied
    export_lm(tmp_path, loaded)
    assert_same(load_file(tmp_path / "model.safetensors"), before)


def test_the_language_model_is_found_by_its_model_type(written, tmp_path):
    export_lm(tmp_path / "gpt2", load_lm(GOLDENS / "gpt2"))
    assert_same(load_lm(tmp_path / "gpt2").params, load_lm(GOLDENS / "gpt2").params)
    assert lm_config(tmp_path / "gpt2", scan=True).scan
    assert lm_config(written()) == lm_config(tmp_path) == TINY
    with pytest.raises(WeightsError, match=r"model_type is 'gemma'.*'gpt2' or 'llama' or 'mistral'"):
        load_lm(written(model_type="gemma"))
    for door in (load_lm, lm_config):
        with pytest.raises(WeightsError, match=r"quant 'nf4'.*GPT-2"):
            door(tmp_path / "gpt2", quant="nf4")
    with pytest.raises(WeightsError, match=r"narrow: .*multiple of 64, not 96; set config.towers.quant to 'none'"):
        with_quant(dataclasses.replace(TINY, mlp=96), "nf4", "narrow")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_theta": ...},
        {"rope_parameters": ..., "rope_theta": 500.0},
        {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": None, "attention_bias": ..., "head_dim": ...},
    ],
    ids=["transformers 5", "transformers 4", "older"],
)
def test_rope_theta_is_read_from_either_place(written, fields):
    assert lm_config(written(**fields)).rope_theta == 500.0


def test_fields_that_a_file_leaves_out_are_llama_7bs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert lm_config(tmp_path) == LlamaConfig()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_type 'llama3' without high_freq_factor, original_max_position_embeddings",
        ),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "rope_type 'linear' without factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', not true or false"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"head_dim": 31}, "head width 31 is odd"),
        ({"num_key_value_heads": 3}, "kv_heads 3"),
    ],
)
def test_a_llama_of_another_kind_is_refused_by_field(written, fields, match):
    with pytest.raises(WeightsError, match=match):
        lm_config(written(**fields))


PARAMS = {"dim": 32, "multiple_of": 16, "n_heads": 4, "n_layers": 3, "norm_eps": 1e-06, "vocab_size": 40}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"dim": None, "multiple_of": None}, r"params\.json: dim, multiple_of is missing"),
        ({"use_scaled_rope": True}, "use_scaled_rope is not supported"),
        ({"n_layers": "3"}, "n_layers is '3'"),
        ({"dim": 36, "n_heads": 5}, "width 36, heads 5"),
        ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier is -1"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5"),
    ],
)
def test_metas_sizes_are_checked_by_field(tmp_path, fields, match):
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(WeightsError, match=r"without params\.json"):
        lm_config(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | fields))
    with pytest.raises(WeightsError, match=match):
        lm_config(tmp_path)


def test_the_folder_above_metas_names_the_one_to_give(tmp_path):
    (tmp_path / "7B").mkdir()
    (tmp_path / "7B" / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(WeightsError, match=r"give one, such as .*7B$"):
        lm_config(tmp_path)


def test_metas_sizes_are_read_without_the_weights(tmp_path):
    """7B, Llama 2 70B and Llama 3 8B as published; the feed-forward widths are those of Hugging Face's configs."""
    (tmp_path / "consolidated.00.pth").touch()

    def read(**params):
        (tmp_path / "params.json").write_text(json.dumps(params))
        return lm_config(tmp_path)

    seven = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06}
    assert read(**seven, vocab_size=32000) == LlamaConfig()
    big = read(
        dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-05,
        vocab_size=32000,
    )  # fmt: skip
    assert (big.mlp, big.kv_heads, big.eps) == (28672, 8, 1e-05)
    three = {**seven, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8, "rope_theta": 500000.0}
    assert read(**three, vocab_size=128256).mlp == 14336


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(written):
    def with_head(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + head}

    head = np.float32(0)
    assert "head" not in load_lm(written(with_head, tie_word_embeddings=True)).params
    head = np.float32(1e-3)
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' differs from.*tie_word_embeddings"):
        load_lm(written(with_head, tie_word_embeddings=True))


def test_missing_unexpected_and_misshapen_keys_are_named_and_buffers_ignored(written):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)  # in old files
        tensors["model.layers.1.self_attn.q_norm.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
        tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.v_proj.weight"].T.copy()
        del tensors["lm_head.weight"]
        return tensors

    with pytest.raises(WeightsError) as error:
        load_lm(written(spoil))
    message = str(error.value)
    assert "'model.layers.1.self_attn.q_proj.weight' (our lm/blocks_1/attn/q/kernel) is missing" in message
    assert "'model.layers.1.self_attn.q_norm.weight' is unexpected" in message
    assert "k_proj.weight' (our lm/blocks_0/attn/k/kernel) has shape (64, 32), not (32, 64)" in message
    assert "'lm_head.weight' (our lm/head/kernel) is missing" in message
    assert "inv_freq" not in message


HALVES = [ml_dtypes.bfloat16, pytest.param(np.float16, marks=NEEDS_FLOAT16)]


@pytest.mark.parametrize("kind", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("scan", [False, True])
def test_half_precision_files_load_as_they_are_and_widened(lm, written, kind, scan):
    def lower(tensors):
        return {k: x.astype(kind) for k, x in tensors.items()}

    expected = jax.tree.map(lambda x: x.astype(kind), stacked(lm.params, 2) if scan else lm.params)
    directory = written(lower)
    assert_same(load_lm(directory, scan=scan, param_dtype=kind).params, expected)
    wide = load_lm(directory, scan=scan).params
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), expected))


@pytest.mark.parametrize("scan", [False, True])
def test_nf4_holds_each_blocks_kernels_quantised_and_all_else_as_it_is(lm, written, scan):
    directory = written()
    loaded = load_lm(directory, quant="nf4", scan=scan, param_dtype=jnp.bfloat16)
    flat = flatten_dict({"lm": loaded.params}, sep="/")
    shapes = lm_shapes(loaded.config)
    assert {k: x.shape for k, x in flat.items()} == {k: x.shape for k, x in shapes.items()}
    kept = {k for k in flat if k.rsplit("/", 1)[1] not in ("codes", "scale_scale", "scale_mean", "scale")}
    assert kept == {"lm/token_embedding/embedding", "lm/head/kernel"}
    assert {flat[k].dtype for k in kept} == {jnp.dtype(jnp.bfloat16)}
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i], loaded.params["blocks"]) if scan else loaded.params[f"blocks_{i}"]
        for path, kernel in flatten_dict(lm.params[f"blocks_{i}"]).items():
            if path[-1] == "kernel":
                held = part[path[0]][path[1]]
                assert_same(dict(held), dict(quantise(np.asarray(kernel))))
    assert fingerprint(directory) == fingerprint(written())


def test_a_4_bit_llama_computes_what_its_dequantised_kernels_do(lm, written):
    loaded = load_lm(written(), quant="nf4")
    whole = jax.tree.map(
        lambda leaf: {"kernel": dequantise(leaf)} if isinstance(leaf, dict) else leaf,
        loaded.params,
        is_leaf=lambda leaf: isinstance(leaf, dict) and "codes" in leaf,
    )
    tokens = tokens_of((2, 5), TINY)
    found, expected = (
        jax.jit(Llama(config).apply)({"params": params}, tokens)
        for config, params in ((loaded.config, loaded.params), (TINY, whole))
    )
    assert_close(found, expected, 1e-4)
    assert np.abs(expected - Llama(TINY).apply({"params": lm.params}, tokens)).max() > 1e-3


@pytest.mark.parametrize("scan", [False, True])
def test_leaves_land_in_their_shardings_in_4_bits_too(written, scan):
    directory, mesh = written(), sharding.make_mesh((2, 2, 2))
    shardings = sharding.param_shardings(lm_shapes(lm_config(directory, scan=scan, quant="nf4")), mesh)
    loaded = load_lm(directory, scan=scan, quant="nf4", shardings=shardings.__getitem__)
    flat = flatten_dict({"lm": loaded.params}, sep="/")
    assert {path: leaf.sharding for path, leaf in flat.items()} == shardings
    assert not flat[f"lm/blocks{'' if scan else '_1'}/mlp/gate/codes"].sharding.is_fully_replicated
    assert_same(loaded.params, load_lm(directory, scan=scan, quant="nf4").params)


def test_a_kernel_that_4_bits_cannot_hold_is_named(written, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
        return tensors

    with pytest.raises(WeightsError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'.*NaN or infinity"):
        load_lm(written(spoil), quant="nf4")


def test_what_the_format_cannot_hold_is_not_exported(written, tmp_path):
    with pytest.raises(WeightsError, match="4-bit weights are not exported"):
        export_lm(tmp_path / "new", load_lm(written(), quant="nf4"))
    config = dataclasses.replace(TINY, adapter=Router())
    with pytest.raises(WeightsError, match=r"unexpected.*lm/adapter/down/bias"):
        export_lm(tmp_path / "new", LM(config, random_params(config)))
    assert not (tmp_path / "new").exists()

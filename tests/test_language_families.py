"""Families built like LLaMA: sliding windows, layers that differ, what config.json may say, and the start of a text.

Values, gradients and exports are compared with transformers in tests/parity/test_lm_parity.py.
"""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from llama_oracle import random_params, stacked, tokens_of
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.hugging_face import WeightsError
from eim_jax.models.kv_cache import init_cache, narrowed
from eim_jax.models.language import FAMILIES
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.language.rope import RopeScaling
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import make_mesh, param_spec
from eim_jax.pretrained import LM, export_lm, lm_config, lm_shapes, load_lm, resolve
from eim_jax.pretrained.tokenizer import bos_id, load_tokenizer

TINY = LlamaConfig(
    vocab=61, context=40, width=32, layers=3, heads=4, kv_heads=2, own_head_width=10, mlp=40, rope_theta=50.0
)
SHAPES = {
    "llama": {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 16)},
    "biased": {"qkv_bias": True, "out_bias": True},
    "mistral": {"window": 3},
    "phi3": {"window": 3},
    "qwen2": {"qkv_bias": True, "window": 3, "narrow": (False, True, True)},
    "qwen3": {"qk_norm": True, "tied": True},
    "smollm3": {"no_rope": (False, True, False), "tied": True},
    "gemma2": {
        "window": 3, "narrow": (True, False, True), "query_scale": 9, "tied": True, "norm_offset": True,
        "post_norms": True, "activation": "gelu_new", "embedding_scaled": True, "attention_cap": 0.4, "logit_cap": 0.7,
    },
    "gemma3_text": {
        "window": 3, "narrow": (True, False, True), "narrow_theta": 7.0, "query_scale": 9, "qk_norm": True,
        "tied": True, "norm_offset": True, "post_norms": True, "activation": "gelu_new", "embedding_scaled": True,
    },
}  # fmt: skip
SHAPES = {
    name: dataclasses.replace(TINY, model_type="llama" if name == "biased" else name, **fields)
    for name, fields in SHAPES.items()
}
FAMILY_NAMES = [name for name in SHAPES if name != "biased"]


def test_every_family_but_gpt2_is_here():
    assert FAMILIES.keys() - {"gpt2"} == set(FAMILY_NAMES)


def whole(config, params, tokens, valid=None):
    return jax.jit(Llama(config).apply)({"params": params}, tokens, valid)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(name, scan):
    """Prompts of 6, 2 and 4 tokens, padded on the right to 6, then one token at a time: past every window."""
    config, tokens, prompts = SHAPES[name], tokens_of((3, 14), SHAPES[name]), np.array([6, 2, 4])
    params = random_params(config)
    want = whole(config, params, tokens)
    if scan:
        config, params = dataclasses.replace(config, scan=True), stacked(params, config.layers)

    @jax.jit
    def read(cache, tokens, valid, positions):
        def method(lm):
            hidden, new = lm.hidden(lm.embed(tokens), valid=valid, positions=positions, cache=cache)
            return lm.logits(hidden), new

        return Llama(config).apply({"params": params}, method=method)

    rows, scale = np.arange(3), float(jnp.abs(want).max())
    valid = np.arange(6)[None] < prompts[:, None]
    positions = np.broadcast_to(np.arange(6), (3, 6))
    logits, cache = read(init_cache(config, 3, 14), tokens[:, :6], valid, positions)
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(logits[row, :length], want[row, :length], atol=1e-5 * scale, rtol=0)
    for step in range(8):
        at = prompts + step
        logits, cache = read(cache, tokens[rows, at][:, None], np.ones((3, 1), bool), at[:, None])
        np.testing.assert_allclose(logits[:, 0], want[rows, at], atol=1e-5 * scale, rtol=0)


def test_a_window_counts_tokens_and_not_the_padding_between_them():
    """By hand: 7 slots, of which 1 and 2 are padding; the query in slot 6 sees 0, 3, 4, 5, 6."""
    seen = jnp.asarray([[[[True, False, False, True, True, True, True]]]])
    found = narrowed(seen, 4, jnp.int32(6))
    np.testing.assert_array_equal(found[0, 0, 0], [False, False, False, True, True, True, True])
    np.testing.assert_array_equal(narrowed(seen, 5, jnp.int32(6)), seen)
    # A ring whose newest token is in slot 2: 3 is the oldest, then 4, 5, 6, 0, 1, 2.
    ring = jnp.ones((1, 1, 1, 7), bool).at[..., 5].set(False)
    np.testing.assert_array_equal(
        narrowed(ring, 4, jnp.int32(2))[0, 0, 0], [True, True, True, False, False, False, True]
    )
    causal = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    np.testing.assert_array_equal(narrowed(causal, 2, None)[0, 0], np.tril(np.triu(np.ones((5, 5), bool), -1)))


def test_a_window_as_long_as_the_text_changes_no_bit():
    config, tokens = SHAPES["mistral"], tokens_of((2, 12), TINY)
    params = random_params(config)
    one, other = (whole(dataclasses.replace(config, window=w), params, tokens) for w in (0, 12))
    np.testing.assert_array_equal(one, other)
    assert np.any(np.asarray(whole(config, params, tokens)) != np.asarray(one))


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_is_read_as_it_was_written(name, tmp_path):
    config = dataclasses.replace(SHAPES[name], scan=True)
    lm = LM(config, stacked(random_params(SHAPES[name]), config.layers))
    export_lm(tmp_path / "one", lm)
    again = load_lm(tmp_path / "one", scan=True)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    export_lm(tmp_path / "two", again)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_parts_of_a_tensor_are_told_from_another_number_of_rows(tmp_path):
    """A fused tensor of other heads is named by its key and shape, not cut where ours ends."""
    export_lm(tmp_path, LM(SHAPES["phi3"], random_params(SHAPES["phi3"])))
    tensors, key = load_file(tmp_path / "model.safetensors"), "model.layers.1.self_attn.qkv_proj.weight"
    assert tensors[key].shape == (40 + 20 + 20, 32)
    save_file({**tensors, key: np.concatenate([tensors[key]] * 2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.qkv_proj.* has shape \(160, 32\), not \(40, 32\)"):
        load_lm(tmp_path)
    save_file({name: x for name, x in tensors.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.qkv_proj.* is missing"):
        load_lm(tmp_path)


def test_large_weights_are_several_files_of_at_most_a_size_and_an_index(tmp_path):
    """Written, read, and written again with other files beside: nothing old is left, nothing differs."""
    lm = LM(SHAPES["llama"], random_params(SHAPES["llama"]))
    export_lm(tmp_path, lm, shard="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {file.name: file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert files.keys() == set(index["weight_map"].values()) and len(files) > 2
    assert max(files.values()) < 20_000 + 4_000  # and each file's header
    jax.tree.map(np.testing.assert_array_equal, load_lm(tmp_path).params, lm.params)
    export_lm(tmp_path, lm)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    with pytest.raises(WeightsError, match="'5', is no size such as 5GB"):
        export_lm(tmp_path, lm, shard="5")


def test_weights_are_written_in_another_dtype_and_config_json_says_so(tmp_path):
    lm = LM(SHAPES["qwen3"], random_params(SHAPES["qwen3"]))
    export_lm(tmp_path, lm, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype.name for x in load_file(tmp_path / "model.safetensors").values()} == {"bfloat16"}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), lm.params)
    jax.tree.map(np.testing.assert_array_equal, load_lm(tmp_path).params, rounded)


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name != "qwen2"])
def test_biases_that_a_folded_adapter_left_are_written_where_files_can_state_them(name, tmp_path):
    """As the family's own attention_bias, the output's 0; Mistral's and Phi-3's as a Qwen2, which is the same."""
    config = dataclasses.replace(SHAPES[name], qkv_bias=True)
    params, tokens = random_params(config), tokens_of((2, 7), TINY)
    export_lm(tmp_path, LM(config, params))
    again = load_lm(tmp_path)
    other = name in ("mistral", "phi3")
    assert again.config == dataclasses.replace(config, out_bias=not other, model_type="qwen2" if other else name)
    np.testing.assert_array_equal(whole(again.config, again.params, tokens), whole(config, params, tokens))


def test_an_export_names_the_tokenizers_own_ends(tmp_path):
    tokenizer = types.SimpleNamespace(bos_token_id=None, eos_token_id=7)
    lm = LM(SHAPES["llama"], random_params(SHAPES["llama"]))
    for given, ends in ((None, (1, 2)), (tokenizer, (None, 7))):
        export_lm(tmp_path, lm, given)
        content = json.loads((tmp_path / "config.json").read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == ends


@pytest.mark.parametrize("name", SHAPES)
def test_all_linear_layers_of_the_blocks_can_be_held_in_4_bits(name):
    config = dataclasses.replace(SHAPES[name], width=64, own_head_width=0, mlp=128, quant="nf4")
    kernels = {
        path.rpartition("/")[0] for path in lm_shapes(dataclasses.replace(config, quant="none")) if "kernel" in path
    }
    held = {path.rpartition("/")[0] for path in lm_shapes(config) if path.endswith("/codes")}
    assert held == {path for path in kernels if "blocks" in path} and len(held) == 7 * config.layers


STATED = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {**STATED, "model_type": "gemma3_text", "intermediate_size": 40}
LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED = {
    "dynamic": (
        {**STATED, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported, only 'default', 'linear' and 'llama3'",
    ),
    "yarn": ({**STATED, "rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    "factor": (
        {**STATED, "rope_scaling": {**LINEAR, "factor": "2"}},
        "rope_parameters.factor is '2', not a number above 0",
    ),
    "shrunk": ({**STATED, "rope_scaling": {**LINEAR, "factor": 0.5}}, "the factor of rope_type 'linear' is 0.5"),
    "window": ({**STATED, "model_type": "mistral", "sliding_window": -4}, "sliding_window is -4, not a whole number"),
    "layers": ({**STATED, "model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "no_rope is given for 3 layers of 2"),
    "flags": (
        {**STATED, "model_type": "smollm3", "no_rope_layers": [1, "0"]},
        r"no_rope_layers is \[1, '0'\], not a list of 0 and 1",
    ),
    "pattern": ({**GEMMA, "sliding_window_pattern": "6"}, "sliding_window_pattern is '6', not a whole number"),
    "from": (
        {**STATED, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "1"},
        "max_window_layers is '1', not a whole number",
    ),
    "cap": (
        {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": -1.0},
        "attn_logit_softcapping is -1.0, not a number above 0",
    ),
    "biased": ({**STATED, "model_type": "mistral", "attention_bias": True}, "attention_bias True is not supported"),
    "both ways": ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    "capped": ({**GEMMA, "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported, only None"),
    "scaled": (
        {**GEMMA, "rope_parameters": {"full_attention": {}, "sliding_attention": LINEAR}},
        "rope_parameters.sliding_attention is scaled",
    ),
}


@pytest.mark.parametrize(("stated", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_by_its_field(stated, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(WeightsError, match=message):
        lm_config(tmp_path)


def test_older_files_say_the_same_in_other_words(tmp_path):
    """Fields of transformers before 4.53: no layer_types; Gemma's two thetas side by side."""

    def shape(**content):
        (tmp_path / "config.json").write_text(json.dumps({**STATED, "num_hidden_layers": 7, **content}))
        return lm_config(tmp_path)

    qwen = {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 5}
    assert shape(**qwen, use_sliding_window=True).narrow == (False,) * 5 + (True,) * 2
    assert shape(**qwen).window == 0
    gemma = shape(model_type="gemma3_text", sliding_window=8, rope_theta=1e6, rope_local_base_freq=1e4)
    assert (gemma.rope_theta, gemma.narrow_theta, gemma.narrow) == (1e6, 1e4, (True,) * 5 + (False, True))
    assert shape(model_type="gemma2", sliding_window=8).narrow == (True, False) * 3 + (True,)
    uncapped = shape(model_type="gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (uncapped.attention_cap, uncapped.logit_cap) == (0, 0)
    assert shape(model_type="smollm3").no_rope == (False, False, False, True) + (False,) * 3


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_fields_that_a_file_leaves_out_are_those_of_transformers(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    ours, theirs = lm_config(tmp_path), AutoConfig.for_model(name)
    assert (ours.vocab, ours.width, ours.layers, ours.mlp) == (
        theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.intermediate_size,
    )  # fmt: skip
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.head_width, ours.context, ours.eps) == (width, theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.tied == theirs.tie_word_embeddings and ours.window == (theirs.to_dict().get("sliding_window") or 0)
    caps = [theirs.to_dict().get(f"{what}_logit_softcapping") or 0 for what in ("attn", "final")]
    assert [ours.attention_cap, ours.logit_cap] == caps
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.narrow_theta == rope.get("sliding_attention", {"rope_theta": 0})["rope_theta"]
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * ours.layers
    narrow = tuple(kind == "sliding_attention" for kind in kinds)
    assert (ours.narrow or (False,) * ours.layers) == narrow
    assert (ours.no_rope or (False,) * ours.layers) == tuple(
        not turned for turned in getattr(theirs, "no_rope_layers", [1] * ours.layers)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_every_leaf_has_its_place_on_a_mesh(name):
    mesh = make_mesh((2, 2, 2))
    for path, leaf in lm_shapes(SHAPES[name]).items():
        split = any(param_spec(path, leaf.shape, mesh))  # an error where no rule knows the name
        assert split or not path.endswith(("kernel", "embedding")), path


def test_a_text_starts_with_bos_where_the_tokenizers_files_say_so(tmp_path):
    """By its ids; by `add_bos_token`; or by its class, where nothing else says it."""
    assert bos_id(load_tokenizer("miniature/llama")) == 1
    assert bos_id(load_tokenizer("miniature/gpt2")) is None
    assert bos_id(FAMILIES["llama"].plan_tokenizer) == 1 and bos_id(None) is None
    shutil.copytree(resolve("miniature/llama"), tmp_path / "mine")
    file, parts = tmp_path / "mine" / "tokenizer_config.json", tmp_path / "mine" / "tokenizer.json"
    parts.write_text(json.dumps({**json.loads(parts.read_text()), "post_processor": None}))
    for content, starts in (
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "GemmaTokenizerFast"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
    ):
        file.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **content}))
        tokenizer = load_tokenizer(tmp_path / "mine")
        assert bos_id(tokenizer) == (1 if starts else None), content
        tokenizer.save_pretrained(tmp_path / "again")  # as an export does, under another class's name
        assert bos_id(load_tokenizer(tmp_path / "again")) == (1 if starts else None), content
        shutil.rmtree(tmp_path / "again")


def test_meta_s_tokenizer_model_alone_starts_with_bos(shared_original, tmp_path):
    shutil.copy(shared_original("tokenizers") / "llama" / "tokenizer.model", tmp_path)
    assert bos_id(load_tokenizer(tmp_path)) == 1


def test_without_bos_and_inserted_tokens_the_text_predicts_from_its_second_token_on():
    """LLaMA-Adapter's prompts on an LM such as Qwen's: [:, i] is the LM's own output at token i - 1."""
    adapter = ZeroInit(prompts=2, layers=2)
    lm = Llama(dataclasses.replace(SHAPES["qwen3"], adapter=adapter))
    params = {"lm": random_params(lm.config)}
    vlm = VLM(visual=lm, text=lm, st=lm, lm=lm)  # the LM alone is asked
    tokens, seen = tokens_of((2, 5), TINY), jnp.array([True, False])
    visual = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 32), np.float32))

    def own(module):
        steer = module.steer(visual, seen)
        return module.hidden(module.embed(tokens), steer=steer)[0]

    want = lm.apply({"params": params["lm"]}, method=own)
    found = vlm.lm_hidden(params, visual, tokens, jnp.ones((2, 5), bool), has_image=seen)
    np.testing.assert_array_equal(found[:, 1:], want[:, :-1])
    np.testing.assert_array_equal(vlm.starts(seen), [False, False])
    plain = dataclasses.replace(vlm, lm=Llama(SHAPES["qwen3"]))  # ClipCap's: the image's tokens stand before the text
    np.testing.assert_array_equal(plain.starts(seen), seen)
    with pytest.raises(ValueError, match="the language model has nothing to read"):
        vlm.lm_input(params, tokens[:, :0], jnp.ones((2, 0), bool), visual=visual)


def test_the_frequencies_of_llama_3_by_the_formula_of_its_paper():
    """Turns within the pretraining context: above 4 as they are, below 1 divided by 8, between in proportion."""
    frequency = 2 * np.pi / np.array([100.0, 2048.0, 4096.0, 8192.0, 20000.0])  # 81.92, 4, 2, 1, 0.4096 turns
    found = RopeScaling("llama3", 8.0).scaled(frequency)
    assert_close(found / frequency, np.array([1, 1, (2 / 3) / 8 + 1 / 3, 1 / 8, 1 / 8]), 1e-12)

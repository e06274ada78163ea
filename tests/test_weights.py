import dataclasses
import json
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from eim_jax.models.vision.clip import CLIPVision
from eim_jax.parallel import sharding
from eim_jax.pretrained import (
    WeightsError,
    clip_config,
    clip_shapes,
    export_clip,
    export_lm,
    fingerprint,
    lm_config,
    lm_shapes,
    load_clip,
    load_lm,
    resolve,
)

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def rewritten(source: str, directory: pathlib.Path, change=None, **config) -> pathlib.Path:
    """A copy of a golden checkpoint with its tensors changed by `change` (dict -> dict) and config fields replaced."""
    tensors = load_file(GOLDENS / source / "model.safetensors")
    save_file(change(tensors) if change else tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((GOLDENS / source / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_every_leaf_of_the_models_is_filled_with_its_shape():
    for scan in (False, True):
        clip, lm = load_clip(GOLDENS / "clip", scan=scan), load_lm(GOLDENS / "gpt2", scan=scan)
        expected = {**clip_shapes(clip.vision, clip.text), **lm_shapes(lm.config)}
        got = flatten_dict({**clip.params, "lm": lm.params}, sep="/")
        assert {k: x.shape for k, x in got.items()} == {k: x.shape for k, x in expected.items()}


@pytest.mark.parametrize("scan", [False, True])
def test_export_writes_the_very_tensors_that_were_loaded(tmp_path, scan):
    export_clip(tmp_path / "clip", load_clip(GOLDENS / "clip", scan=scan))
    export_lm(tmp_path / "gpt2", load_lm(GOLDENS / "gpt2", scan=scan))
    for name in ("clip", "gpt2"):
        written = load_file(tmp_path / name / "model.safetensors")
        assert_same(written, load_file(GOLDENS / name / "model.safetensors"))
    assert lm_config(tmp_path / "gpt2") == lm_config(GOLDENS / "gpt2")
    assert clip_config(tmp_path / "clip") == clip_config(GOLDENS / "clip")


def test_exported_configurations_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_clip(tmp_path / "clip", load_clip(GOLDENS / "clip"))
    export_lm(tmp_path / "gpt2", load_lm(GOLDENS / "gpt2"))
    gpt2 = transformers.AutoConfig.from_pretrained(tmp_path / "gpt2")
    assert (gpt2.model_type, gpt2.n_layer, gpt2.n_embd, gpt2.vocab_size) == ("gpt2", 3, 24, 97)
    clip = transformers.AutoConfig.from_pretrained(tmp_path / "clip")
    assert (clip.model_type, clip.vision_config.hidden_size, clip.text_config.eos_token_id) == ("clip", 24, 2)


def test_prompts_travel_in_a_file_of_their_own(tmp_path):
    clip = load_clip(GOLDENS / "clip")
    vision = dataclasses.replace(clip.vision, prompts=2, prompt_hidden=5, mean=(0.5, 0.4, 0.3))
    pixels = jnp.zeros((1, 24, 24, 3))
    prompt = jax.jit(CLIPVision(vision).init)(jax.random.key(0), pixels)["params"]["prompt"]
    params = {**clip.params, "visual": {**clip.params["visual"], "prompt": prompt}}
    export_clip(tmp_path, clip._replace(vision=vision, params=params))
    loaded = load_clip(tmp_path)
    assert loaded.vision == vision
    assert_same(loaded.params, params)
    with_prompts = fingerprint(tmp_path)
    export_clip(tmp_path, clip)  # again, without: the old prompts must not stay behind
    assert load_clip(tmp_path).vision.prompts == 0
    assert fingerprint(tmp_path) != with_prompts


def test_keys_with_and_without_prefix_and_known_buffers_load_alike(tmp_path):
    def bare(tensors):
        tensors = {k.removeprefix("transformer."): x for k, x in tensors.items()}
        mask = np.tril(np.ones((1, 1, 32, 32), np.uint8))
        return {**tensors, "h.0.attn.bias": mask, "h.2.attn.masked_bias": np.float32([-1e4])}

    assert_same(load_lm(rewritten("gpt2", tmp_path, bare)).params, load_lm(GOLDENS / "gpt2").params)


def test_shards_load_as_one_file_does(tmp_path):
    tensors = load_file(rewritten("gpt2", tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(load_lm(tmp_path).params, load_lm(GOLDENS / "gpt2").params)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors.*missing"):
        load_lm(tmp_path)


def test_tied_head_is_accepted_only_if_it_is_the_embedding(tmp_path):
    def with_head(tensors):
        return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + head}

    head = np.float32(0)
    load_lm(rewritten("gpt2", tmp_path, with_head))
    head = np.float32(1e-3)
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' differs from 'wte\.weight'"):
        load_lm(rewritten("gpt2", tmp_path, with_head))


def test_a_missing_an_unexpected_and_a_misshapen_key_are_named_together(tmp_path):
    def spoil(tensors):
        tensors["transformer.h.1.ln_9.weight"] = tensors.pop("transformer.h.1.ln_1.weight")
        tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T.copy()
        return tensors

    with pytest.raises(WeightsError) as error:
        load_lm(rewritten("gpt2", tmp_path, spoil))
    message = str(error.value)
    assert "'h.1.ln_1.weight' (our lm/blocks_1/ln_1/scale) is missing" in message
    assert "'h.1.ln_9.weight' is unexpected" in message
    assert "'h.0.mlp.c_fc.weight' (our lm/blocks_0/mlp/up/kernel) has shape (96, 24), not (24, 96)" in message


def test_deeper_configuration_than_file_names_what_is_missing(tmp_path):
    with pytest.raises(WeightsError, match=r"'h\.3\.ln_1\.weight'.*and \d+ more"):
        load_lm(rewritten("gpt2", tmp_path, n_layer=4))


def test_missing_and_broken_files_are_named_with_a_remedy(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        load_lm(tmp_path)
    rewritten("gpt2", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read.*download it again"):
        load_lm(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin (is a file of PyTorch's.*\.\[torch\]|cannot be read)"):
        load_lm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON"):
        load_lm(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mamba"),
        ("tie_word_embeddings", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("activation_function", "swish"),
    ],
)
def test_a_gpt2_of_another_kind_is_refused_by_field(tmp_path, field, value):
    with pytest.raises(WeightsError, match=field):
        load_lm(rewritten("gpt2", tmp_path, **{field: value}))


def test_a_clip_of_another_kind_is_refused_by_field(tmp_path):
    config = json.loads((GOLDENS / "clip" / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"vision_config\.hidden_act 'relu'"):
        load_clip(rewritten("clip", tmp_path, vision_config={**config["vision_config"], "hidden_act": "relu"}))
    with pytest.raises(WeightsError, match="eos_token_id 50"):
        load_clip(rewritten("clip", tmp_path, text_config={**config["text_config"], "eos_token_id": 50}))


def test_bfloat16_files_and_parameters(tmp_path):
    def lower(tensors):
        return {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}

    exact, low = load_lm(GOLDENS / "gpt2"), load_lm(rewritten("gpt2", tmp_path, lower), param_dtype=jnp.bfloat16)
    assert_same(low.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact.params))


@pytest.mark.parametrize("scan", [False, True])
def test_leaves_land_in_their_shardings(scan):
    mesh = sharding.make_mesh((2, 2, 2))
    shardings = sharding.param_shardings(lm_shapes(lm_config(GOLDENS / "gpt2", scan=scan)), mesh)
    lm = load_lm(GOLDENS / "gpt2", scan=scan, shardings=shardings.__getitem__)
    block = lm.params["blocks" if scan else "blocks_0"]
    kernel = block["mlp"]["up"]["kernel"]
    assert kernel.sharding == shardings[f"lm/blocks{'' if scan else '_0'}/mlp/up/kernel"]
    assert not kernel.sharding.is_fully_replicated
    assert_same(lm.params, load_lm(GOLDENS / "gpt2", scan=scan).params)


def test_fingerprint_sees_weights_and_configuration_but_not_the_directory(tmp_path):
    shutil.copytree(GOLDENS / "gpt2", tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(GOLDENS / "gpt2")
    other = tmp_path / "other"
    other.mkdir()
    assert fingerprint(rewritten("gpt2", other, layer_norm_epsilon=1e-6)) != fingerprint(GOLDENS / "gpt2")
    params = load_lm(GOLDENS / "gpt2").params
    changed = jax.tree.map(lambda x: x, params)
    changed["ln_f"]["bias"] = changed["ln_f"]["bias"].at[0].add(1e-6)
    assert fingerprint(params) == fingerprint(load_lm(GOLDENS / "gpt2").params) != fingerprint(changed)


def test_paths_that_are_no_directory_say_what_to_give(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    assert resolve("miniature/gpt2").parts[-3:] == ("miniature", "towers", "gpt2")
    with pytest.raises(WeightsError, match="is not a directory"):
        resolve(tmp_path / "absent")

    def offline(repo, *, revision, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsError, match=r"some/model is no local directory.*no network.*hf download some/model"):
        resolve("some/model")


def test_hub_ids_may_name_a_revision(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, *, revision, allow_patterns: asked.append((repo, revision)) or str(tmp_path),
    )
    assert resolve("openai/clip-vit-base-patch32@refs/pr/7") == tmp_path
    assert resolve("gpt2") == tmp_path
    assert asked == [("openai/clip-vit-base-patch32", "refs/pr/7"), ("gpt2", None)]


def test_where_main_has_no_safetensors_the_hubs_own_conversion_is_taken(tmp_path, monkeypatch, capsys):
    for revision, file in ((None, "config.json"), ("refs/pr/3", "model.safetensors")):
        folder = tmp_path / str(revision)
        folder.mkdir(parents=True)
        (folder / file).touch()
    offers = {
        "clip": [("Update README", 5, "open"), ("Add safetensors", 4, "closed"), ("Adding `safetensors`", 3, "open")],
        "lm": [],
    }

    def discussions(_, repo, *, author, discussion_type):
        assert (author, discussion_type) == ("SFconvertbot", "pull_request")
        for title, num, status in offers[repo]:
            yield huggingface_hub.Discussion(title, status, num, repo, "model", author, True, None, "")

    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", discussions)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, *, revision, allow_patterns: str(tmp_path / str(revision))
    )
    assert resolve("clip") == tmp_path / "refs/pr/3"
    assert "clip: no safetensors on main, taking the hub's conversion refs/pr/3" in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"lm has no safetensors on the hub.*hf download.*\.\[torch\]"):
        resolve("lm")
    (tmp_path / "None" / "config.json").rename(tmp_path / "None" / "tokenizer.json")
    assert resolve("lm") == tmp_path / "None"

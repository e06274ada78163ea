"""PEFT's folders, laid out by hand from its format: what they fill, what is written again, what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_quant import oracle as nf4_of

from eim_jax.commands.exporting import LEAVES, write_arm
from eim_jax.config import ConfigError
from eim_jax.models.language import family_of
from eim_jax.models.language.gpt2 import GPT2Config
from eim_jax.models.language.llama import LlamaConfig
from eim_jax.models.lora import LoRA
from eim_jax.models.quant import NF4
from eim_jax.models.vision.clip import CLIPVisionConfig
from eim_jax.pretrained import LM, WeightsError, export_lm, load_lm, peft, resolve
from eim_jax.training import arm_model, initial, setup

RANK, ALPHA, LAYERS = 3, 6, 4
SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_rslora": False}
KEY = "base_model.model.model.layers.{}.self_attn.{}_proj"


def folder(place, tensors: dict, **settings):
    place.mkdir(exist_ok=True)
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return place


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def of_llama(width=128, names="qo") -> dict:
    found = {}
    for layer in range(LAYERS):
        for name in names:
            found[f"{KEY.format(layer, name)}.lora_A.weight"] = layer + noise(RANK, width)
            found[f"{KEY.format(layer, name)}.lora_B.weight"] = 0.1 * noise(width, RANK)
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(inputs of a run that starts from an adapter, its folder)."""
    place = folder(tmp_path_factory.mktemp("peft") / "adapter", of_llama())
    arm = {"lora": ("lm/blocks.*/attn/(q|out)",), "lora_rank": RANK, "lora_alpha": float(ALPHA)}
    fields = {f"arm.baseline.{name}": value for name, value in arm.items()}
    fields |= {"data.scenes": 8, "arms": ("baseline",), "init": str(place), "mesh": (1, 1, -1)}
    return setup.load(tiny.config_of("miniature_lora", **fields), place.parent, data=False), place


def asking(inputs, init, **arm):
    config = dataclasses.replace(inputs.config, init=str(init))
    changed = dataclasses.replace(config.arm["baseline"], **arm)
    return dataclasses.replace(inputs, config=dataclasses.replace(config, arm={"baseline": changed}))


def refused(inputs) -> str:
    arm = inputs.config.arm["baseline"]
    vlm = arm_model.model(inputs, arm)
    with pytest.raises(WeightsError) as error:
        initial.check(inputs, arm, vlm, arm_model.shapes(inputs, arm, vlm))
    return str(error.value)


def test_an_adapter_fills_the_low_rank_leaves_is_written_as_it_was_and_merges_into_the_kernels(given, tmp_path):
    inputs, place = given
    _, params = arm_model.start(inputs, inputs.config.arm["baseline"])
    theirs = load_file(place / "adapter_model.safetensors")
    leaves = {path: np.asarray(leaf) for path, leaf in params.items() if "/lora/" in path}
    assert len(leaves) == len(theirs) == 4 * LAYERS
    for layer in range(LAYERS):
        for name, mine in (("q", "q"), ("o", "out")):
            for ours, end in (("a", "A"), ("b", "B")):
                leaf = leaves[f"lm/blocks_{layer}/attn/{mine}/lora/{ours}"]
                np.testing.assert_array_equal(leaf, theirs[f"{KEY.format(layer, name)}.lora_{end}.weight"].T)
    write_arm(inputs, "baseline", params, tmp_path / "out", merge=True)
    again = load_file(tmp_path / "out/lora/lm/adapter_model.safetensors")
    assert again.keys() == theirs.keys() and all(np.array_equal(again[key], theirs[key]) for key in theirs)
    written = json.loads((tmp_path / "out/lora/lm/adapter_config.json").read_text())
    assert SETTINGS.items() <= written.items() and written["target_modules"] == ["o_proj", "q_proj"]
    assert set(leaves) <= load_file(tmp_path / "out" / LEAVES).keys()
    merged = load_lm(tmp_path / "out/lm").params
    for layer in range(LAYERS):
        for name in ("q", "out", "k"):
            found = merged[f"blocks_{layer}"]["attn"][name]["kernel"]
            path = f"lm/blocks_{layer}/attn/{name}"
            expected = np.asarray(params[f"{path}/kernel"], np.float64)
            if name != "k":
                expected = expected + 2.0 * leaves[f"{path}/lora/a"].astype(np.float64) @ leaves[f"{path}/lora/b"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    back = asking(inputs, tmp_path / "out/lora/lm")
    _, found = arm_model.start(back, back.config.arm["baseline"])
    assert all(np.array_equal(found[path], leaf) for path, leaf in leaves.items())


def test_an_adapter_that_is_not_the_arms_is_refused_with_what_to_set(given, tmp_path):
    inputs, _ = given
    for settings, said in (
        ({"r": 5}, "lora_rank is 3, and r in adapter_config.json is another: set it to 5"),
        ({"lora_alpha": 8}, "lora_alpha is 6.0, and lora_alpha in adapter_config.json is another: set it to 8.0"),
        ({"use_rslora": True}, "lora_rs is False, and use_rslora in adapter_config.json is True: set it to True"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "merge it in PEFT (merge_and_unload)"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "it belongs to other weights than the base's own"),
        ({"bias": "all"}, "only adapters that tune no biases are read"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA is read"),
        ({"r": "x"}, "r is 'x', not a number"),
    ):
        assert said in refused(asking(inputs, folder(tmp_path / "a", of_llama(), **settings))), said
    ours = tmp_path / "export" / "lora" / "lm"
    ours.mkdir(parents=True)
    (tmp_path / "export" / LEAVES).touch()
    folder(ours, of_llama(), rank_pattern={"qkv_proj": 9})  # as we write Phi-3's
    assert f"in an export of this package: give {tmp_path / 'export' / LEAVES}" in refused(asking(inputs, ours))
    other = folder(tmp_path / "b", of_llama(names="qok"))
    assert "lora names: set that to ('lm/blocks.*/attn/k', 'lm/blocks.*/attn/out', 'lm/blocks.*/attn/q')" in refused(
        asking(inputs, other)
    )
    some = {key: x for key, x in of_llama(names="q").items() if ".layers.2." in key}
    assert "set that to ('lm/blocks_2/attn/q',)" in refused(asking(inputs, folder(tmp_path / "c", some)))
    wide = folder(tmp_path / "d", of_llama(width=64))
    assert "q_proj.lora_A.weight' (our lm/blocks_0/attn/q/lora/a) has shape (3, 64), not (3, 128)" in refused(
        asking(inputs, wide)
    )
    foreign = {key.replace("self_attn", "attention"): x for key, x in of_llama().items()}
    assert "are none of the towers': set config.towers to its base" in refused(
        asking(inputs, folder(tmp_path / "e", foreign))
    )
    (tmp_path / "e/adapter_config.json").unlink()
    assert "adapter_config.json is not beside it" in refused(asking(inputs, tmp_path / "e"))
    plain = asking(inputs, tmp_path / "out", lora=())
    with pytest.raises(ConfigError, match="--merge: arm baseline has no low-rank terms"):
        write_arm(plain, "baseline", {}, tmp_path / "f", merge=True)


def test_over_4_bits_the_terms_are_merged_into_what_the_codes_stand_for_and_that_is_said(given, tmp_path, capsys):
    inputs, _ = given
    config = LlamaConfig(vocab=1000, context=64, width=128, layers=LAYERS, heads=4, kv_heads=4, mlp=64)
    plain = tiny.loud(family_of(config).build(config).init, jnp.zeros((1, 1), jnp.int32))
    export_lm(tmp_path / "lm", LM(config, plain))
    for file in resolve("miniature/llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "lm")
    towers = dataclasses.replace(inputs.config.towers, lm=str(tmp_path / "lm"), quant="nf4")
    packed = setup.load(dataclasses.replace(inputs.config, towers=towers), tmp_path, data=False)
    _, params = arm_model.start(packed, packed.config.arm["baseline"])
    path = "lm/blocks_1/attn/q"
    assert f"{path}/codes" in params and f"{path}/kernel" not in params
    write_arm(packed, "baseline", params, tmp_path / "out", merge=True)
    found = load_lm(tmp_path / "out/lm").params["blocks_1"]["attn"]
    terms = 2.0 * np.asarray(params[f"{path}/lora/a"], np.float64) @ np.asarray(params[f"{path}/lora/b"], np.float64)
    for name, more in (("q", terms), ("k", 0.0)):
        codes, _, scales = nf4_of(np.asarray(plain["blocks_1"]["attn"][name]["kernel"]))
        stored = NF4[codes] * np.repeat(scales, 64, axis=0)
        np.testing.assert_allclose(found[name]["kernel"], stored + more, rtol=0, atol=1e-6)
    said = "lm/: kernels that were held in 4 bits (nf4) are written whole"
    assert said in capsys.readouterr().out and f"\n- {said}" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/lora/lm/adapter_config.json").exists()


def test_maps_that_share_a_kernel_are_read_and_written_one_by_one_or_as_the_one_layer_that_they_are(tmp_path):
    """CLIP: an adapter on query and value alone leaves the key's part zero. GPT-2: one A for all three."""
    clip, gpt2 = CLIPVisionConfig(width=8, layers=1, heads=2), GPT2Config(width=8, layers=1, heads=2)
    name = "base_model.model.vision_model.encoder.layers.0.self_attn.{}_proj.lora_{}.weight"
    theirs = {name.format(which, "A"): noise(2, 8) + i for i, which in enumerate("qv")}
    theirs |= {name.format(which, "B"): noise(8, 2) - i for i, which in enumerate("qv")}
    shapes = {"visual/blocks_0/attn/qkv/lora/a": (8, 3, 2), "visual/blocks_0/attn/qkv/lora/b": (3, 2, 8)}
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    rows = peft.leaves_of(shapes, {"visual": clip}, theirs)
    a, b = (leaf.layout.load([theirs[key] for key in leaf.keys[0]]) for leaf in rows.values())
    for i, which in enumerate(("q", None, "v")):
        np.testing.assert_array_equal(a[:, i], theirs[name.format(which, "A")].T if which else 0)
        np.testing.assert_array_equal(b[i], theirs[name.format(which, "B")].T if which else 0)
    peft.write(tmp_path / "clip", dict(zip(shapes, (a, b), strict=True)), "visual", clip, LoRA(2), "some/clip")
    again = load_file(tmp_path / "clip/adapter_model.safetensors")
    assert again.keys() == theirs.keys() and all(np.array_equal(again[key], theirs[key]) for key in theirs)
    # "q_proj" alone would name the text tower's too.
    targets = json.loads((tmp_path / "clip/adapter_config.json").read_text())["target_modules"]
    assert targets == [f"vision_model.encoder.layers.0.self_attn.{which}_proj" for which in "qv"]

    down, up = noise(8, 2), noise(2, 3, 8)
    leaves = {"lm/blocks_0/attn/qkv/lora/a": down, "lm/blocks_0/attn/qkv/lora/b": up}
    leaves |= {"lm/blocks_0/attn/out/lora/a": down, "lm/blocks_0/attn/out/lora/b": up[:, 0]}
    peft.write(tmp_path / "gpt2", leaves, "lm", gpt2, LoRA(2, rs=True), "gpt2")
    found = load_file(tmp_path / "gpt2/adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.attn.c_attn"
    np.testing.assert_array_equal(found[f"{name}.lora_A.weight"], down.T)
    np.testing.assert_array_equal(found[f"{name}.lora_B.weight"], np.concatenate([up[:, i] for i in range(3)], 1).T)
    written = json.loads((tmp_path / "gpt2/adapter_config.json").read_text())
    assert written["fan_in_fan_out"] and written["use_rslora"]
    assert written["target_modules"] == ["attn.c_proj", "c_attn"]  # the MLP has a c_proj too

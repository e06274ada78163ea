"""What an export holds besides our own leaves: models of transformers' forms, a model card, a copy on the hub.

That transformers reads them and computes the same is tested in tests/parity.
"""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import export_cases
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from jinja2 import TemplateError
from safetensors.numpy import load_file
from test_chat_form import chatml, llama2
from tokenizers import AddedToken

from eim_jax.commands import exporting, model_card, pushing
from eim_jax.commands.exported_chat import chat_template
from eim_jax.commands.exported_lms import language_models, whole
from eim_jax.config import ConfigError, Data
from eim_jax.data.conversation import message
from eim_jax.data.datasets import chat_prompt
from eim_jax.data.rows import prompt_ids
from eim_jax.models.language.llama import Llama
from eim_jax.models.quant import quantise
from eim_jax.pretrained import load_lm
from eim_jax.pretrained.llava import why_not
from eim_jax.pretrained.tokenizer import bos_id
from eim_jax.training import arm_model, partition, setup
from eim_jax.utils.files import write_json

SCORES = {"greedy": {"accuracy": 61.5, "notes": {"accuracy_low": 55.0, "accuracy_high": 68.0}}}


@pytest.fixture(scope="module")
def lavin(tmp_path_factory):
    """(inputs, vlm, parameters, the exported folder) of a LaVIN whose adapters do something."""
    home = tmp_path_factory.mktemp("lavin")
    inputs, vlm, params = export_cases.loud_arm(export_cases.config_of("lavin"), home / "run")
    (home / "run" / "baseline").mkdir(parents=True)
    write_json(home / "run" / "run.json", {"command": "python -m eim_jax.main --config=mine", "versions": {"jax": "0"}})
    write_json(home / "run" / "baseline" / "scores_test.json", SCORES)
    weights = exporting.Weights("bfloat16", "1MB")
    exporting.write_arm(inputs, "baseline", params, home / "out", weights=exporting.DEFAULT)
    exporting.write_arm(inputs, "baseline", params, home / "half", weights=weights)
    return inputs, vlm, params, home / "out"


@pytest.mark.parametrize(("name", "pictured"), [("lm_with_image", True), ("lm_text_only", False)])
def test_a_lavin_is_a_model_for_each_modality(lavin, name, pictured):
    """Each folder gives the logits of the routed model on rows of its modality."""
    _, vlm, params, out = lavin
    lm, tree = load_lm(out / name), partition.unflatten(params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, lm.config.vocab, (2, 9), np.int32))

    def routed(params):
        apply = lambda *x, **more: vlm.lm.apply({"params": params}, *x, **more)  # noqa: E731
        steer = apply(None, jnp.full(2, pictured), method="steer")
        hidden, _ = apply(apply(tokens, method="embed"), steer=steer, method="hidden")
        return apply(hidden, method="logits")

    expected = jax.jit(routed)(tree["lm"])
    assert_close(jax.jit(Llama(lm.config).apply)({"params": lm.params}, tokens), expected)


def test_a_router_that_routes_nothing_is_one_model(lavin):
    inputs, vlm, params, _ = lavin
    quiet = {path: leaf * 0 if "/adapter/up/" in path else leaf for path, leaf in params.items()}
    found = language_models(inputs, vlm, quiet, set())
    assert list(found.folders) == ["lm"] and found.reads_images is found.folders["lm"]


def test_weights_of_half_the_bytes_and_of_several_files(lavin):
    out = lavin[3].parent / "half"
    index = json.loads((out / "llava" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    one = load_file(out / "llava" / index["weight_map"]["multi_modal_projector.linear_1.weight"])
    assert {x.dtype.name for x in one.values()} == {"bfloat16"}
    assert json.loads((out / "lm_with_image" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype.name for x in load_file(out / "trained.safetensors").values()} == {"float32"}


def test_the_card_says_what_was_trained_on_what_how_well_and_how(lavin):
    inputs, _, _, out = lavin
    card = (out / "README.md").read_text()
    for folder in ("lm_with_image", "lm_text_only", "llava"):
        assert (out / folder / "README.md").read_text() == card
        assert f"`{folder}/`" in card
    assert "without contrastive losses, on the towers" in card and "(EIM)" not in card.partition("## Data")[0]
    assert "| base | `st/.*`, `lm/adapter/.*` | 1 base | 2 steps | 8 |" in card
    assert "\n`miniature_qa`: scenes `8`, form `QCM-EA`.\n" in card
    assert "python -m eim_jax.main --config=mine" in card and "jax `0`" in card
    assert "| greedy search | 61.500 [55.000, 68.000] |" in card
    assert card.startswith("---\nlibrary_name: eim_jax\n") and "base_model" not in card.partition("\n---\n")[0]
    towers = dataclasses.replace(inputs.config.towers, lm="org/tiny-lm@main", clip="/home/me/clip")
    named = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, towers=towers))
    assert "base_model:\n- org/tiny-lm\ntags" in model_card.text(named, "baseline", [])
    bare = dataclasses.replace(inputs, workdir=out)  # neither scores nor a command
    assert "was not scored" in model_card.text(bare, "baseline", [], ["llava/: no"])


def test_kernels_in_4_bits_are_exported_as_the_model_computes_them():
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((2, 64, 8), np.float32))
    leaves = {f"lm/blocks/mlp/up/{name}": x for name, x in jax.vmap(quantise)(stack).items()}
    found = whole({**leaves, "lm/blocks/mlp/up/bias": jnp.ones((2, 8)), "lm/norm_f/scale": jnp.ones(4, jnp.bfloat16)})
    assert found.keys() == {"lm/blocks/mlp/up/kernel", "lm/blocks/mlp/up/bias", "lm/norm_f/scale"}
    assert {x.dtype.name for x in found.values()} == {"float32"}
    kernel = found["lm/blocks/mlp/up/kernel"]
    largest = np.abs(stack).max(1, keepdims=True)  # of a block: 64 rows; half the widest gap of NF4 is 0.152 of it
    assert (np.abs(kernel - stack) < 0.16 * largest).all()


def test_a_chat_template_writes_the_words_of_training_and_refuses_what_was_never_met(lavin):
    """Two turns of instruction data in our own words and in the template's; then what has no form."""
    inputs, vlm, _, out = lavin
    data = Data(kind="instruct", own={"multi_turn": True, "template": "plain"}, seam="spaced")
    inputs = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, data=data))
    pictured = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": pictured}, {"role": "assistant", "content": " A cat."}]
    turns += [{"role": "user", "content": "Which colour?"}]

    def said(turns, template):
        return inputs.lm_tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)

    words = chat_prompt(data, "Which colour?", [("What is it?", "A cat.")])
    assert words.count("A cat.") == 1
    assert said(turns, chat_template(inputs, vlm)) == f"<s>Image: <image>{words}"
    single = (out / "llava" / "chat_template.jinja").read_text()
    shown = chat_prompt(lavin[0].config.data, "What is it?")
    assert said(turns[:1], single) == f"<s>Image: <image>{shown}"
    for said_turns, why in (
        (turns, "trained on single questions"),
        ([{"role": "user", "content": "What is it?"}], "questions about a picture"),
        ([{"role": "user", "content": [{"type": "image"}, *pictured]}], "one picture at a time"),
        ([{"role": "system", "content": "Be brief."}, turns[0]], "without system prompts"),
    ):
        with pytest.raises(TemplateError, match=why):
            said(said_turns, single)


@pytest.mark.parametrize("form", [chatml, llama2], ids=["ChatML", "LLaMA 2"])
@pytest.mark.parametrize("several", [True, False])
def test_a_run_in_the_tokenizers_own_template_keeps_it_behind_the_picture(lavin, form, several):
    inputs, vlm, *_ = lavin
    tokenizer = form()
    tokenizer.chat_template += "\n"  # as a file ends
    data = Data(kind="instruct", own={"multi_turn": several, "template": "tokenizer"}, seam="tokenizer")
    config = dataclasses.replace(inputs.config, data=data)
    bos = bos_id(tokenizer)
    vlm = dataclasses.replace(vlm, bos=bos, with_image=(), without_image=())
    template = chat_template(dataclasses.replace(inputs, config=config, lm_tokenizer=tokenizer), vlm)
    asked, answer, again = message("user", "ab"), message("assistant", "a b"), message("user", "h")
    pictured = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ab"}]}
    plain = {"add_generation_prompt": True, "tokenize": False}

    def said(turns):
        return tokenizer.apply_chat_template(turns, chat_template=template, **plain)

    start = tokenizer.bos_token if bos is not None else ""
    assert bool(start) == (form is llama2)
    assert said([asked]) == tokenizer.apply_chat_template([asked], **plain)
    assert said([pictured]) == f"{start}<image>{said([asked]).removeprefix(start)}"
    (row,) = prompt_ids([chat_prompt(data, "ab")], tokenizer, "tokenizer")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer(said([pictured]), add_special_tokens=False)["input_ids"]
    assert ids == [*([bos] if bos is not None else []), image, *row]
    if several:
        own = tokenizer.apply_chat_template([asked, answer, again], **plain)
        assert said([pictured, answer, again]) == f"{start}<image>{own.removeprefix(start)}"
    else:
        with pytest.raises(TemplateError, match="trained on single questions"):
            said([pictured, answer, again])
    with pytest.raises(TemplateError, match="one picture at a time"):
        said([{**pictured, "content": [*pictured["content"], {"type": "image"}]}])


WHY = {
    "prompts": ({"prompts": 2}, {}, "its vision tower has deep prompts"),
    "one token": ({"features": "cls"}, {}, "does not read all of CLIP's tokens"),
    "projected": ({"output_layer": True}, {}, "does not read all of CLIP's tokens"),
    "mapper": (
        {"st": "queries", "st_layers": 1, "st_heads": 2, "st_hidden": 96},
        {},
        "'queries' is no two-layer network",
    ),
    "wide": ({"st_hidden": 3072}, {}, "its connector is 3072 wide inside"),
    "GPT-2": ({"st_hidden": 64}, {"towers.lm": "miniature/gpt2"}, "its language model is a GPT-2"),
    "its adapter": ({"adapter": "prompts", "adapter_layers": 2, "st_tokens": 17}, {}, "its adapter stays inside"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    config = export_cases.config_of("clipcap")
    return setup.load(config, tmp_path_factory.mktemp("plain"), data=False)


@pytest.mark.parametrize(("arm", "changes", "reason"), WHY.values(), ids=WHY)
def test_an_arm_that_llava_cannot_hold_is_told_why(plain, arm, changes, reason, tmp_path):
    inputs = plain
    if changes:
        inputs = setup.load(export_cases.config_of("clipcap", **changes), tmp_path, data=False)
    arm = dataclasses.replace(inputs.config.arm["baseline"], **arm)
    vlm = arm_model.model(inputs, arm)
    lm = None if vlm.lm.config.adapter is not None else inputs.lm
    assert reason in why_not(vlm, lm)


def test_the_capped_logits_of_gemma_2_are_no_llava(plain):
    vlm = arm_model.model(plain, plain.config.arm["baseline"])
    lm = plain.lm._replace(config=dataclasses.replace(plain.lm.config, logit_cap=30.0))
    assert why_not(vlm, plain.lm) == "" and "caps its logits" in why_not(vlm, lm)


class Hub:
    """Stands in for huggingface_hub.HfApi: remembers what it was asked."""

    calls: ClassVar[list] = []
    fails = False

    def create_repo(self, name, **options):
        Hub.calls.append(("create", name, options))
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        if Hub.fails:
            raise PermissionError("401 Unauthorized")
        Hub.calls.append(("upload", sorted(p.name for p in Path(options["folder_path"]).iterdir()), options["repo_id"]))


def test_an_export_is_pushed_with_its_card(lavin, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls.clear()
    pushing.push(lavin[3], "me/mine")
    (create, name, options), (_, files, repository) = Hub.calls
    assert (create, name, repository) == ("create", "me/mine", "me/mine") and options["exist_ok"]
    assert {"README.md", "trained.safetensors", "arm.json", "llava"} <= set(files)
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(ConfigError, match=r"--push=me/mine: the hub did not take .* 401 Unauthorized.*hf auth login"):
        pushing.push(lavin[3], "me/mine")
    with pytest.raises(ConfigError, match="--push=mine: give the repository with its owner"):
        pushing.check("mine")

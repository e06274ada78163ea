"""Every family of language models in every recipe: docs/guides/towers.md's table, each of whose words is tried here.

A quick test tries two cells, an exhaustive one all of them: each compiles a step and a decoding of its own. The cells
off the diagonal have a mark of their own, so that each family can be tried in one recipe.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import export_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, assert_most_probable
from test_language_families import FAMILY_NAMES, SHAPES

from eim_jax.commands.exported_lms import language_models
from eim_jax.generation.decode_state import DecodeConfig
from eim_jax.generation.sampler import continue_text
from eim_jax.models.language import FAMILIES, family_of
from eim_jax.models.language.gpt2 import GPT2Config
from eim_jax.pretrained import LM, WeightsError, export_lm, load_lm, resolve
from eim_jax.pretrained.llava import why_not
from eim_jax.training import arm_model, partition, setup

RECIPES = {
    "ClipCap, LM frozen": ("clipcap", False),
    "ClipCap, LM tuned": ("clipcap", True),
    "LLaMA-Adapter": ("llama_adapter", False),
    "LaVIN": ("lavin", False),
    "LoRA": ("lora", False),
}
QUICK = (("gemma2", "ClipCap, LM tuned"), ("phi3", "LoRA"))
PAGE = Path(__file__).parent.parent / "docs" / "guides" / "towers.md"
SMALL = {"vocab": 1000, "context": 160, "width": 64, "own_head_width": 0, "mlp": 64}


def stated() -> dict[tuple[str, str], set[str]]:
    """What the page says: (model_type, recipe) -> words of the cell."""
    lines = PAGE.read_text(encoding="utf-8").partition("## What is tested\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *body = rows
    return {
        (row[0].strip("`"), recipe): set(re.findall(r"\w+", cell))
        for row in body
        for recipe, cell in zip(head[1:], row[1:], strict=True)
    }


def test_the_table_has_every_family_and_every_recipe():
    assert stated().keys() == {(family, recipe) for family in FAMILIES for recipe in RECIPES}
    assert {"gpt2", *FAMILY_NAMES} == FAMILIES.keys()


def folder_of(family: str, home: Path) -> Path:
    """A tiny random model of the family with the miniature's LLaMA tokenizer."""
    if family == "gpt2":
        config = GPT2Config(vocab=1000, context=160, width=64, layers=2, heads=4)
    else:
        config = dataclasses.replace(SHAPES[family], **SMALL)
    shapes = jax.eval_shape(family_of(config).build(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes["params"])
    export_lm(home / "lm", LM(config, jax.tree.map(jnp.asarray, params)))
    for file in resolve("miniature/llama").glob("tokenizer*"):
        shutil.copy(file, home / "lm")
    return home / "lm"


def tried(family: str, recipe: str, home: Path) -> set[str]:
    """What works; that it works rightly is asserted."""
    name, tuned = RECIPES[recipe]
    changes = {"towers.lm": str(folder_of(family, home)), "towers.dropout": 0.0, "arm.baseline.st_hidden": 32}
    changes |= {"arm.baseline.adapter_layers": 2, "arm.baseline.adapter_dropout": 0.0, "towers.scan": True}
    config = export_cases.config_of(name, tuned, **changes)
    try:
        inputs, vlm, params = export_cases.loud_arm(config, home)
    except setup.ConfigError as error:
        assert "takes no adapters" in str(error)
        return set()
    # One device: eight are the meshes' tests' business.
    vlm, params = dataclasses.replace(vlm, mesh=None), {p: jnp.asarray(np.asarray(x)) for p, x in params.items()}
    groups = partition.groups(config.stages["base"], params)
    trained, frozen = partition.split(params, groups)
    rng = np.random.default_rng(2)
    seen = jnp.asarray(rng.standard_normal((2, 5, vlm.visual.config.width), np.float32))
    tokens = jnp.asarray(rng.integers(5, 900, (2, 6)), jnp.int32)
    valid, shown = jnp.ones((2, 6), bool), jnp.array([True, False])

    def loss(trained, frozen, tokens):
        tree = partition.unflatten({**trained, **frozen})
        logits = vlm.token_logits(tree, vlm.connect(tree, seen), tokens, valid, has_image=shown)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return -logp[:, 1:].mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, logits), slopes = step(trained, frozen, tokens)
    found = {"load"}
    norm = sum(float((x.astype(jnp.float32) ** 2).sum()) for x in slopes.values())
    after = {path: leaf - 1e-2 / norm**0.5 * slopes[path] for path, leaf in trained.items()}
    assert all(np.isfinite(x).all() for x in slopes.values())
    assert step(after, frozen, tokens)[0][0] < before
    found.add("train")

    tree = partition.unflatten(params)
    read = vlm.lm_input(
        tree, tokens[:, :2], valid[:, :2], visual=vlm.connect(tree, seen), has_image=shown, generating=True
    )
    said = continue_text(vlm.lm, tree["lm"], read, DecodeConfig("greedy", max_tokens=4), eos_id=None).tokens
    whole = jnp.concatenate([tokens[:, :2], jnp.asarray(said)[:, :4]], axis=1)
    predicted = step(trained, frozen, whole)[0][1]
    assert_most_probable(whole[:, 2:], predicted[:, 2:])
    found.add("decode")

    exported = language_models(inputs, vlm, params, set(trained), merge=name == "lora")
    if exported.folders or not why_not(vlm, exported.reads_images):
        lm = exported.folders.get("lm_text_only") or exported.folders.get("lm") or exported.reads_images
        export_lm(home / "again", lm)
        again = load_lm(home / "again")
        start = [*([vlm.bos] if vlm.bos is not None else []), *vlm.without_image]
        ids = jnp.concatenate([jnp.asarray([start], jnp.int32), tokens[1:]], axis=1)
        theirs = jax.jit(family_of(again.config).build(again.config).apply)({"params": again.params}, ids)
        assert_close(theirs[:, len(start) - 1 : -1], logits[1:], 2e-5)  # the row without an image
        found.add("export")
    if quantised(config, home):
        found.add("quantise")
    return found


def quantised(config, home: Path) -> bool:
    """Whether the recipe trains beside kernels of 4 bits; they are frozen."""
    config = dataclasses.replace(config, towers=dataclasses.replace(config.towers, quant="nf4"))
    try:
        inputs = setup.load(config, home, data=False)
        _, params = arm_model.start(inputs, config.arm["baseline"])
        groups = partition.groups(config.stages["base"], params)
    except (WeightsError, partition.PartitionError) as error:
        assert "nf4" in str(error) or "4 bits" in str(error)
        return False
    held = {path for path in params if path.endswith("/codes")}
    return bool(held) and held.isdisjoint(path for group in groups for path in group.paths)


@pytest.mark.parametrize(("family", "recipe"), QUICK)
def test_a_family_does_in_a_recipe_what_the_table_says(family, recipe, tmp_path):
    assert tried(family, recipe, tmp_path) == stated()[family, recipe]


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_does_in_every_recipe_what_the_table_says(family, recipe, tmp_path):
    assert tried(family, recipe, tmp_path) == stated()[family, recipe]

"""A family of language models added from here: its folder is read, trained, scored, planned and exported like any."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scored_runs
from flax import linen as nn

from eim_jax.commands import exporting, trained_arms
from eim_jax.models.hugging_face import Row, dense_rows, norm_rows, our_fields, their_fields
from eim_jax.models.kv_cache import Cache, visible
from eim_jax.models.language import FAMILIES, Family
from eim_jax.models.layers import BlockConfig, layer_norm
from eim_jax.models.stacks import make_blocks, run_blocks
from eim_jax.planning import plan, targets
from eim_jax.pretrained import LM, WeightsError, export_lm, lm_config, load_lm, resolve
from eim_jax.training import arm_model, partition, setup


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """Shape of a decoder without positions: the causal mask alone says what came first."""

    vocab: int = 745
    context: int = 96
    width: int = 32
    layers: int = 2
    heads: int = 2
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: Any = jnp.float32
    model_type: str = "plain"
    dropout = 0.0  # none, and no adapters: no fields, so that nobody can set them
    adapter = None

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Plain(nn.Module):
    """The decoder itself, with a tied head."""

    config: PlainConfig

    def setup(self):
        c = self.config
        self.token_embedding = nn.Embed(c.vocab, c.width, dtype=c.dtype)
        block = BlockConfig(c.width, c.heads, 2 * c.width, "relu", attention=c.attention, dtype=c.dtype)
        self.blocks = make_blocks(block, c.layers, scan=c.scan, remat=c.remat)
        self.ln_f = layer_norm(1e-5, c.dtype)

    def embed(self, tokens):
        return self.token_embedding(tokens)

    def hidden(self, embeds, *, valid=None, positions=None, cache=None, train=False):
        mask, flags = visible(cache, valid, *embeds.shape[:2])
        start, kv = (None, None) if cache is None else (cache.length, cache.kv)
        x, kv = run_blocks(self.blocks, embeds.astype(self.config.dtype), mask=mask, train=train, start=start, kv=kv)
        return self.ln_f(x), None if cache is None else Cache(kv, flags, cache.length + embeds.shape[1])

    def head_weights(self):
        return self.token_embedding.embedding, 0

    def logits(self, hidden):
        return jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), self.head_weights()[0])

    def __call__(self, tokens):
        return self.logits(self.hidden(self.embed(tokens))[0])


FIELDS = {"vocab_size": "vocab", "n_ctx": "context", "hidden_size": "width", "depth": "layers", "heads": "heads"}
ROWS = (
    Row("lm/token_embedding/embedding", ("embed.weight",)),
    *norm_rows("lm/blocks_{i}/ln_1", "layer.{i}.norm_a"),
    Row("lm/blocks_{i}/attn/qkv/kernel", ("layer.{i}.qkv.weight",)),
    Row("lm/blocks_{i}/attn/qkv/bias", ("layer.{i}.qkv.bias",)),
    *dense_rows("lm/blocks_{i}/attn/out", "layer.{i}.out"),
    *norm_rows("lm/blocks_{i}/ln_2", "layer.{i}.norm_b"),
    *dense_rows("lm/blocks_{i}/mlp/up", "layer.{i}.up"),
    *dense_rows("lm/blocks_{i}/mlp/down", "layer.{i}.down"),
    *norm_rows("lm/ln_f", "norm"),
)

PLAIN = Family(
    model_type="plain",
    title="plain decoder",
    build=Plain,
    read=lambda theirs: PlainConfig(**our_fields(theirs, FIELDS, PlainConfig)),
    write=lambda config: {"model_type": "plain", **their_fields(config, FIELDS)},
    rows=lambda config: ROWS,
    published={"nobody/plain-2m": PlainConfig(width=64)},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config, workdir, folder) of a run whose language model is a folder of the family, random weights."""
    home = tmp_path_factory.mktemp("plain")
    folder, patch = home / "lm", pytest.MonkeyPatch()
    patch.setitem(FAMILIES, "plain", PLAIN)
    params = jax.jit(Plain(PlainConfig()).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    export_lm(folder, LM(PlainConfig(), params))
    for file in resolve("miniature/gpt2").glob("tokenizer*"):
        shutil.copy(file, folder)
    config = scored_runs.few_steps(**{"towers.lm": str(folder), "arms": ("baseline",)})
    scored_runs.run(config, home / "run")
    yield config, home / "run", folder
    patch.undo()


def test_its_folder_is_read_as_it_was_written(world):
    folder = world[2]
    assert json.loads((folder / "config.json").read_text())["depth"] == 2
    lm = load_lm(folder)
    assert lm.config == PlainConfig()
    again = folder.parent / "again"
    export_lm(again, lm)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    tokens = jnp.asarray([[5, 3, 7, 1]])
    stacked = load_lm(folder, scan=True)
    one = jax.jit(Plain(lm.config).apply)({"params": lm.params}, tokens)
    other = jax.jit(Plain(stacked.config).apply)({"params": stacked.params}, tokens)
    np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))


def test_what_it_cannot_do_is_refused_by_its_name(world):
    config, workdir, folder = world
    with pytest.raises(WeightsError, match=r"quant 'nf4' is for .* LLaMA, Mistral, .*, this is a plain decoder"):
        lm_config(folder, quant="nf4")
    inputs = setup.load(config, workdir, data=False)
    arm = dataclasses.replace(config.arm["baseline"], adapter="lavin")
    with pytest.raises(setup.ConfigError, match=r"config\.towers\.lm is a plain decoder, which takes no adapters"):
        arm_model.model(inputs, arm)


def test_it_is_trained_and_scored(world):
    config, workdir, _ = world
    lines = (workdir / "baseline" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]).all()
    scores = json.loads((workdir / "baseline" / "scores_test.json").read_text())
    assert 0 < scores["greedy"]["nll"] < np.inf
    assert "lm/blocks_1/mlp/up/kernel" in moved(config, workdir)


def moved(config, workdir) -> set[str]:
    """The leaves of the towers that the run has changed."""
    inputs = setup.load(config, workdir, data=False)
    _, params = trained_arms.trained(inputs, "baseline")
    return {path for path, leaf in inputs.towers.items() if not np.array_equal(leaf, params[path])}


def test_it_is_planned_from_its_folder_and_from_its_published_sizes(world):
    config, *_ = world
    config = dataclasses.replace(config, mesh=(1, 1, 1))
    target = targets.target("cpu:1")
    (found,), _ = plan.plan(config, target, samples=40)
    (published,), notes = plan.plan(
        dataclasses.replace(config, towers=dataclasses.replace(config.towers, lm="nobody/plain-2m")), target, samples=40
    )
    assert published.memory.trained > found.memory.trained > 0
    assert any("nobody/plain-2m: config.json is not here" in note for note in notes)


def test_the_tuned_model_is_exported_as_a_folder_of_its_family(world, tmp_path):
    config, workdir, _ = world
    inputs = setup.load(config, workdir, data=False)
    _, params = trained_arms.trained(inputs, "baseline")
    exporting.write_arm(inputs, "baseline", params, tmp_path / "out")
    back = partition.flatten({"lm": load_lm(tmp_path / "out" / "lm").params})
    assert back.keys() == {path for path in params if path.startswith("lm/")}
    for path, leaf in back.items():
        np.testing.assert_array_equal(leaf, params[path])


def test_the_example_of_the_docs_is_the_one_here():
    here = Path(__file__)
    page = (here.parents[2] / "docs" / "extend" / "language_models.md").read_text(encoding="utf-8")
    text = here.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.S)[:2]:
        assert block in text

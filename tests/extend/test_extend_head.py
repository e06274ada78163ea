"""Losses with parameters of their own, or over single tokens: those of related work, each added from its file."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scored_runs
import tiny
from safetensors.numpy import load_file
from test_examples import FOLDER

from eim_jax import config as settings
from eim_jax.commands import trained_arms
from eim_jax.commands.exporting import LEAVES, export
from eim_jax.commands.trained_arms import after_stages
from eim_jax.config import ConfigError, LossWeights
from eim_jax.losses import table
from eim_jax.losses.kinds import Forward
from eim_jax.losses.objective import make_objective, normalisers
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.connector import STConfig, make_st
from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning import plan, targets
from eim_jax.training import arm_model, kinds, partition, setup
from experiments import integration, related

HEAD = "loss/viral/"
DROPPED = 2  # a row without an image


@pytest.fixture(scope="module", autouse=True)
def known():
    """Both losses are in the table, as related.get_config leaves it."""
    related.get_config()


def few_steps():
    """experiments/related.py's arm: two steps on words, two on captions and alignment."""
    values = related.get_config()
    short = {"steps": 2, "warmup_steps": 1, "batch": 8}
    fields = {f"stages.{stage}.{field}": v for stage in ("sea", "aligned") for field, v in short.items()}
    fields |= {"arms": ("eim",), "data.scenes": 8, "data.eval_limit": 4, "decode.max_tokens": 6, "log_every": 1}
    values.update_from_flattened_dict({**fields, "decode.methods": ("greedy",), "decode.java": False})
    config = settings.from_config_dict(values)
    kinds.check(config)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, work directory, {stage: parameters}) of a run of both stages; "start" is before the first."""
    config, workdir = few_steps(), tmp_path_factory.mktemp("run")
    scored_runs.run(config, workdir)
    inputs = setup.load(config, workdir)
    return config, workdir, {stage: params for stage, _, params in after_stages(inputs, "eim")}


def small() -> tuple:
    """(a model of a few thousand parameters, its nested parameters with a head, a batch, the loss)."""
    vlm, flat = tiny.model()
    loss = dataclasses.replace(related.VIRAL, hidden=9)
    head = tiny.loud(lambda key: {"params": loss.drawn(vlm, key)})
    return vlm, {**partition.unflatten(flat), "loss": {"viral": head}}, tiny.batch(6, text_only=(DROPPED,)), loss


def in_float64(name: str, tree: dict, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(tree[name]["kernel"], np.float64) + np.asarray(tree[name]["bias"], np.float64)


def test_alignment_is_its_formula_in_float64():
    vlm, params, batch, loss = small()
    forward = Forward(vlm, settings.Config().losses, params, batch)
    value, more = loss.value(forward, None)
    # What the LM gives at visual tokens is the same with the text behind them, as training reads them.
    tokens = np.asarray(integration.layers(vlm, params, batch)[0][0], np.float64)
    for name in ("up", "middle"):
        tokens = in_float64(name, params["loss"]["viral"], tokens)
        tokens = tokens / (1 + np.exp(-tokens))
    tokens = in_float64("down", params["loss"]["viral"], tokens)
    seen = np.asarray(forward.image_tokens, np.float64)
    cosine = (tokens * seen).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(seen, axis=-1)
    expected = np.delete((1 - cosine).mean(axis=1), DROPPED).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not more and float(loss.normaliser(vlm, batch)) == 5

    def of_tree(tree):
        return loss.value(Forward(vlm, settings.Config().losses, {**params, **tree}, batch), None)[0]

    slopes = jax.grad(of_tree)({name: params[name] for name in ("st", "lm", "loss")})
    for path, slope in partition.flatten(slopes).items():  # the row that is left out gives no NaN
        assert np.isfinite(slope).all(), path
    assert np.abs(slopes["st"]["up"]["kernel"]).max() > 0
    assert not np.abs(slopes["lm"]["blocks_1"]["attn"]["qkv"]["kernel"]).any()  # behind the layer that is aligned


def test_words_are_contrasted_token_by_token_as_in_float64():
    vlm, params, batch, _ = small()
    loss, tau = related.WORDS, 0.2
    lone = batch.valid.at[4, 1:].set(False)  # EOS alone: a row without a word
    batch = batch._replace(valid=lone)
    losses = dataclasses.replace(settings.Config().losses, tau=tau)
    value, _ = loss.value(Forward(vlm, losses, params, batch), None)
    embeddings = np.asarray(params["lm"]["token_embedding"]["embedding"], np.float64)
    visual = np.asarray(vlm.connect(params, vlm.encode_image(params, batch.image)), np.float64)
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    rows = [row for row in range(6) if row not in (DROPPED, 4)]
    words = {row: [int(t) for t in batch.tokens[row][: int(batch.valid[row].sum()) - 1]] for row in rows}
    total = 0.0
    for row in rows:
        shares = []
        for token in visual[row]:
            likely = {r: sum(np.exp(unit(token) @ unit(embeddings[w]) / tau) for w in words[r]) for r in rows}
            shares.append(likely[row] / sum(likely.values()))
        total += -np.log(shares).mean()
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert float(loss.normaliser(vlm, batch)) == len(rows)

    def of_kernel(kernel):
        st = {**params["st"], "up": {**params["st"]["up"], "kernel": kernel}}
        return loss.value(Forward(vlm, losses, {**params, "st": st}, batch), None)[0]

    slope = jax.grad(of_kernel)(params["st"]["up"]["kernel"])  # rows left out by a mask give no NaN
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_the_docs_contrastive_loss_with_a_head_is_its_formula_and_its_head_gets_a_gradient(monkeypatch):
    page = (FOLDER.parent / "docs" / "extend" / "losses.md").read_text(encoding="utf-8")
    vision, projected = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.setattr(table, "LOSSES", {})  # the page's first loss is entered here
    exec(vision + projected, shown := {})
    loss = shown["PROJECTED"]
    vlm, params, batch, _ = small()
    monkeypatch.setattr(table, "LOSSES", {"projected": loss, "words": related.WORDS})
    stage = settings.Stage(train=("loss/.*",), losses=LossWeights(projected=1.0))
    own, key = table.heads(vlm, jax.random.key(3), stage), jax.random.key(3)
    kernel = np.asarray(own["projected"]["kernel"])
    assert own.keys() == {"projected"} and kernel.shape == (tiny.WIDTH, 16)
    monkeypatch.setattr(table, "LOSSES", {"viral": related.VIRAL, **table.LOSSES})  # whatever else there is
    both = dataclasses.replace(stage, losses=LossWeights(projected=1.0, viral=1.0))
    np.testing.assert_array_equal(table.heads(vlm, key, both)["projected"]["kernel"], kernel)

    keys = np.random.default_rng(0).normal(size=(tiny.SAMPLES, 16))
    queue, losses = Queue.of(keys.astype(np.float32)), settings.Config().losses
    objective = make_objective(vlm, stage, losses)

    def value(own):
        return objective({**params, "loss": own}, batch, {"features": queue}, {"projected": jnp.float32(1)}, None)[0]

    found, slope = jax.value_and_grad(value)(own)
    visual = np.asarray(vlm.connect(params, vlm.encode_image(params, batch.image)), np.float64)
    query = visual.mean(axis=1) @ kernel.astype(np.float64)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    scores = query / np.linalg.norm(query, axis=1, keepdims=True) @ keys.T / losses.tau
    nats = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(6), np.asarray(batch.index)]
    np.testing.assert_allclose(found, np.delete(nats, DROPPED).sum(), rtol=1e-5)
    assert np.abs(slope["projected"]["kernel"]).max() > 0


def test_on_a_mesh_they_have_the_same_values(monkeypatch):
    vlm, params, batch, loss = small()
    monkeypatch.setitem(table.LOSSES, "viral", loss)
    batch = Batch(*(None if x is None else jnp.concatenate([x, x[:2]]) for x in batch))
    stage = settings.Stage(train=("st/.*", "loss/.*"), losses=LossWeights(viral=1.0, words=1.0))
    found = {}
    for mesh in (None, make_mesh((2, 2, 2))):
        model = dataclasses.replace(vlm, mesh=mesh)
        objective = jax.jit(make_objective(model, stage, settings.Config().losses, mesh))
        found[mesh] = objective(params, batch, {}, normalisers(model, stage, batch), None)[1]
    alone, split = found.values()
    assert {"loss/viral", "loss/words"} < alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-5, err_msg=name)


def test_a_head_trains_where_its_loss_does_and_nowhere_else(trained):
    config, workdir, after = trained
    names = {path for path in after["start"] if path.startswith("loss/")}
    assert names == {f"{HEAD}{layer}/{leaf}" for layer in ("up", "middle", "down") for leaf in ("kernel", "bias")}
    for path in sorted(names):
        np.testing.assert_array_equal(after["sea"][path], after["start"][path])
        assert np.abs(np.asarray(after["aligned"][path]) - np.asarray(after["sea"][path])).max() > 0, path
    rows = [json.loads(line) for line in (workdir / "eim" / "metrics.jsonl").read_text().splitlines()]
    first, last = ([row for row in rows if row["stage"] == stage] for stage in ("sea", "aligned"))
    assert all(row["loss"] == row["loss/words"] for row in first) and len(first) == len(last) == 2
    for row in last:
        np.testing.assert_allclose(row["loss"], row["loss/base"] + 0.5 * row["loss/viral"], rtol=1e-6)
        assert 0 < row["loss/viral"] < 2
    inputs = setup.load(config, workdir, data=False)
    _, baseline = arm_model.start(inputs, config.arm["baseline"])  # whose stage gives the loss no weight
    assert not any(path.startswith("loss/") for path in baseline)


def test_an_export_leaves_the_head_out_and_training_goes_on_from_it(trained, tmp_path):
    config, workdir, after = trained
    export(config, workdir, "eim", tmp_path / "out")
    held = load_file(tmp_path / "out" / LEAVES)
    assert held and not any(path.startswith("loss/") for path in held)
    inputs = setup.load(dataclasses.replace(config, init=str(tmp_path / "out")), tmp_path / "next", data=False)
    _, begun = arm_model.start(inputs, config.arm["eim"])
    np.testing.assert_array_equal(begun["st/up/kernel"], after["aligned"]["st/up/kernel"])
    np.testing.assert_array_equal(begun[f"{HEAD}up/kernel"], after["start"][f"{HEAD}up/kernel"])  # as it is drawn


def test_the_page_has_its_curve_in_its_own_unit(trained):
    # At the axis, and in what is read aloud.
    page = (trained[1] / "report.html").read_text()
    assert page.count("1 - cosine") == 2 and "loss_VRA" in page and "loss_W" in page


def test_a_process_that_does_not_know_it_says_how_to_name_it(trained, monkeypatch):
    monkeypatch.delitem(table.LOSSES, "viral")
    with pytest.raises(ConfigError, match=r"losses\.viral: no such loss; there are .*words\. A .* as --config"):
        kinds.check(trained[0])


def test_a_plan_counts_it(trained):
    config, after = dataclasses.replace(trained[0], mesh=(1, 1, 1)), trained[2]["start"]
    found = {one.stage: one.memory for one in plan.plan(config, targets.target("cpu:1"), samples=1000)[0]}
    moved = sum(leaf.size for path, leaf in after.items() if path.split("/")[0] in ("st", "lm", "loss"))
    assert found["aligned"].trained == 4 * moved


def test_what_it_cannot_align_is_refused(tmp_path):
    vlm, params, batch, loss = small()
    fewer = dataclasses.replace(vlm, st=make_st(STConfig("mlp", width_in=16, width_out=tiny.WIDTH, tokens=3)))
    st = tiny.loud(fewer.st.init, jnp.zeros((1, 1, 16)))
    with pytest.raises(ConfigError, match=r"the ST makes 3 of CLIP's 5: set config\.arm\.\*\.st='ffn'"):
        loss.value(Forward(fewer, settings.Config().losses, {**params, "st": st}, batch), None)
    config = tiny.config_of("miniature_llama_adapter", **{"data.scenes": 8, "stages.base.losses.viral": 0.5})
    with pytest.raises(ConfigError, match="with this adapter it reads none"):
        arm_model.start(setup.load(config, tmp_path, data=False), config.arm["baseline"])


def test_a_head_that_no_stage_trains_is_refused_by_name(trained, tmp_path):
    config = trained[0]
    stages = {**config.stages, "aligned": dataclasses.replace(config.stages["aligned"], train=("st/.*", "lm/.*"))}
    with pytest.raises(ConfigError, match=r"aligned\.losses\.viral has parameters of its own.*Add 'loss/viral/\.\*'"):
        plan.plan(dataclasses.replace(config, stages=stages), targets.target("cpu:1"), samples=1000)


@pytest.mark.parametrize("train", [("(st|lm|loss)/.*",), ("st/.*", "lm/.*", "loss/.*")])
def test_a_finished_run_of_it_is_not_called_damaged_where_it_is_unknown(trained, monkeypatch, train):
    config, workdir, _ = trained
    stages = {**config.stages, "aligned": dataclasses.replace(config.stages["aligned"], train=train)}
    inputs = trained_arms.load_finished(dataclasses.replace(config, stages=stages), workdir)
    monkeypatch.delitem(table.LOSSES, "viral")
    with pytest.raises(ConfigError, match=r"arm eim was trained on a loss 'viral'.*LOSSES first"):
        trained_arms.trained(inputs, "eim")

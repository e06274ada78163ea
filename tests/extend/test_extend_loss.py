"""A fourth contrastive loss with a queue of its own, added from here: it trains, and is found wherever losses are."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import scored_runs
import tiny
from test_examples import FOLDER, example

from eim_jax import config as settings
from eim_jax.commands import inspection
from eim_jax.config import ConfigError, LossWeights
from eim_jax.data.samples import DrawnImages, Split
from eim_jax.losses import table
from eim_jax.losses.kinds import Forward
from eim_jax.losses.objective import make_objective
from eim_jax.losses.table import LOSSES
from eim_jax.models.batch import Batch
from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning import plan, targets
from eim_jax.training import arm_model, kinds, partition, setup
from eim_jax.training.arm import plan_arm
from eim_jax.utils.images import clip_preprocess

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(table, "LOSSES", {})  # the example puts its loss into the table; here only the fixture does
    OWN = example("own_loss")
FEATURES, VISION = OWN.FEATURES, OWN.VISION
CHANGES = {"stages.base.losses.vision": 0.5, "log_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config, work directory, what the terminal was told) of a run whose stage has loss_base and the added loss."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, "vision", VISION)
        config = scored_runs.few_steps(**CHANGES, **{"data.eval_limit": 6})
        scored_runs.run(config, workdir)
        yield config, workdir


@pytest.fixture(scope="module")
def loaded(world):
    """(inputs, vlm, parameters) of the run's work directory."""
    inputs = setup.load(*world)
    return inputs, *arm_model.start(inputs, world[0].arm["eim"])


def test_its_keys_and_its_value_are_the_formula_s_in_float64(world, loaded):
    config, (inputs, vlm, params) = world[0], loaded
    tree, size = partition.unflatten(params), vlm.visual.config.image_size
    rows = np.arange(6)
    images = [inputs.train.samples[row].image for row in range(len(inputs.train))]
    crops = np.stack([clip_preprocess(inputs.train.images[row], size) for row in dict.fromkeys(images)])
    tokens = np.asarray(vlm.encode_image(tree, jnp.asarray(crops)), np.float64)
    every = dataclasses.replace(vlm, features="full").encode_image(tree, jnp.asarray(crops))
    keys = np.asarray(every, np.float64).mean(axis=1)[images]
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    queue = inputs.queue(vlm, FEATURES)
    np.testing.assert_allclose(np.asarray(queue.keys)[: queue.count], keys, atol=2e-6)  # of unit norm

    batch = Batch(
        index=jnp.asarray(rows, jnp.int32),
        features=jnp.asarray(tokens[[images[row] for row in rows]], jnp.float32),
        has_image=jnp.array([True] * 5 + [False]),  # the last row takes no part
    )
    stage = dataclasses.replace(config.stages["base"], losses=LossWeights(vision=0.5))
    objective = make_objective(vlm, stage, config.losses)
    alone = dataclasses.replace(queue, keys=jnp.asarray(keys, jnp.float32), groups=queue.groups[: len(keys)])
    loss, metrics = objective(tree, batch, {"features": alone}, {"vision": jnp.float32(5)}, None)
    query = np.asarray(vlm.connect(tree, batch.features), np.float64).mean(axis=1)
    query = query[:, : keys.shape[1]]
    scores = query / np.linalg.norm(query, axis=1, keepdims=True) @ keys.T / config.losses.tau
    nats = np.log(np.exp(scores).sum(axis=1)) - scores[rows, rows]
    np.testing.assert_allclose(metrics["loss/vision"], nats[:5].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * nats[:5].mean(), rtol=1e-5)


def test_a_key_is_the_same_whatever_an_arm_puts_into_the_tower(world, loaded, tmp_path):
    inputs = loaded[0]
    arm = dataclasses.replace(world[0].arm["eim"], prompts=2, prompt_hidden=8, features="cls", output_layer=True)
    vlm, params = arm_model.start(inputs, arm)
    assert any(path.startswith("visual/prompt") for path in params)
    queue, other = inputs.queue(loaded[1], FEATURES), dataclasses.replace(inputs, workdir=tmp_path)
    np.testing.assert_array_equal(other.queue(vlm, FEATURES).keys, queue.keys)


def test_it_trained_and_its_queue_is_on_disk(world):
    workdir = world[1]
    rows = [json.loads(line) for line in (workdir / "eim" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        np.testing.assert_allclose(row["loss"], row["loss/base"] + 0.5 * row["loss/vision"], rtol=1e-5)
        assert 0 <= row["queue/vision/recall1"] <= 1 <= row["queue/vision/rank"]
    manifest = json.loads((workdir / "queues" / "features" / "manifest.json").read_text())
    assert manifest["pooling"].startswith("mean of CLIP.visual's tokens") and manifest["count"] == 40


def test_inspection_shows_each_sample_s_nearest_rows(world, loaded, capsys):
    inspection.show_samples(loaded[0], "eim", 2, loaded[1:])
    assert capsys.readouterr().out.count("loss_V: nearest of 40 rows of queue features") == 2


def test_without_a_model_inspection_shows_the_samples_and_asks_for_no_queue(loaded, monkeypatch, capsys):
    monkeypatch.setattr(type(loaded[0]), "queue", None)
    inspection.show_samples(loaded[0], "eim", 2)
    said = capsys.readouterr().out
    assert said.count("tokens are supervised") == 2 and "nearest" not in said


def test_a_plan_counts_its_queue(world):
    config = dataclasses.replace(world[0], mesh=(1, 1, 1), arms=("eim",))
    [found], _ = plan.plan(config, targets.target("cpu:1"), samples=1000)
    assert found.memory.queue == 1000 * (96 * 4 + 4)  # float32 keys, and one group number each


def test_the_page_and_the_experiments_name_it(world, tmp_path):
    config, workdir = world
    page = (workdir / "report.html").read_text()
    assert "loss_V" in page and "recall@1 in K_v" in page
    _, experiments = scored_runs.experiment(config, workdir, tmp_path, ("Bleu_4",))
    assert "loss_V: recall@1" in experiments


def test_a_name_that_no_loss_has_and_data_that_it_cannot_read_are_refused(world, loaded, monkeypatch):
    with pytest.raises(ConfigError, match=r"config\.stages\.base\.losses\.visoin: no such loss; did you mean 'vision'"):
        tiny.config_of("miniature", **{"stages.base.losses.visoin": 1.0})
    inputs = loaded[0]
    samples = tuple(dataclasses.replace(sample, image=None) for sample in inputs.train.samples)
    train = Split("train", samples, DrawnImages([], lambda row: None, []))
    with pytest.raises(ConfigError, match="no training sample has an image, so loss_V has no rows"):
        plan_arm(dataclasses.replace(inputs, train=train, mesh=make_mesh((1, -1, 1))), "eim")


def test_parts_that_no_loss_asks_for_are_not_computed(world, loaded):
    batch = Batch(index=jnp.arange(2), features=jnp.ones((2, 3, 4)))
    forward = Forward(loaded[1], world[0].losses, {}, batch)
    assert forward.image_tokens is batch.features and forward.dropout(1) is None
    assert "connected" not in vars(forward)


def test_the_docs_show_the_example():
    page = (FOLDER.parent / "docs" / "extend" / "losses.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    source = (FOLDER / "own_loss.py").read_text(encoding="utf-8")
    parts = [part.strip() for part in shown.split("\n\n")]
    assert len(parts) >= 4 and all(part in source for part in parts)


def test_the_example_is_a_config_that_a_run_accepts(monkeypatch):
    monkeypatch.setitem(LOSSES, "vision", VISION)
    config = settings.from_config_dict(OWN.get_config())
    kinds.check(config)
    assert table.weights(config.stages["joint"])["vision"] == 0.5 and "joint" in config.arm["eim"].sequence

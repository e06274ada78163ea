"""An adapter added from here: its parameters alone are drawn, trained and planned, and the LM around them stays."""

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scored_runs
import tiny
from llama_oracle import TINY, random_params, stacked, tokens_of

from eim_jax.commands import trained_arms
from eim_jax.config import ConfigError
from eim_jax.models.adapters import ADAPTERS, Adapter, has_layer_axis
from eim_jax.models.language.llama import Llama
from eim_jax.planning import plan, targets
from eim_jax.training import arm_model, partition, setup


class Gains(nn.Module):
    """A factor for every channel of every layer, and one for all layers together; both start at zero."""

    layers: int
    width: int

    def setup(self):
        self.gain = self.param("gain", nn.initializers.zeros, (self.layers, self.width))
        self.common = self.param("common", nn.initializers.zeros, (self.width,))

    def leaves(self):
        return self.gain + self.common[None]


@dataclasses.dataclass(frozen=True)
class SoftGain(Adapter):
    """The attention reads z (1 + gain) in place of z."""

    title: ClassVar[str] = "soft gains"
    trained_leaf: ClassVar[str] = "gain"
    unstacked: ClassVar[tuple[str, ...]] = ("common",)

    def lm_parameters(self, config):
        return Gains(config.layers, config.width)

    def attention_input(self, leaf, row, z, drop):
        return z * (1 + leaf.astype(z.dtype))[None, None], None


def config_with_gains(**changes):
    short = {"steps": 3, "warmup_steps": 0, "warmup_epochs": 0.0, "batch": 8, "train": ("lm/adapter/.*", "st/.*")}
    values = {f"stages.base.{name}": value for name, value in short.items()}
    values |= {"data.scenes": 24, "data.eval_limit": 8, "decode.max_tokens": 4, "arms": ("baseline",)}
    values |= {"arm.baseline.adapter": "gain", "arm.baseline.visual_adapter": False}
    return tiny.config_of("miniature_lavin", **values | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config, workdir) of a run of a few steps."""
    patch = pytest.MonkeyPatch()
    patch.setitem(ADAPTERS, "gain", SoftGain)
    config, workdir = config_with_gains(), tmp_path_factory.mktemp("gain")
    scored_runs.run(config, workdir)
    yield config, workdir
    patch.undo()


def test_its_leaves_and_the_sts_train_and_no_bit_of_the_towers_changes(world):
    config, workdir = world
    inputs = setup.load(config, workdir, data=False)
    _, params = trained_arms.trained(inputs, "baseline")
    added = {path for path in params.keys() - inputs.towers.keys() if not path.startswith("st/")}
    assert added == {"lm/adapter/gain", "lm/adapter/common"}
    assert all(np.abs(params[path]).min() > 0 for path in added)
    for path, leaf in inputs.towers.items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)


def test_the_run_is_logged_and_scored(world):
    workdir = world[1]
    scores = json.loads((workdir / "baseline" / "scores_test.json").read_text())
    assert 0 < scores["greedy"]["nll"] < np.inf
    steps = [json.loads(line) for line in (workdir / "baseline" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/base" in step for step in steps)


def test_it_is_planned(world):
    config = dataclasses.replace(world[0], mesh=(1, 1, 1))
    (found,), _ = plan.plan(config, targets.target("cpu:1"), samples=24)
    vlm, params = arm_model.start(setup.load(*world, data=False), config.arm["baseline"])
    st = sum(leaf.size for path, leaf in params.items() if path.startswith("st/"))
    layers, width = vlm.lm.config.layers, vlm.lm.config.width
    assert found.memory.trained == 4 * (st + layers * width + width)


def test_weight_decay_takes_what_is_a_matrix_in_each_layer(world):
    assert has_layer_axis("lm/adapter/gain") and not has_layer_axis("lm/adapter/common")
    config = dataclasses.replace(world[0].stages["base"], train=("lm/adapter/.*",), weight_decay=0.5, lr=1.0)
    params = {"lm/adapter/gain": jnp.ones((3, 4)), "lm/adapter/common": jnp.ones((2, 4))}
    tx = partition.optimizer(config, partition.groups(config, params), params, total_steps=2)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert not np.any(updates["lm/adapter/gain"]) and np.all(updates["lm/adapter/common"] == -0.5)


@pytest.mark.parametrize("scan", [False, True])
def test_the_llama_computes_what_it_says(scan):
    """A gain on the attention's input is a gain on the scale of the norm before it."""
    config = dataclasses.replace(TINY, adapter=SoftGain())
    params, tokens = random_params(config), tokens_of((2, 5))
    plain = {name: leaf for name, leaf in params.items() if name != "adapter"}
    factor = 1 + params["adapter"]["gain"] + params["adapter"]["common"][None]
    for i in range(config.layers):
        block = plain[f"blocks_{i}"]
        plain[f"blocks_{i}"] = {**block, "norm_1": {"scale": block["norm_1"]["scale"] * factor[i]}}
    expected = jax.jit(Llama(TINY).apply)({"params": plain}, tokens)
    if scan:
        config, params = dataclasses.replace(config, scan=True), stacked(params, config.layers)

    def logits(lm, tokens):
        return lm.logits(lm.hidden(lm.embed(tokens), steer=lm.steer(None, jnp.zeros(2, bool)))[0])

    found = jax.jit(lambda p: Llama(config).apply({"params": p}, tokens, method=logits))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_config_that_does_not_train_it_is_refused(monkeypatch):
    monkeypatch.delitem(ADAPTERS, "gain", raising=False)
    with pytest.raises(ConfigError, match="'gain' is none of none, lavin, prompts"):
        config_with_gains()
    monkeypatch.setitem(ADAPTERS, "gain", SoftGain)
    with pytest.raises(ConfigError, match="adapter='gain', but no stage of its sequence trains it"):
        config_with_gains(**{"stages.base.train": ("st/.*",)})
    with pytest.raises(ConfigError, match=r"visual_adapter needs config\.arm\.baseline\.adapter='lavin'"):
        config_with_gains(**{"arm.baseline.visual_adapter": True})
    with pytest.raises(ValueError, match="soft gains cannot be folded"):
        SoftGain().fold(Llama(TINY), {}, 0)


def test_the_example_of_the_docs_is_the_one_here():
    here = Path(__file__)
    page = (here.parents[2] / "docs" / "extend" / "adapters.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    assert first in here.read_text(encoding="utf-8")

"""The partition: what trains, what optax holds for it, and at which rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.config import Stage
from eim_jax.training import partition

PARAMS = {
    "st/up/kernel": jnp.ones((3, 2)),
    "st/up/bias": jnp.ones(2),
    "lm/blocks_0/attn/qkv/kernel": jnp.ones((2, 6)),
    "visual/prompt/tokens": jnp.ones((1, 2, 3)),
}


def stage(**fields):
    return Stage(**{"warmup_steps": 0, "schedule": "constant", "lr": 0.1, **fields})


def test_a_pattern_that_matches_nothing_is_an_error_naming_the_nearest_leaf():
    with pytest.raises(partition.PartitionError, match=r"'st/upp/\.\*' matches no parameter.*st/up/"):
        partition.groups(stage(train=("st/upp/.*",)), PARAMS)


def test_a_leaf_claimed_by_two_patterns_is_an_error_naming_both():
    with pytest.raises(partition.PartitionError, match=r"st/up/bias is matched by both 'st/\.\*' and '\.\*bias'"):
        partition.groups(stage(train=("st/.*", ".*bias")), PARAMS)


def test_patterns_match_whole_paths_only():
    with pytest.raises(partition.PartitionError):
        partition.groups(stage(train=("st",)), PARAMS)


def test_every_leaf_has_exactly_one_label():
    found = partition.groups(stage(train=("st/.*", "lm/.*")), PARAMS)
    assert partition.labels(found, PARAMS) == {
        "st/up/kernel": "st/.*",
        "st/up/bias": "st/.*",
        "lm/blocks_0/attn/qkv/kernel": "lm/.*",
        "visual/prompt/tokens": "frozen",
    }


def test_split_and_merge_lose_nothing():
    trained, frozen = partition.split(PARAMS, partition.groups(stage(train=("st/.*",)), PARAMS))
    assert set(trained) == {"st/up/kernel", "st/up/bias"}
    assert {**trained, **frozen}.keys() == PARAMS.keys()


def test_optimizer_state_holds_two_moments_of_each_trained_leaf_and_nothing_of_frozen_ones():
    one = stage(train=("st/.*",))
    tx = partition.optimizer(one, partition.groups(one, PARAMS), PARAMS, 10)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(tx.init(PARAMS)) if leaf.ndim)
    assert shapes == sorted([(3, 2), (3, 2), (2,), (2,)])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_follows_the_closed_form(schedule):
    one = stage(train=("st/.*",), schedule=schedule, warmup_steps=4, lr=0.5)
    rate = partition.learning_rate(one, 12)
    for step in range(12):
        x = (step - 4) / 8
        decay = {"linear": 1 - x, "cosine": 0.5 * (1 + np.cos(np.pi * x)), "constant": 1.0}[schedule]
        assert float(rate(step)) == pytest.approx(0.5 * step / 4 if step < 4 else 0.5 * decay, rel=1e-5)


def test_a_warmup_longer_than_the_stage_is_an_error():
    with pytest.raises(ValueError, match="warmup_steps=5 leaves nothing of the stage's 5 steps"):
        partition.learning_rate(stage(train=("st/.*",), warmup_steps=5), 5)


@pytest.mark.parametrize("added", ["after", "before"])
@pytest.mark.parametrize("also", ["", "st/up/bias"])
def test_two_adamw_steps_equal_float64_numpy_with_the_groups_own_rates_and_decay_on_matrices_only(added, also):
    one = stage(train=("st/.*", ("lm/.*", 0.25)), b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1)
    one = dataclasses.replace(one, eps_added=added, decay_also=also)
    tx = partition.optimizer(one, partition.groups(one, PARAMS), PARAMS, 10)
    rng = np.random.default_rng(0)
    grads = [{p: rng.normal(size=leaf.shape) for p, leaf in PARAMS.items()} for _ in range(2)]
    got, state = PARAMS, tx.init(PARAMS)
    for g in grads:
        updates, state = tx.update({p: jnp.asarray(x, jnp.float32) for p, x in g.items()}, state, got)
        got = {p: got[p] + updates[p] for p in got}
    for path, leaf in PARAMS.items():
        want, m, v = np.asarray(leaf, np.float64), 0.0, 0.0
        rate = {"st": 0.1, "lm": 0.025, "visual": 0.0}[path.split("/")[0]]
        for t, g in enumerate(grads, start=1):
            m, v = 0.8 * m + 0.2 * g[path], 0.9 * v + 0.1 * g[path] ** 2
            if added == "after":
                step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            else:  # transformers' AdamW: the step's size is corrected, not its two parts
                step = np.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m / (np.sqrt(v) + 1e-3)
            want = want - rate * (step + (0.1 * want if want.ndim >= 2 or path == also else 0.0))
        np.testing.assert_allclose(got[path], want, rtol=2e-6)


def test_a_pattern_of_leaves_to_decay_that_matches_no_trained_one_is_an_error():
    one = stage(train=("st/.*",), weight_decay=0.1, decay_also="lm/adapter/gate")
    with pytest.raises(partition.PartitionError, match="decay_also='lm/adapter/gate' matches no parameter"):
        partition.optimizer(one, partition.groups(one, PARAMS), PARAMS, 10)


def test_clipping_measures_the_trained_gradients_together():
    one = stage(train=("st/.*",), clip_norm=1.0, b1=0.0, b2=0.0, eps=1e3)  # eps so large that steps follow gradients
    tx = partition.optimizer(one, partition.groups(one, PARAMS), PARAMS, 10)
    grads = {p: jnp.full_like(leaf, 3.0 if p.startswith("st") else 0.0) for p, leaf in PARAMS.items()}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    clipped = 3.0 / np.sqrt(8 * 9.0)
    np.testing.assert_allclose(updates["st/up/bias"], -0.1 * clipped / (clipped + 1e3), rtol=1e-5)

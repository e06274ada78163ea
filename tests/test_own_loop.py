"""Stages in a loop of one's own: exactly the matched leaves train, whatever form the tree has."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eim_jax
from eim_jax.training.partition import PartitionError, flatten

ROOT = Path(__file__).resolve().parent.parent
TREE = {"st": {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, "lm": {"kernel": jnp.full(3, -0.0)}}


def test_a_stage_s_optimizer_is_its_own_on_what_it_trains_and_nothing_elsewhere():
    stage = eim_jax.partition(TREE, {"st/.*kernel": optax.adam(0.1), "st/.*bias": optax.sgd(1.0)})
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.5), flatten(TREE))
    for form, back in ((lambda flat: flat, flatten), (lambda flat: stage.merge(flat), flatten)):
        whole, state = form({**stage.frozen, **stage.trained}), None
        state = stage.tx.init(whole)
        updates, _ = stage.tx.update(form(grads), state, whole)
        updates = back(updates)
        np.testing.assert_array_equal(updates["st/up/bias"], -0.5)  # sgd: - rate x gradient
        np.testing.assert_allclose(
            updates["st/up/kernel"], -0.1, rtol=2e-5
        )  # adam's first step is the rate; 1 - 0.999 is held to 6e-8
        np.testing.assert_array_equal(updates["lm/kernel"], 0)
    held = sum(leaf.size for leaf in jax.tree.leaves(stage.tx.init({**stage.frozen, **stage.trained})))
    assert held == 2 * 4 + 1  # adam's moments of the kernel and its count; nothing for the frozen leaf


def test_stages_carry_parameters_over_and_refuse_what_is_not_theirs():
    sequence = {"st": {"st/.*": optax.sgd(1.0)}, "lm": {"lm/.*": optax.sgd(1.0)}}
    stages = eim_jax.Stages(TREE, sequence)
    for name, stage in stages:
        with pytest.raises(ValueError, match="exactly the stage's trained leaves"):
            stages.finish({})
        stages.finish({path: leaf + 1 for path, leaf in stage.trained.items()})
        assert set(stage.trained) == {path for path in flatten(TREE) if path.startswith(name)}
    np.testing.assert_array_equal(stages.params["st"]["up"]["kernel"], 2)
    np.testing.assert_array_equal(stages.params["lm"]["kernel"], 1)
    with pytest.raises(ValueError, match="no stage is open"):
        stages.finish({})
    with pytest.raises(ValueError, match="'st' was not finished"):
        list(eim_jax.Stages(TREE, sequence))
    with pytest.raises(PartitionError, match=r"stage 'b': train pattern 'sd/.*' matches no parameter; the nearest"):
        eim_jax.Stages(TREE, {"a": {"st/.*": optax.sgd(1.0)}, "b": {"sd/.*": optax.sgd(1.0)}})
    with pytest.raises(PartitionError, match="matched by both"):
        eim_jax.partition(TREE, {"st/.*": optax.sgd(1.0), ".*bias": optax.sgd(1.0)})


def test_the_library_needs_no_more_than_its_base_dependencies():
    """What only the extra `train` installs is made unimportable; the losses, queues and stages do without."""
    code = """
import importlib.abc, sys
EXTRA = {extra!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(name, name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
import jax, optax, eim_jax
queue = eim_jax.Queue.of(jax.random.normal(jax.random.key(0), (5, 4)))
loss = jax.jit(lambda queue, x, i: queue.nce(x, i).loss)(queue, queue.keys[:2], jax.numpy.arange(2))
stage = eim_jax.partition({{"a": loss}}, {{"a": optax.sgd(1.0)}})
assert loss > 0 and set(stage.trained) == {{"a"}} and eim_jax.Stages and eim_jax.queue_nce and dir(eim_jax)
sys.argv = ["eim_jax", "--help"]
from eim_jax.__main__ import cli
cli()
"""
    extra = ("flax", "orbax", "grain", "ml_collections", "transformers", "tensorflow_datasets", "PIL", "rich", "psutil")
    done = subprocess.run(
        [sys.executable, "-c", code.format(extra=set(extra))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "pip install '.[train]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr

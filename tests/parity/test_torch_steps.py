"""The benchmarks' PyTorch side takes the same step: it trains as many parameters, from the same loss."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
try:
    import clipcap_case
    import lavin_case
    import torch_lavin
    import torch_steps
finally:
    sys.path.pop(0)

from eim_jax.losses.contrastive import queue_nce

CPU = torch.device("cpu")


def _trained(case) -> int:
    return sum(leaf.size for leaf in case.arguments[0].values())


@pytest.mark.parametrize("stage", clipcap_case.STAGES)
def test_clipcaps_steps_train_as_many_parameters_and_lower_their_loss(stage):
    size = clipcap_case.SIZES["tiny"]
    case = clipcap_case.clipcap_case(size, stage, batch=2, dtype="float32", dropout=0.0)
    step = torch_steps.clipcap_step(case, size, CPU, torch.float32, compiled=False)
    losses = [float(step.run()) for _ in range(3)]
    assert step.trained == _trained(case)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("stage", lavin_case.STAGES)
def test_lavins_steps_train_as_many_parameters_from_the_loss_of_chance(stage):
    size = lavin_case.SIZES["smallest"]
    case = lavin_case.lavin_case(size, stage, quant="none", batch=2, accumulate=1, dtype="float32")
    step = torch_lavin.lavin_step(case, stage, CPU, torch.float32, compiled=False)
    loss = float(step.run())
    assert step.trained == _trained(case)
    if stage == "adapter":
        assert loss == pytest.approx(np.log(size.lm.vocab), rel=0.05)


def test_the_queue_losses_of_both_sides_agree():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((500, 32), np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    query, index = rng.standard_normal((6, 32), np.float32), np.arange(6) * 80

    def ours(query):
        nce = queue_nce(query, jnp.asarray(keys), jnp.asarray(index), count=500, tau=torch_steps.TAU)
        return nce.loss / nce.weight

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(query))
    theirs = torch.from_numpy(query).requires_grad_()
    value = torch_steps.queue_loss(theirs, torch.from_numpy(keys), torch.from_numpy(index))
    value.backward()
    assert float(value.detach()) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(theirs.grad, gradient, atol=1e-5)

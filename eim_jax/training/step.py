"""One update of a stage, as a pure function.

A stage differentiates with respect to its own parameters only ("gradient truncation", EIM section 3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eim_jax.config import Stage
from eim_jax.losses.negatives import BatchRows
from eim_jax.losses.objective import microbatch_normalisers, normalisers
from eim_jax.models.vlm import VLM
from eim_jax.training import partition


def make_step(vlm: VLM, stage: Stage, objective: Callable, tx: optax.GradientTransformation, train: bool) -> Callable:
    """The stage's update as a pure function.

    (trained, opt_state, frozen, batch, queues, key, step) -> (trained, opt_state, metrics). The micro-batches of
    `stage.accumulate` divide by the whole batch's counts: the gradient is the big batch's. With `loss_mean` at
    "microbatch" each divides by its own: the mean of their gradients. `train=False` switches dropout off.
    """

    def loss_of(trained, frozen, batch, queues, norms, key, *whole):
        params = partition.unflatten({**trained, **frozen})
        return objective(params, batch, queues, norms, key if train else None, *whole)

    def gradients(trained, frozen, batch, queues, key):
        norms = normalisers(vlm, stage, batch)
        differentiate = jax.grad(loss_of, has_aux=True)
        if stage.accumulate == 1:
            return differentiate(trained, frozen, batch, queues, norms, key)
        # Every accumulate-th row: where each device's rows divide by accumulate, they stay on it.
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, stage.accumulate, *x.shape[1:]), 1, 0), batch)

        whole = BatchRows.of(batch)
        own = stage.loss_mean == "microbatch"
        each = microbatch_normalisers(vlm, stage, micro) if own else {}

        def add(total, part):
            i, rows, counts = part
            divide = counts if own else norms
            more = differentiate(trained, frozen, rows, queues, divide, jax.random.fold_in(key, i), whole)
            return jax.tree.map(jnp.add, total, more), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(differentiate, trained, frozen, first, queues, norms, key, whole)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zero, (jnp.arange(stage.accumulate), micro, each))[0]

    def step(trained, opt_state, frozen, batch, queues, key, number):
        grads, metrics = gradients(trained, frozen, batch, queues, jax.random.fold_in(key, number))
        metrics["grad_norm"] = optax.tree.norm(grads)  # of the trained leaves, the only ones there are
        # optax sees the whole tree, frozen leaves with zero gradients that no state depends on. Their updates are
        # dropped here and not added: adding 0.0 would turn a frozen -0.0 into 0.0.
        zeros = {path: jnp.zeros_like(leaf) for path, leaf in frozen.items()}
        updates: Any
        updates, opt_state = tx.update({**grads, **zeros}, opt_state, {**trained, **frozen})
        trained = optax.apply_updates(trained, {path: updates[path] for path in trained})
        return trained, opt_state, metrics

    return step

"""A stage's objective: the weighted sum of its losses, each forward computed once and only if a loss needs it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from eim_jax.config import Losses, Stage
from eim_jax.losses.kinds import Forward, Loss
from eim_jax.losses.negatives import BatchRows, negatives_of
from eim_jax.losses.queues import Queue
from eim_jax.losses.table import losses_of, weights
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM


def fields(stage: Stage, settings: Losses) -> frozenset[str]:
    """The batch fields that the stage's losses read ("image" may be served as cached "features")."""
    return frozenset({"index"}).union(*(loss.fields(settings) for loss in losses_of(stage)))


def readings(stage: Stage, settings: Losses) -> frozenset[str]:
    """What the stage's losses let the language model read, as far as they can read it packed (`batch.READINGS`).

    A loss of one's own that does not say it has no method `readings`: it reads each sample in a row of its own.
    """
    asked = (getattr(loss, "readings", None) for loss in losses_of(stage))
    return frozenset({}).union(*(ask(settings) for ask in asked if ask is not None))


def before(stage: Stage, settings: Losses) -> int:
    """How many earlier batches' rows a batch of the stage has to hold."""
    contrasts = [loss for loss in losses_of(stage) if "before" in loss.fields(settings)]
    return max((negatives_of(settings, loss.name).before for loss in contrasts), default=0)


def losses_as_averaged(stage: Stage) -> list[Loss]:
    """The stage's losses, each as the stage's `loss_mean` has it; a loss that is a mean over rows stays as it is."""
    found = []
    for loss in losses_of(stage):
        averaged = getattr(loss, "averaged", None)
        found.append(loss if averaged is None else averaged(stage.loss_mean))
    return found


def normalisers(vlm: VLM, stage: Stage, batch: Batch) -> dict[str, Float[Array, ""]]:
    """What each loss's sum is divided by, over the whole batch; at least 1.

    Known before any forward pass, so that micro-batches divide by the whole batch's count: accumulation is exact.
    """
    return {loss.name: jnp.maximum(loss.normaliser(vlm, batch), 1.0) for loss in losses_as_averaged(stage)}


def microbatch_normalisers(vlm: VLM, stage: Stage, parts: Batch) -> dict[str, Float[Array, "a"]]:
    """What the sums of each micro-batch are divided by, where every micro-batch's mean weighs the same.

    Its own count, times the number of micro-batches that have one. One without a scored token (or, for a loss of
    images, without an image) adds nothing and is not counted, so that the update is that of the others.

    Args:
      vlm: the arm's modules.
      stage: its losses.
      parts: the batch, micro-batches first [a rows ...].
    """
    found = {}
    for loss in losses_as_averaged(stage):
        counts = jax.vmap(lambda rows, loss=loss: loss.normaliser(vlm, rows))(parts)
        found[loss.name] = jnp.maximum(counts, 1.0) * jnp.maximum((counts > 0).sum(), 1)
    return found


def make_objective(vlm: VLM, stage: Stage, settings: Losses, mesh: Mesh | None = None) -> Callable:
    """The stage's loss as a pure function.

    Args:
      vlm: the arm's modules.
      stage: whose losses are summed, each times its weight.
      settings: the config's `losses`.
      mesh: over which batches and queues lie.

    Returns:
      (params, batch, queues {kind: Queue}, normalisers, key of dropout or None, the rows of the update that the batch
      is a micro-batch of, None: it is the whole) -> (loss f32[], metrics {name: f32[]}).
      Loss and metrics are shares of the whole batch's means, so that they add up over micro-batches.
    """
    active, losses = weights(stage), {loss.name: loss for loss in losses_as_averaged(stage)}

    def objective(
        params: dict,
        batch: Batch,
        queues: dict[str, Queue],
        norms: dict,
        key: Array | None,
        whole: BatchRows | None = None,
    ):
        forward = Forward(vlm, settings, params, batch, key, mesh, whole)
        total, metrics = jnp.float32(0.0), {}
        for name, weight in active.items():
            loss = losses[name]
            value, diagnostics = loss.value(forward, queues[loss.queue.name] if loss.queue else None)
            metrics |= {f"queue/{name}/{field}": sums / norms[name] for field, sums in diagnostics.items()}
            metrics[f"loss/{name}"] = value / norms[name]
            total = total + weight * metrics[f"loss/{name}"]
        metrics["loss"] = total
        return total, metrics

    return objective

"""What a stage says of its queues before its first step, and keeps for its curves."""

from typing import cast

from eim_jax.losses import queue_health
from eim_jax.losses.contrastive import Similarity
from eim_jax.losses.kinds import Loss
from eim_jax.losses.queue_contrast import contrast
from eim_jax.losses.queues import Queue
from eim_jax.losses.table import weights
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console

CONE = 0.5  # length of the mean unit key, from which it is the mean that keeps keys from being told apart


def tell_queue(inputs: Inputs, loss: Loss, queue: Queue, batch: int | None = None) -> dict[str, float]:
    """Prints a queue's health, and what the loss that reads it lies between.

    Args:
      inputs: the run's.
      loss: it.
      queue: its.
      batch: samples of an update, where its negatives are those of a batch; None: of the largest that trains on it.

    Returns:
      {"mean_norm", "mean_cosine", and where keys are contrasted "floor", "chance"}.
    """
    settings, name = inputs.config.losses, queue_name(loss)
    found, between = queue_health.measure(queue, inputs.mesh), None
    advice: str | None = None
    chosen = getattr(loss, "positives", None)  # a loss of another kind may have none
    positives = "alone" if chosen is None else chosen(settings)
    if positives != "alone":
        among, against = None, getattr(loss, "negatives", None)
        if against is not None:
            stages = [stage for stage in inputs.config.stages.values() if loss.name in weights(stage)]
            batch = batch or max((stage.batch for stage in stages), default=1)
            among = against(settings).like(batch, queue.count)
        options = {"tau": settings.tau, "positives": positives, "mesh": inputs.mesh, "chunk": settings.chunk}
        between = contrast(queue, similarity=cast(Similarity, settings.similarity), among=among, **options)
        centred = queue.center is not None
        advice = f"config.losses.center={loss.name}:mean takes the mean from keys and queries"
        if centred or found.mean_norm < CONE:
            advice = f"a config.losses.tau below {settings.tau:g} sets them apart"
        if settings.similarity == "dot":  # a longer query lowers the loss without limit
            advice = None
    ids = [sample.id for sample in inputs.samples.samples]
    for line in queue_health.report(queue, name, ids, inputs.mesh, found, between, loss.title, advice):
        console.print(line, soft_wrap=True)
    figures = {"mean_norm": found.mean_norm, "mean_cosine": found.mean_cosine}
    return figures if between is None else {**figures, "floor": between.floor, "chance": between.chance}


def queue_name(loss: Loss) -> str:
    """The name of the queue that a loss reads."""
    assert loss.queue is not None, f"{loss.title} reads no queue"
    return loss.queue.name

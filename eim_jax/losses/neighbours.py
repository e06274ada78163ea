"""The keys of a queue that are nearest to what the model computes of a sample: what a contrastive loss sees."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eim_jax.config import Losses
from eim_jax.losses.kinds import ContrastiveLoss, Forward
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def similarities(
    vlm: VLM, settings: Losses, loss: ContrastiveLoss, params: dict, batch: Batch, queue: Queue
) -> Float[Array, "b N"]:
    """Returns the similarity of each sample's query to every row of the queue, padding included.

    Args:
      vlm: the model.
      settings: the run's `config.losses`.
      loss: whose query is taken.
      params: the nested tree of the model's parameters.
      batch: the samples, with the fields that the query reads.
      queue: the loss's.
    """
    query = loss.query(Forward(vlm, settings, params, batch)).astype(jnp.float32)
    if settings.similarity == "cosine":
        query = query / jnp.linalg.norm(query, axis=1, keepdims=True)
    found = query @ queue.keys.T.astype(jnp.float32)
    return found if queue.scale is None else found * queue.scale[None]

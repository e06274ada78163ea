"""The keys of a queue that are nearest to what the model computes of a sample: what a contrastive loss sees."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eim_jax.config import Losses
from eim_jax.losses.contrastive import as_queries
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
    query = as_queries(loss.query(Forward(vlm, settings, params, batch)), settings.similarity, queue.center)
    found = query @ queue.keys.T.astype(jnp.float32)
    return found if queue.scale is None else found * queue.scale[None]

"""After SEA: each of the ST's tokens is contrasted with words, instead of their mean with a text's mean.

Yin et al., SEA: Supervised Embedding Alignment for Token-Level Visual-Textual Integration in MLLMs (EMNLP 2025, arXiv
2408.11813): CLIP chooses a word for each visual token, and the connector's output is contrasted with the word's
embedding in the LM, against the other words of the batch. Here the words are the sample's own text's, and which of them
a token means is left to the loss: as with several positives, the likelihoods of all are added.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eim_jax.config import Config, Losses
from eim_jax.losses.contrastive import unit
from eim_jax.losses.kinds import Forward
from eim_jax.losses.loss_st import without_eos
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM

NEVER = -1e9  # finite: what is left out by a mask must not turn its gradient into NaN


@dataclass(frozen=True)
class WordLoss:
    """loss_W: -log of the share that the own text's tokens have among the whole batch's, for each of the ST's tokens.

    What the batch's samples share, as "a", tells nothing about one of them, and its share is accordingly small.
    """

    name: str = "words"
    title: str = "loss_W"
    queue: None = None
    needs_image: bool = True

    def fields(self, settings: Losses) -> frozenset[str]:
        """An image and its text."""
        return frozenset({"image", "has_image", "tokens", "valid"})

    def normaliser(self, vlm: VLM, batch: Batch) -> Float[Array, ""]:
        """The rows with an image and a word."""
        return jnp.float32((batch.read("has_image") & without_eos(batch.read("valid")).any(axis=1)).sum())

    def value(self, forward: Forward, queue: Queue | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum over the rows that take part of the mean over the ST's tokens, in nats; nothing more to log.

        Negatives are the tokens of the rows that are computed together: of a micro-batch, where there are such.
        """
        batch, words = forward.batch, without_eos(forward.batch.read("valid"))
        shown = batch.read("has_image") & words.any(axis=1)
        keys = unit(forward.vlm.embed(forward.params, batch.read("tokens")).astype(jnp.float32))
        queries = unit(forward.connected.astype(jnp.float32))
        scores = jnp.einsum("bmd,ctd->bmct", queries, keys) / forward.settings.tau
        scores = jnp.where((words & shown[:, None])[None, None], scores, NEVER)
        own = jnp.diagonal(scores, axis1=0, axis2=2)  # [m t b]
        nats = jax.nn.logsumexp(scores, axis=(2, 3)) - jax.nn.logsumexp(own, axis=1).T
        return jnp.where(shown, nats.mean(axis=1), 0).sum(), {}

    def check(self, config: Config) -> None:
        """Takes any settings."""

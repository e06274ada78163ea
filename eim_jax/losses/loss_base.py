"""loss_base: next-token cross-entropy of the response."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eim_jax.config import Config, Losses
from eim_jax.losses.kinds import Forward
from eim_jax.losses.next_token import head_xent
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM


@dataclass(frozen=True)
class NextTokenLoss:
    """The language model's own loss, with the same interface as a contrastive one; it reads no queue.

    Rows without an image are read as text alone, so data of texts alone is fine. `mean` is what it is the mean of:
    "tokens", the supervised ones; "rows", of each row's own mean, where a row without one does not count.
    """

    name: str
    title: str
    queue: None = None
    needs_image: bool = False
    mean: str = "tokens"

    def averaged(self, mean: str) -> "NextTokenLoss":
        """Returns the loss as a stage's `loss_mean` has it; within a micro-batch all tokens weigh the same."""
        return replace(self, mean="rows" if mean == "rows" else "tokens")

    def fields(self, settings: Losses) -> frozenset[str]:
        """The batch fields that it reads besides `index`."""
        return frozenset({"image", "has_image", "tokens", "valid", "supervised"})

    def normaliser(self, vlm: VLM, batch: Batch) -> Float[Array, ""]:
        """The supervised tokens, or the rows that have one."""
        supervised = _supervised(vlm, batch)
        return (supervised.any(axis=1) if self.mean == "rows" else supervised).sum().astype(jnp.float32)

    def value(self, forward: Forward, queue: Queue | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum of -log p(token) over the supervised tokens, or of rows' means, in nats; nothing more to log."""
        vlm, params, batch = forward.vlm, forward.params, forward.batch
        hidden = vlm.lm_hidden(
            params,
            forward.connected,
            batch.read("tokens"),
            batch.read("valid"),
            has_image=batch.has_image,
            dropout=forward.dropout(0),
            packing=batch.packed("image"),
        )
        head, axis = vlm.head_weights(params)
        supervised = _supervised(vlm, batch)
        if self.mean == "rows":
            supervised = supervised / jnp.maximum(supervised.sum(axis=1, keepdims=True), 1)
        tokens, cap = batch.read("tokens"), vlm.logit_cap
        value, _ = head_xent(hidden, head, tokens, supervised, vocab_axis=axis, cap=cap, mesh=forward.mesh)
        return value, {}

    def readings(self, settings: Losses) -> frozenset[str]:
        """What it lets the LM read of a batch (`batch.READINGS`)."""
        return frozenset({"image"})

    def check(self, config: Config) -> None:
        """Takes any settings."""


def _supervised(vlm: VLM, batch: Batch) -> Bool[Array, "b t"]:
    """The tokens that count: not the first of a row in which nothing stands before it."""
    supervised = batch.read("supervised")
    if vlm.bos is not None:
        return supervised
    first = jnp.arange(supervised.shape[1])[None] == 0
    return supervised & (vlm.starts(batch.read("has_image"))[:, None] | ~first)


BASE = NextTokenLoss("base", "loss_base")

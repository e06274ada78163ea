"""loss_ST: the mean of the ST's output tokens against the mean LM embedding of the sample's text, K_e."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eim_jax.losses.key_sources import LM_TEXTS
from eim_jax.losses.kinds import ContrastiveLoss, QueueKind
from eim_jax.models.pooling import mean_tokens
from eim_jax.models.vlm import VLM


def without_eos(valid: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """All of a text but its last token, the EOS; `valid` are the slots that are no padding."""
    return valid & (jnp.cumsum(valid, axis=1) < valid.sum(axis=1, keepdims=True))


def mean_embedding(vlm: VLM, params: dict, texts: Any) -> Float[Array, "b d"]:
    """The mean of LM_e over instruction and response, without the EOS."""
    tokens, valid = texts
    return mean_tokens(vlm.embed(params, tokens), without_eos(valid))


EMBEDDINGS = QueueKind(
    name="embed",
    symbol="K_e",
    source=LM_TEXTS,
    encode=mean_embedding,
    pooling="mean of LM_e over instruction and response, without EOS",
)

ST = ContrastiveLoss(
    name="st",
    title="loss_ST",
    queue=EMBEDDINGS,
    query=lambda forward: forward.connected.astype(jnp.float32).mean(axis=1),
    needs=frozenset({"image"}),
    needs_image=True,
)

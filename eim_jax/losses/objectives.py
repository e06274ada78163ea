"""A stage's objective: the weighted sum of its losses, each forward computed once and only if a loss needs it.

| loss | query | key | equation |
|---|---|---|---|
| base | - | - | next-token cross-entropy of the response |
| ie | [CLS] through CLIP's frozen output layer | K_t: [EOS] feature of CLIP.text | loss_IE |
| st | mean over the ST's output tokens | K_e: mean over LM_e of the sample's text | loss_ST |
| lm | last-token vector out of LM_block | K_b: the same vector of the original LM | loss_LM |

All three queue losses: loss_i = -log( exp(s(q_i,k_i)/tau) / sum_j exp(s(q_i,k_j)/tau) ) over all N training samples.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from eim_jax.config import Losses, Stage
from eim_jax.losses.next_token import head_xent
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM, last_token, mean_tokens


@dataclass(frozen=True)
class Loss:
    """What a loss reads: batch fields (besides `index`) and its queue."""

    needs: frozenset[str]
    queue: str | None


LOSSES = {
    "base": Loss(frozenset({"image", "has_image", "tokens", "valid", "supervised"}), None),
    "ie": Loss(frozenset({"image", "has_image"}), "caption"),
    "st": Loss(frozenset({"image", "has_image"}), "embed"),
    "lm": Loss(frozenset({"tokens", "valid"}), "hidden"),
}


def weights(stage: Stage) -> dict[str, float]:
    """The stage's losses with a weight above 0."""
    return {name: w for name, w in dataclasses.asdict(stage.losses).items() if w > 0}


def fields(stage: Stage, losses: Losses) -> frozenset[str]:
    """The batch fields that the stage's losses read ("image" may be served as cached "features")."""
    needed = frozenset({"index"}).union(*(LOSSES[name].needs for name in weights(stage)))
    if losses.lm_with_image and "lm" in weights(stage):
        needed |= LOSSES["st"].needs
    return needed


def queue_kinds(stage: Stage) -> tuple[str, ...]:
    """The queues that the stage's losses read."""
    return tuple(LOSSES[name].queue for name in weights(stage) if LOSSES[name].queue)


def encoder(vlm: VLM, kind: str, losses: Losses) -> tuple[Callable, str]:
    """(params, (tokens [b t], valid [b t])) -> a queue's keys [b D], and the words that name its pooling on disk.

    K_t reads CLIP tokens; K_e and K_b read LM tokens that end with EOS.
    """
    if kind == "caption":
        return lambda params, texts: vlm.caption_feature(params, texts[0]), "[EOS] of CLIP.text, projected"
    if kind == "embed":

        def embed(params, texts):
            tokens, valid = texts
            text = valid & (jnp.cumsum(valid, axis=1) < valid.sum(axis=1, keepdims=True))  # all but the EOS
            return mean_tokens(vlm.embed(params, tokens), text)

        return embed, "mean of LM_e over instruction and response, without EOS"

    def hidden(params, texts):
        tokens, valid = texts
        return last_token(_text(vlm.lm_block(params, tokens, valid, original=True), tokens), valid)

    return hidden, "LM_block at EOS, text alone"


def query(
    vlm: VLM,
    losses: Losses,
    name: str,
    params: dict,
    batch: Batch,
    seen: jax.Array | None,
    visual: jax.Array | None,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """The query [b D] of loss ie, st or lm, from what `see` and `connect` gave (those that the loss needs)."""
    if name == "ie":
        return vlm.pooled(params, seen)
    if name == "st":
        return visual.astype(jnp.float32).mean(axis=1)
    image = (visual, batch.has_image) if losses.lm_with_image else (None, None)
    hidden = vlm.lm_block(params, batch.tokens, batch.valid, visual=image[0], has_image=image[1], dropout=dropout)
    return last_token(_text(hidden, batch.tokens), batch.valid)


def _text(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """The columns of the text, which are the last ones."""
    return hidden[:, -tokens.shape[1] :]


def normalisers(vlm: VLM, stage: Stage, batch: Batch) -> dict[str, jax.Array]:
    """What each loss divides by, over the whole batch: supervised tokens, or rows that take part.

    Known before any forward pass, so that micro-batches divide by the whole batch's count: accumulation is exact.
    """
    rows = jnp.float32(batch.index.shape[0])
    counts = {}
    for name in weights(stage):
        if name == "base":
            counts[name] = _supervised(vlm, batch).sum().astype(jnp.float32)
        else:
            counts[name] = rows if name == "lm" else batch.has_image.sum().astype(jnp.float32)
    return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}


def objective(vlm: VLM, stage: Stage, losses: Losses, mesh=None) -> Callable:
    """The stage's loss as a pure function.

    (params, batch, queues {kind: Queue}, normalisers, key|None) -> (loss f32[], metrics {name: f32[]}); metrics and
    loss are shares of the whole batch's means, so that they add up over micro-batches. Rows without an image carry
    weight 0 in loss_IE and loss_ST (ours: the paper only suspects them).
    """
    active = weights(stage)
    needs_image = "image" in fields(stage, losses)

    def loss_of(params: dict, batch: Batch, queues: dict[str, Queue], norms: dict, key: jax.Array | None):
        seen = visual = None
        if needs_image:
            cached = batch.features
            seen = cached if cached is not None else vlm.encode_image(params, batch.image, dropout=fold(key, 2))
        if "base" in active or "st" in active or (losses.lm_with_image and "lm" in active):
            visual = vlm.connect(params, seen)
        rows = None if batch.has_image is None else batch.has_image.astype(jnp.float32)
        total, metrics = jnp.float32(0.0), {}

        def contrast(name, query, row_weights):
            kind = LOSSES[name].queue
            nce = queues[kind].nce(
                query,
                batch.index,
                tau=losses.tau,
                similarity=losses.similarity,
                weights=row_weights,
                positives="alone" if name == "lm" and losses.lm_distil else losses.positives,
                chunk=losses.chunk,
                mesh=mesh,
            )
            for field in ("recall1", "rank", "similarity", "effective"):
                metrics[f"queue/{name}/{field}"] = getattr(nce, field) / norms[name]
            return nce.loss

        for name, weight in active.items():
            if name == "base":
                hidden = vlm.lm_hidden(
                    params, visual, batch.tokens, batch.valid, has_image=batch.has_image, dropout=fold(key, 0)
                )
                head, axis = vlm.head_weights(params)
                supervised = _supervised(vlm, batch)
                value, _ = head_xent(hidden, head, batch.tokens, supervised, vocab_axis=axis, mesh=mesh)
            else:
                found = query(vlm, losses, name, params, batch, seen, visual, fold(key, 1))
                value = contrast(name, found, None if name == "lm" else rows)
            metrics[f"loss/{name}"] = value / norms[name]
            total = total + weight * metrics[f"loss/{name}"]
        metrics["loss"] = total
        return total, metrics

    return loss_of


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
    """A key of its own for one use; None stays None (no dropout)."""
    return None if key is None else jax.random.fold_in(key, number)


def _supervised(vlm: VLM, batch: Batch) -> jax.Array:
    """The tokens that loss_base counts. Without BOS, nothing stands before a text-only row's first token."""
    if vlm.bos is not None:
        return batch.supervised
    first = jnp.arange(batch.tokens.shape[1])[None] == 0
    return batch.supervised & (batch.has_image[:, None] | ~first)

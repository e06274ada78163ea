"""loss_LM: the LM's vector at the text's last token against the same vector of the original LM, K_b."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from eim_jax.config import Config, ConfigError, Losses
from eim_jax.losses.key_sources import LM_TEXTS
from eim_jax.losses.kinds import ContrastiveLoss, Forward, QueueKind
from eim_jax.losses.online_softmax import Positives
from eim_jax.models.pooling import last_token
from eim_jax.models.vlm import VLM


def original_last_token(vlm: VLM, params: dict, texts: Any) -> Float[Array, "b d"]:
    """What the LM gives at the EOS of the text alone."""
    tokens, valid = texts
    return _at_eos(vlm.lm_block(params, tokens, valid), tokens, valid)


def _query(forward: Forward) -> Float[Array, "b d"]:
    vlm, batch = forward.vlm, forward.batch
    tokens, valid = batch.read("tokens"), batch.read("valid")
    image = (forward.connected, batch.has_image) if forward.settings.lm_with_image else (None, None)
    hidden = vlm.lm_block(
        forward.params,
        tokens,
        valid,
        visual=image[0],
        has_image=image[1],
        dropout=forward.dropout(1),
        packing=batch.packed(_reading(forward.settings)),
    )
    return _at_eos(hidden, tokens, valid)


def _reading(settings: Losses) -> str:
    return "image" if settings.lm_with_image else "text"


def _at_eos(hidden: Float[Array, "b _ d"], tokens: Array, valid: Array) -> Float[Array, "b d"]:
    """The text's columns are the last ones; BOS, markers and visual tokens stand before them."""
    return last_token(hidden[:, -tokens.shape[1] :], valid)


@dataclass(frozen=True)
class LastTokenLoss(ContrastiveLoss):
    """loss_LM with its own two settings: `lm_with_image` and `lm_distil`."""

    def fields(self, settings: Losses) -> frozenset[str]:
        """Text alone, or with `lm_with_image` the image before it; all rows take part either way."""
        return super().fields(settings) | ({"image", "has_image"} if settings.lm_with_image else set())

    def readings(self, settings: Losses) -> frozenset[str]:
        """What it lets the LM read of a batch (`batch.READINGS`)."""
        return frozenset({_reading(settings)})

    def positives(self, settings: Losses) -> Positives:
        """With `lm_distil` the own key alone, no other key at all."""
        return "alone" if settings.lm_distil else super().positives(settings)

    def check(self, config: Config) -> None:
        """Raises ConfigError for `lm_distil` with chosen negatives, or the dot product, which has no least loss."""
        if config.losses.lm_distil and config.losses.similarity != "cosine":
            raise ConfigError("config.losses.lm_distil needs config.losses.similarity='cosine'")
        if config.losses.lm_distil and config.losses.of("negatives", self.name) != "queue":
            raise ConfigError(
                "config.losses.lm_distil has no negatives, config.losses.negatives="
                f"{config.losses.negatives!r} chooses some of loss_LM: leave one of them out"
            )


LAST_TOKENS = QueueKind(
    name="hidden",
    symbol="K_b",
    source=LM_TEXTS,
    encode=original_last_token,
    pooling="LM_block at EOS, text alone",
)

LM = LastTokenLoss(name="lm", title="loss_LM", queue=LAST_TOKENS, query=_query, needs=frozenset({"tokens", "valid"}))

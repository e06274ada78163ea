"""Whether the longest training row fits the language model's context, with all that stands before its text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from eim_jax.config import ConfigError, Losses, Stage
from eim_jax.data.samples import Split
from eim_jax.data.tokenize import Encoded
from eim_jax.losses import objective
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import parts_of
from eim_jax.training import partition


def check_context(
    vlm: VLM,
    stage: Stage,
    settings: Losses,
    params: dict[str, jax.ShapeDtypeStruct],
    encoded: Encoded,
    train: Split,
    where: str,
) -> None:
    """Compares the longest row with the context, before anything is compiled.

    Args:
      vlm: the arm's modules.
      stage: whose losses decide whether the language model runs, and whether it reads pictures.
      settings: the config's `losses`.
      params: shape and dtype of every parameter.
      encoded: the training rows.
      train: the samples, for the message.
      where: the stage's field.

    Raises:
      ConfigError: it does not fit; it names the sample, the context and the longest text that fits.
    """
    needed = objective.fields(stage, settings)
    if "tokens" not in needed:
        return
    context, lengths = vlm.lm.config.context, encoded.valid.sum(1)
    # All rows of a batch have the slots that one with an image needs, and the texts begin behind them.
    before = slots_before(vlm, params) if "image" in needed else tokens_before(vlm, params, with_image=False)
    worst = int(lengths.argmax())
    longest = int(lengths[worst])
    if before + longest > context:
        sample = train.samples[worst]
        fields = "" if sample.image is not None else " and config.data.max_tokens_text_only"
        room = f"set config.data.max_tokens{fields} to at most {context - before}"
        remedy = room if context - before > 1 else "give the ST fewer tokens (config.arm.*.features, st_tokens)"
        raise ConfigError(
            f"{where}: the longest text, that of sample {sample.id!r}, is {longest} tokens, and {before} slots stand "
            f"before it (visual tokens, BOS, markers), but the language model reads {context}: {remedy}"
        )


def tokens_before(vlm: VLM, params: Mapping[str, Any], with_image: bool) -> int:
    """Returns how many tokens the language model reads before a text, counted on shapes alone."""
    return _before(vlm, params, with_image, mixed=False)


def slots_before(vlm: VLM, params: Mapping[str, Any]) -> int:
    """Returns how many slots each row has before its text where rows with and without an image stand in one batch."""
    return _before(vlm, params, with_image=True, mixed=True)


def _before(vlm: VLM, params: Mapping[str, Any], with_image: bool, mixed: bool) -> int:
    rows, size = parts_of(vlm.mesh), vlm.visual.config.image_size

    def embeds(params, image, tokens):
        visual = vlm.connect(params, vlm.encode_image(params, image)) if with_image else None
        has_image = jnp.zeros(rows, bool) if mixed else None
        valid = jnp.ones(tokens.shape, bool)
        return vlm.lm_input(params, tokens, valid, visual=visual, has_image=has_image).embeds

    image, tokens = ((rows, size, size, 3), jnp.uint8), ((rows, 1), jnp.int32)
    arguments = (jax.ShapeDtypeStruct(*image), jax.ShapeDtypeStruct(*tokens))
    return jax.eval_shape(embeds, partition.unflatten(params), *arguments).shape[1] - 1

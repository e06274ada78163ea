"""Text of one batch after visual tokens and a prompt: greedy, beam and nucleus decoding over a key-value cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from eim_jax.generation.beam import beam, beams_of
from eim_jax.generation.decode_state import (
    DecodeConfig,
    Decoded,
    State,
    advance,
    begin,
    decoded,
    extend,
    loop,
    prefill,
    stops,
)
from eim_jax.models.lm_input import LMInput
from eim_jax.models.lora import Tuned


def generate(
    lm: nn.Module | Tuned,
    params: dict,
    visual: Float[Array, "b m d"] | None,
    prompt: Int[Array, "b t"] | None,
    prompt_valid: Bool[Array, "b t"] | None,
    config: DecodeConfig,
    *,
    eos_id: int | None,
    period_id: int | None = None,
    has_image: Bool[Array, "b"] | None = None,
    index: Int[Array, "b"] | None = None,
) -> Decoded:
    """Continues [visual tokens ; prompt] by at most config.max_tokens tokens; compiled once for each shape and config.

    Stops when every row has ended. Rows are independent: inputs sharded over the batch stay so.

    Args:
      lm: a language model with embed, hidden and logits (models/gpt2.py).
      params: its parameters.
      visual: the ST's output, or None.
      prompt: tokens after it, padded on the right, or None.
      prompt_valid: False for the prompt's padding; None means none.
      config: the method and its settings.
      eos_id: the token that ends a text; None for a model that has none.
      period_id: the token of ".", for stop_at_period.
      has_image: False for rows whose visual tokens are to be hidden; None means all have one.
      index: each row's identity for sampling, so that its text does not depend on its batch; 0..b-1 by default.

    Raises:
      ValueError: nothing to continue, no room in the LM's context, no period_id for stop_at_period.
    """
    if visual is None and prompt is None:
        raise ValueError("nothing to continue: neither visual tokens nor a prompt")
    read = _plain(lm, params, visual, prompt, prompt_valid, has_image)
    return continue_text(lm, params, read, config, eos_id=eos_id, period_id=period_id, index=index)


def continue_text(
    lm: nn.Module | Tuned,
    params: dict,
    read: LMInput,
    config: DecodeConfig,
    *,
    eos_id: int | None,
    period_id: int | None = None,
    index: Int[Array, "b"] | None = None,
    mesh: Mesh | None = None,
) -> Decoded:
    """Continues anything that `VLM.lm_input` gives: any LM, any way in which the image enters.

    Args:
      lm: the language model.
      params: its parameters.
      read: what it reads before the first new token.
      config: the method and its settings.
      eos_id: as for `generate`.
      period_id: as for `generate`.
      index: as for `generate`.
      mesh: the cache is laid out over it: rows over "data" and "fsdp", heads over "tensor".

    Raises:
      ValueError: no room in the LM's context, no period_id for stop_at_period.
    """
    check(lm, config, read.embeds.shape[1], period_id)
    return _generate(lm, config, eos_id, period_id, mesh, params, read, index)


def check(lm: nn.Module | Tuned, config: DecodeConfig, prefix: int, period_id: int | None) -> None:
    """Checks that `prefix` tokens and the new ones fit the LM's context.

    Args:
      lm: the language model.
      config: the decoding.
      prefix: tokens before the first new one.
      period_id: the token of ".", None where it is unknown.

    Raises:
      ValueError: they do not, or stop_at_period is asked for and the period's token is unknown.
    """
    if config.stop_at_period and period_id is None:
        raise ValueError("stop_at_period needs period_id, the token of '.'")
    if prefix + config.max_tokens > lm.config.context:
        room = f"{prefix} tokens and max_tokens {config.max_tokens}"
        raise ValueError(f"{room} do not fit the LM's context of {lm.config.context}")


def texts(decoded: Decoded, tokenizer) -> list[str]:
    """Returns each row's text, stripped of white space at its ends, by a Hugging Face tokenizer."""
    rows = zip(jax.device_get(decoded.tokens), jax.device_get(decoded.length), strict=True)
    return [tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True).strip() for tokens, length in rows]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(lm, config, eos_id, period_id, mesh, params, read: LMInput, index) -> Decoded:
    each = beams_of(lm, config) if config.method == "beam" else 1
    # The last token is never read; a step is traced, if not run, also where there is but one token.
    logits, cache = prefill(lm, params, read, each * max(config.max_tokens - 1, 1), mesh)
    search = beam if config.method == "beam" else _single
    state = search(lm, config, stops(config, eos_id, period_id), mesh, params, logits, cache, read, index)
    return decoded(state, eos_id)


@functools.partial(jax.jit, static_argnums=0)
def _plain(lm, params, visual, prompt, prompt_valid, has_image) -> LMInput:
    """Returns the LM's input [visual tokens ; prompt]."""
    parts, valid = [], []
    if visual is not None:
        parts.append(visual)
        shown = True if has_image is None else has_image[:, None]
        valid.append(jnp.broadcast_to(shown, visual.shape[:2]))
    if prompt is not None:
        parts.append(lm.apply({"params": params}, prompt, method="embed"))
        valid.append(jnp.ones(prompt.shape, bool) if prompt_valid is None else prompt_valid)
    embeds = jnp.concatenate([part.astype(parts[-1].dtype) for part in parts], axis=1)
    valid = jnp.concatenate(valid, axis=1)
    return LMInput(embeds, valid, jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0))


def _single(lm, config, ends, mesh, params, logits, cache, read, index) -> State:
    """Decodes greedily or by sampling: one text a row."""
    index = jnp.arange(logits.shape[0]) if index is None else index

    def step(state: State) -> State:
        logits, state = advance(lm, params, state, read.steer, mesh)
        return extend(config, ends, state, logits, index)

    start = extend(config, ends, begin(cache, read.last_position, config.max_tokens), logits, index)
    return loop(step, start, config.max_tokens)

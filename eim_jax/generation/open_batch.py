"""A batch that stays open: texts enter and leave while others are decoded, each with its own settings.

`continuous.continue_all` decodes a list that is known beforehand, all by the same settings. Here texts come when they
come, as requests to a server do, so temperature, top_p, seed and length are arrays with a value a row, not part of the
program: one program serves them all. The ring of keys and values is the same (see there).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eim_jax.generation.decode_state import (
    State,
    admit,
    advance,
    append,
    begin,
    log_probability,
    nucleus,
    prefill,
    put_rows,
)
from eim_jax.models.adapters.adapter import Steering
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.lm_input import LMInput


class RowSettings(NamedTuple):
    """How each row is decoded.

    Attributes:
      temperature: 0 takes the most probable token, above 0 it divides the logits before sampling.
      top_p: nucleus mass, 0 to 1.
      most: tokens at which the text ends, 1 to the batch's own limit; with its prefix no more than the LM's context.
      seed: of the row's samples. A row is sampled as row 0 of `sampler.continue_text` with this seed.
    """

    temperature: Float[Array, "r"] | np.ndarray
    top_p: Float[Array, "r"] | np.ndarray
    most: Int[Array, "r"] | np.ndarray
    seed: Int[Array, "r"] | np.ndarray


class Progress(NamedTuple):
    """What the rows hold after some steps, as NumPy arrays; T is the batch's most tokens.

    `tokens` of a text that was ended by its end token include that token, and so does `length`.
    """

    tokens: Int[np.ndarray, "r T"]
    logprobs: Float[np.ndarray, "r T"]
    length: Int[np.ndarray, "r"]
    done: Bool[np.ndarray, "r"]


class _Held(NamedTuple):
    state: State
    steer: Steering | None
    settings: RowSettings
    logprobs: Float[Array, "r T"]


class OpenBatch:
    """Places for texts of one model.

    Args:
      lm: the language model.
      params: its parameters.
      rows: how many texts are decoded at once.
      prefix: the longest prefix, in slots.
      most: most tokens generated for a text.
      ends: tokens that end a text.
      mesh: over which the cache is laid out.
    """

    def __init__(
        self,
        lm: nn.Module | Any,
        params: dict,
        *,
        rows: int,
        prefix: int,
        most: int,
        ends: Sequence[int],
        mesh: Mesh | None = None,
    ) -> None:
        self.rows, self.most, self._prefix, self._params = rows, most, prefix, params
        self._how = (lm, tuple(ends), mesh)
        self._held: _Held | None = None

    def admit(self, read: LMInput, places: Sequence[int], settings: RowSettings) -> None:
        """Runs a group's prefixes through the LM and puts them, with their first tokens, into free places.

        Args:
          read: what the LM reads for a group of texts, at most `prefix` slots.
          places: a free place for each of the group's first rows; the rows behind them are padding.
          settings: of the group's rows, padding included.
        """
        if self._held is None:
            self._held = _empty(*self._how, self.rows, self._prefix, self.most, read)
        at = np.full(read.valid.shape[0], self.rows, np.int32)  # place `rows` does not exist: padding is dropped
        at[: len(places)] = places
        self._held = _admit(*self._how, self._params, self._held, read, at, settings)

    def run(self, steps: int, leaving: Sequence[int] = ()) -> Progress:
        """Adds up to `steps` tokens to each unfinished text.

        Args:
          steps: fewer where all have ended; 0 only reads.
          leaving: places of texts that nobody wants any more: they are free from now on.
        """
        left = np.zeros(self.rows, bool)
        left[list(leaving)] = True
        self._held, progress = _run(*self._how, self._params, self._held, left, np.int32(steps))
        return Progress(*jax.device_get(progress))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _empty(lm, ends, mesh, rows, prefix, most, read: LMInput) -> _Held:
    """Returns `rows` free places."""
    cache = init_cache(lm.config, rows, prefix + most - 1).place(mesh)
    state = begin(cache, jnp.zeros(rows, jnp.int32), most)
    steer = jax.tree.map(lambda a: jnp.zeros((a.shape[0], rows, *a.shape[2:]), a.dtype), read.steer)
    zero, count = jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32)
    settings = RowSettings(zero, zero, count, count)
    return _Held(state._replace(done=jnp.ones(rows, bool)), steer, settings, jnp.zeros((rows, most), jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _admit(lm, ends, mesh, params, held: _Held, read: LMInput, places, settings: RowSettings) -> _Held:
    logits, cache = prefill(lm, params, read, 0, mesh)
    most = held.logprobs.shape[1]
    new = begin(cache, read.last_position, most)
    new, logprobs = _extend(ends, new, settings, logits, jnp.zeros((len(places), most), jnp.float32))

    state, steer = admit(held.state, held.steer, new, read.steer, cache, places, mesh)
    put = functools.partial(put_rows, places=places)
    return _Held(state, steer, jax.tree.map(put, held.settings, settings), put(held.logprobs, logprobs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _run(lm, ends, mesh, params, held: _Held, left, steps) -> tuple[_Held, Progress]:
    def step(carry):
        taken, state, logprobs = carry
        logits, state = advance(lm, params, state, held.steer, mesh)
        state, logprobs = _extend(ends, state, held.settings, logits, logprobs)
        # A finished text is stepped with the others, unread; its position stays, or it would leave the LM's context.
        position = jnp.where(state.done, held.state.position, state.position)
        return taken + 1, state._replace(cache=state.cache.turn(), position=position), logprobs

    state = held.state._replace(done=held.state.done | left)
    going = jnp.int32(0), state, held.logprobs
    _, state, logprobs = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[1].done.all(), step, going)
    out = Progress(state.tokens, logprobs, state.length, state.done)
    if mesh is not None:  # the host reads them
        out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec()))
    return held._replace(state=state, logprobs=logprobs), out


def _extend(ends, state: State, settings: RowSettings, logits, logprobs) -> tuple[State, Float[Array, "r T"]]:
    """Adds the next token to each unfinished row, the most probable one or a sample, and notes its log-probability."""
    best = jax.lax.top_k(logits, 1)[1][:, 0]

    def sampled() -> Int[Array, "r"]:
        fold = jax.vmap(jax.random.fold_in)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(settings.seed)
        warm = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
        kept = nucleus(logits, settings.top_p[:, None], warm)
        drawn = jax.vmap(jax.random.categorical)(fold(keys, state.length), kept)
        return jnp.where(settings.temperature > 0, drawn, best).astype(best.dtype)

    # Sampling costs passes over the vocabulary: none where no row wants it.
    wanted = jnp.any((settings.temperature > 0) & ~state.done)
    token = jax.lax.cond(wanted, sampled, lambda: best)
    here = (jnp.arange(logprobs.shape[1])[None] == state.length[:, None]) & ~state.done[:, None]
    logprobs = jnp.where(here, log_probability(logits, token)[:, None], logprobs)
    return append(ends, state, logits, token, settings.most), logprobs

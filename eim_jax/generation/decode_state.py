"""What all decoding methods share: their settings, the state of the rows, one step of the LM over its cache."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import Steering
from eim_jax.models.kv_cache import Cache, init_cache
from eim_jax.models.lm_input import LMInput


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode.

    Attributes:
      method: "greedy", "beam" (ClipCap's, ranked by mean log-probability), or "nucleus" (sampling).
      beams: width of the beam search.
      max_tokens: most tokens generated for a row (ClipCap: 67).
      stop_at_period: the period token ends a text too, and stays in it (ClipCap trains without EOS).
      top_p: nucleus mass; sampling is among the most probable tokens that reach it together.
      temperature: divides the logits before sampling.
      seed: of the sampling.
    """

    method: str = "greedy"
    beams: int = 5
    max_tokens: int = 67
    stop_at_period: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):  # noqa: D105
        if self.method not in ("greedy", "beam", "nucleus"):
            raise ValueError(f"method {self.method!r} is not greedy, beam or nucleus")
        if self.beams < 1 or self.max_tokens < 1:
            raise ValueError(f"beams {self.beams} and max_tokens {self.max_tokens} must be at least 1")
        if not 0 <= self.top_p <= 1 or not self.temperature > 0:
            raise ValueError(f"top_p {self.top_p} must be in [0, 1] and temperature {self.temperature} positive")


class Decoded(NamedTuple):
    """The generated text of each row; T = max_tokens.

    `tokens` is 0 from `length` on. EOS is not part of the text, the period of stop_at_period is. `logprob` is the mean
    log-probability under the model (temperature 1, nothing cut) of all generated tokens, EOS included.
    """

    tokens: Int[Array, "b T"]
    length: Int[Array, "b"]
    logprob: Float[Array, "b"]


class State(NamedTuple):
    """What one step of any method reads and writes.

    There are r rows: one a text (r = b), or in beam search one a beam (r = b * beams, those of an image side by side).
    The cache has b rows in either case.
    """

    step: Int[Array, ""]  # tokens generated so far
    cache: Cache
    last: Int[Array, "r"]  # the newest token
    position: Int[Array, "r"]  # the newest token's position
    tokens: Int[Array, "r T"]
    length: Int[Array, "r"]  # tokens generated for the row, EOS included
    total: Float[Array, "r"]  # sum of log-probabilities
    done: Bool[Array, "r"]
    sees: Bool[Array, "b k slots"] | None = None  # beam search: the cache slots that belong to each beam


def stops(config: DecodeConfig, eos_id: int | None, period_id: int | None) -> tuple[int, ...]:
    """Returns the tokens that end a text.

    Args:
      config: says whether a period does.
      eos_id: the end-of-text token, None for a model that has none.
      period_id: the token of ".".
    """
    ends = (eos_id, period_id if config.stop_at_period else None)
    return tuple(token for token in ends if token is not None)


def decoded(state: State, eos_id: int | None) -> Decoded:
    """Returns the texts of finished rows. EOS counts in the log-probability and is left out of the text."""
    newest = jnp.take_along_axis(state.tokens, jnp.maximum(state.length[:, None] - 1, 0), axis=1)[:, 0]
    length = state.length if eos_id is None else state.length - (newest == eos_id)
    tokens = jnp.where(jnp.arange(state.tokens.shape[1])[None] < length[:, None], state.tokens, 0)
    return Decoded(tokens, length, state.total / state.length)


def run(lm, params, embeds, positions, cache, steer, **valid):
    """Runs the LM's blocks over new embeddings.

    Args:
      lm: the language model.
      params: its parameters.
      embeds: of the new tokens.
      positions: of the new tokens.
      cache: keys and values of the tokens before them.
      steer: what an adapter adds inside the blocks, None for nothing.
      **valid: `valid`, False for padding among the new tokens.

    Returns:
      the last block's output, and the cache with the new tokens' keys and values.
    """
    steering = {} if steer is None else {"steer": steer}
    options = {"positions": positions, "cache": cache, "method": "hidden", **valid, **steering}
    return lm.apply({"params": params}, embeds, **options)


def prefill(lm, params, read: LMInput, room: int, mesh: Mesh | None) -> tuple[Float[Array, "b V"], Cache]:
    """Runs the LM over the whole prefix.

    Args:
      lm: the language model.
      params: its parameters.
      read: the prefix.
      room: slots that the cache has beyond the prefix.
      mesh: the cache is laid out over it, or None.

    Returns:
      the logits of the first new token, and a cache that holds the prefix and has `room` free slots.
    """
    b, slots = read.valid.shape
    cache = init_cache(lm.config, b, slots + room).place(mesh)
    hidden, cache = run(lm, params, read.embeds, read.positions, cache, read.steer, valid=read.valid)
    last = slots - 1 - jnp.argmax(read.valid[:, ::-1], axis=1)  # the slot of each row's last real token
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return lm.apply({"params": params}, hidden, method="logits")[:, 0], cache.place(mesh)


def advance(lm, params, state: State, steer: Steering | None, mesh: Mesh | None) -> tuple[Float[Array, "r V"], State]:
    """Runs the LM over each row's newest token.

    Args:
      lm: the language model.
      params: its parameters.
      state: of the rows.
      steer: what an adapter adds inside the blocks, None for nothing.
      mesh: the cache is laid out over it, or None.

    Returns:
      the logits of the next token, and the state with that token's keys and values in its cache.
    """
    embeds = lm.apply({"params": params}, state.last[:, None], method="embed")
    position = state.position + 1
    hidden, cache = run(lm, params, embeds, position[:, None], state.cache, steer)
    logits = lm.apply({"params": params}, hidden, method="logits")[:, 0]
    return logits, state._replace(cache=cache.place(mesh), position=position)


def ended(token: Int[Array, "r"], stops: Sequence[int]) -> Bool[Array, "r"]:
    """Returns which rows' newest token is one of `stops`."""
    return functools.reduce(jnp.logical_or, [token == stop for stop in stops], jnp.zeros(token.shape, bool))


def loop(step, state: State, max_tokens: int) -> State:
    """Repeats `step` until all rows have ended or hold `max_tokens` tokens.

    Args:
      step: state -> state with one token more.
      state: before the first step.
      max_tokens: most tokens generated for a row.
    """
    return jax.lax.while_loop(lambda s: (s.step < max_tokens) & ~jnp.all(s.done), step, state)


def begin(cache: Cache, position: Int[Array, "r"], max_tokens: int) -> State:
    """Returns the state before the first generated token.

    Args:
      cache: holds the prefix.
      position: of each row's last prefix token.
      max_tokens: most tokens generated for a row.
    """
    r, zero = len(position), jnp.zeros(len(position), jnp.int32)
    empty = jnp.zeros((r, max_tokens), jnp.int32)
    return State(jnp.int32(0), cache, zero, position, empty, zero, jnp.zeros(r), jnp.zeros(r, bool))


def extend(
    config: DecodeConfig, ends: Sequence[int], state: State, logits: Float[Array, "r V"], index: Int[Array, "r"]
) -> State:
    """Adds the next token to each unfinished row: the most probable one, or a sample.

    Args:
      config: the method (greedy or nucleus) and its settings.
      ends: tokens that end a text.
      state: of the rows, which may have generated different numbers of tokens.
      logits: of the next token.
      index: each row's identity: a sample depends on it and on the row's length alone, so not on the batch.
    """
    if config.method == "greedy":
        token = jax.lax.top_k(logits, 1)[1][:, 0]  # XLA's argmax over a vocabulary is ten times slower on CPU
    else:
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = jax.vmap(jax.random.fold_in)(fold(jax.random.key(config.seed), index), state.length)
        token = jax.vmap(jax.random.categorical)(keys, nucleus(logits, config.top_p, config.temperature))
    return append(ends, state, logits, token, config.max_tokens)


def put_rows(old: Array, new: Array, places: Int[Array, "g"]) -> Array:
    """Returns [r ...] with the rows of [g ...] at these places; a row whose place does not exist is dropped."""
    return old.at[places].set(new, mode="drop")


def admit(
    state: State,
    steer: Steering | None,
    new: State,
    new_steer: Steering | None,
    cache: Cache,
    places: Int[Array, "g"],
    mesh: Mesh | None,
) -> tuple[State, Steering | None]:
    """Puts texts whose prefixes have been read into places of a running batch.

    Args:
      state: of the batch's rows.
      steer: the batch's steering, None where the LM takes none.
      new: of the texts.
      new_steer: the texts' own steering.
      cache: the texts' keys and values.
      places: the rows to put them in; a text whose place does not exist is dropped.
      mesh: over which the cache lies.
    """
    fields = ("last", "position", "tokens", "length", "total", "done")
    state = state._replace(
        cache=state.cache.admit(places, cache).place(mesh),
        **{name: put_rows(getattr(state, name), getattr(new, name), places) for name in fields},
    )
    return state, jax.tree.map(lambda a, b: a.at[:, places].set(b, mode="drop"), steer, new_steer)


def append(
    ends: Sequence[int],
    state: State,
    logits: Float[Array, "r V"],
    token: Int[Array, "r"],
    most: int | Int[Array, "r"],
) -> State:
    """Adds a chosen token to each unfinished row.

    Args:
      ends: tokens that end a text.
      state: of the rows.
      logits: of the next token.
      token: which one it is.
      most: tokens at which a text ends, of all or of each row; no more than the state has room for.
    """
    kept = jnp.where(state.done, 0, token).astype(jnp.int32)
    here = (jnp.arange(state.tokens.shape[1])[None] == state.length[:, None]) & ~state.done[:, None]
    length = state.length + ~state.done
    return state._replace(
        step=state.step + 1,
        last=kept,
        tokens=jnp.where(here, kept[:, None], state.tokens),
        length=length,
        total=state.total + jnp.where(state.done, 0.0, log_probability(logits, token)),
        done=state.done | ended(token, ends) | (length == most),
    )


def log_probability(logits: Float[Array, "r V"], token: Int[Array, "r"]) -> Float[Array, "r"]:
    """Returns the log-probability of each row's token under the model: temperature 1, nothing cut."""
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def nucleus(
    logits: Float[Array, "b V"], top_p: float | Float[Array, "b 1"], temperature: float | Float[Array, "b 1"]
) -> Float[Array, "b V"]:
    """Returns logits / temperature with -inf outside the fewest most probable tokens whose mass reaches top_p.

    Tokens exactly as probable as the last one of them stay too; the most probable one always does (Holtzman et al.
    2020, section 3.1).

    Args:
      logits: of the next token.
      top_p: the mass that is kept, 0 to 1, of all rows or of each.
      temperature: above 1 flattens, below 1 sharpens; of all rows or of each.
    """
    logits = logits / temperature
    mass = jax.nn.softmax(logits, axis=-1)
    # Non-negative floats have the order of their bit patterns read as integers, so 31 halvings of the integers' range
    # find the least probability that stays, exactly. A sort of the vocabulary gives the same, but takes longer than the
    # model on a CPU.
    bits = jax.lax.bitcast_convert_type(mass.astype(jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the tokens from `low` on reach top_p, those from `high` on do not
        middle = low + (high - low) // 2
        reached = jnp.sum(jnp.where(bits >= middle, mass, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    highest = jnp.max(bits, axis=-1, keepdims=True)
    least, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(highest), highest + 1))
    return jnp.where(bits >= jnp.minimum(least, highest), logits, -jnp.inf)

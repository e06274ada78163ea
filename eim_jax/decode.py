"""Text from the LM after visual tokens and a prompt: greedy, beam and nucleus decoding over a key-value cache."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.cache import Cache, init_cache
from eim_jax.models.llama import Steer
from eim_jax.models.vlm import LMInput


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
    """What a step of any method needs; r rows = b, or b * beams with the beams of an image side by side.

    The cache has b rows in any case.
    """

    step: Int[Array, ""]  # tokens generated so far
    cache: Cache
    last: Int[Array, "r"]  # the newest token
    position: Int[Array, "r"]  # the newest token's position
    tokens: Int[Array, "r T"]
    length: Int[Array, "r"]  # of the text that scores: with EOS
    total: Float[Array, "r"]  # sum of log-probabilities
    done: Bool[Array, "r"]
    sees: Bool[Array, "b k slots"] | None = None  # beam search: the slots of each beam's past


def generate(
    lm: nn.Module,
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
    lm: nn.Module,
    params: dict,
    read: LMInput,
    config: DecodeConfig,
    *,
    eos_id: int | None,
    period_id: int | None = None,
    index: Int[Array, "b"] | None = None,
    mesh: Mesh | None = None,
) -> Decoded:
    """As `generate`, after anything that `VLM.lm_input` gives: any LM, any way in which the image enters.

    With `mesh` the cache is laid out over it: rows over "data" and "fsdp", heads over "tensor".
    """
    check(lm, config, read.embeds.shape[1], period_id)
    return _generate(lm, config, eos_id, period_id, mesh, params, read, index)


def check(lm: nn.Module, config: DecodeConfig, prefix: int, period_id: int | None) -> None:
    """Raises ValueError where `prefix` tokens and the new ones exceed the LM's context, or the period is unknown."""
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
    each = _beams(lm, config) if config.method == "beam" else 1
    # The last token is never read; a step is traced, if not run, also where there is but one token.
    logits, cache = prefill(lm, params, read, each * max(config.max_tokens - 1, 1), mesh)
    search = _beam if config.method == "beam" else _single
    state = search(lm, config, stops(config, eos_id, period_id), mesh, params, logits, cache, read, index)
    return decoded(state, eos_id)


def stops(config: DecodeConfig, eos_id: int | None, period_id: int | None) -> tuple[int, ...]:
    """The tokens that end a text."""
    ends = (eos_id, period_id if config.stop_at_period else None)
    return tuple(token for token in ends if token is not None)


def decoded(state: State, eos_id: int | None) -> Decoded:
    """The texts of finished rows: EOS took part in the score but is no text."""
    newest = jnp.take_along_axis(state.tokens, jnp.maximum(state.length[:, None] - 1, 0), axis=1)[:, 0]
    length = state.length if eos_id is None else state.length - (newest == eos_id)
    tokens = jnp.where(jnp.arange(state.tokens.shape[1])[None] < length[:, None], state.tokens, 0)
    return Decoded(tokens, length, state.total / state.length)


@functools.partial(jax.jit, static_argnums=0)
def _plain(lm, params, visual, prompt, prompt_valid, has_image) -> LMInput:
    """The LM's input [visual tokens ; prompt]."""
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


def _hidden(lm, params, embeds, positions, cache, steer, **valid):
    """LM_block's output and the grown cache."""
    steering = {} if steer is None else {"steer": steer}
    options = {"positions": positions, "cache": cache, "method": "hidden", **valid, **steering}
    return lm.apply({"params": params}, embeds, **options)


def prefill(lm, params, read: LMInput, room: int, mesh: Mesh | None) -> tuple[Float[Array, "b V"], Cache]:
    """Reads the prefix once: the next token's logits, and the cache with `room` free slots."""
    b, slots = read.valid.shape
    cache = init_cache(lm.config, b, slots + room).place(mesh)
    hidden, cache = _hidden(lm, params, read.embeds, read.positions, cache, read.steer, valid=read.valid)
    last = slots - 1 - jnp.argmax(read.valid[:, ::-1], axis=1)  # the slot of each row's last real token
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return lm.apply({"params": params}, hidden, method="logits")[:, 0], cache.place(mesh)


def advance(lm, params, state: State, steer: Steer | None, mesh: Mesh | None) -> tuple[Float[Array, "r V"], State]:
    """Feeds each row's newest token: the next token's logits, and the state with the grown cache."""
    embeds = lm.apply({"params": params}, state.last[:, None], method="embed")
    position = state.position + 1
    hidden, cache = _hidden(lm, params, embeds, position[:, None], state.cache, steer)
    logits = lm.apply({"params": params}, hidden, method="logits")[:, 0]
    return logits, state._replace(cache=cache.place(mesh), position=position)


def _ends(token: Int[Array, "r"], stops: Sequence[int]) -> Bool[Array, "r"]:
    return functools.reduce(jnp.logical_or, [token == stop for stop in stops], jnp.zeros(token.shape, bool))


def _loop(step, state: State, max_tokens: int) -> State:
    """Repeats `step` until all rows have ended or are full."""
    return jax.lax.while_loop(lambda s: (s.step < max_tokens) & ~jnp.all(s.done), step, state)


def begin(cache: Cache, position: Int[Array, "r"], max_tokens: int) -> State:
    """The state before the first token."""
    r, zero = len(position), jnp.zeros(len(position), jnp.int32)
    empty = jnp.zeros((r, max_tokens), jnp.int32)
    return State(jnp.int32(0), cache, zero, position, empty, zero, jnp.zeros(r), jnp.zeros(r, bool))


def extend(
    config: DecodeConfig, ends: Sequence[int], state: State, logits: Float[Array, "r V"], index: Int[Array, "r"]
) -> State:
    """Adds each unfinished row's next token, the most probable one or a sample; rows may be at different steps."""
    if config.method == "greedy":
        token = jax.lax.top_k(logits, 1)[1][:, 0]  # XLA's argmax over a vocabulary is ten times slower on CPU
    else:
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = jax.vmap(jax.random.fold_in)(fold(jax.random.key(config.seed), index), state.length)
        token = jax.vmap(jax.random.categorical)(keys, nucleus(logits, config.top_p, config.temperature))
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    kept = jnp.where(state.done, 0, token).astype(jnp.int32)
    here = (jnp.arange(config.max_tokens)[None] == state.length[:, None]) & ~state.done[:, None]
    length = state.length + ~state.done
    return state._replace(
        step=state.step + 1,
        last=kept,
        tokens=jnp.where(here, kept[:, None], state.tokens),
        length=length,
        total=state.total + jnp.where(state.done, 0.0, logprob),
        done=state.done | _ends(token, ends) | (length == config.max_tokens),
    )


def _single(lm, config, ends, mesh, params, logits, cache, read, index) -> State:
    """Greedy decoding, or sampling: one hypothesis a row."""
    index = jnp.arange(logits.shape[0]) if index is None else index

    def step(state: State) -> State:
        logits, state = advance(lm, params, state, read.steer, mesh)
        return extend(config, ends, state, logits, index)

    start = extend(config, ends, begin(cache, read.positions[:, -1], config.max_tokens), logits, index)
    return _loop(step, start, config.max_tokens)


def nucleus(logits: Float[Array, "b V"], top_p: float, temperature: float) -> Float[Array, "b V"]:
    """Returns logits / temperature with -inf outside the fewest most probable tokens whose mass reaches top_p.

    Tokens exactly as probable as the last one of them stay too; the most probable one always does (Holtzman et al.
    2020, section 3.1).
    """
    logits = logits / temperature
    mass = jax.nn.softmax(logits, axis=-1)
    # Non-negative floats are ordered as their bits are: 31 halvings find the exact least probability that stays. A sort
    # of the vocabulary gives the same and takes longer than the model on a CPU.
    bits = jax.lax.bitcast_convert_type(mass.astype(jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the tokens from `low` on reach top_p, those from `high` on do not
        middle = low + (high - low) // 2
        reached = jnp.sum(jnp.where(bits >= middle, mass, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    highest = jnp.max(bits, axis=-1, keepdims=True)
    least, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(highest), highest + 1))
    return jnp.where(bits >= jnp.minimum(least, highest), logits, -jnp.inf)


def _beam(lm, config, ends, mesh, params, logits, cache, read, index) -> State:
    """ClipCap's beam search (generate_beam in its predict.py), for a batch of images.

    The first step takes the k most probable tokens. From then on candidates compete by the *mean* log-probability of
    their tokens; a beam that has ended keeps its mean and competes as one candidate. Returns each image's best beam.

    An image's beams are k tokens of one row, so that the prefix is held once: each sees the prefix and the slots of its
    own past. A beam that follows another takes over what that one sees; no key or value ever moves.
    """
    b, k = logits.shape[0], _beams(lm, config)
    prefix, slots = read.valid.shape[1], cache.valid.shape[1]

    def best(logits: Float[Array, "r V"]) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
        top, token = jax.lax.top_k(logits, k)
        return top - jax.nn.logsumexp(logits, axis=-1, keepdims=True), token

    def next_logits(state: State) -> tuple[Float[Array, "r V"], State]:
        own = prefix + (state.step - 1) * k + jnp.arange(k)
        sees = state.sees | (jnp.arange(slots)[None] == own[:, None])[None]
        embeds = lm.apply({"params": params}, state.last.reshape(b, k), method="embed")
        position = state.position + 1
        past = state.cache._replace(mask=sees[:, None])
        hidden, cache = _hidden(lm, params, embeds, position.reshape(b, k), past, read.steer)
        logits = lm.apply({"params": params}, hidden, method="logits").reshape(b * k, -1)
        return logits, state._replace(cache=cache.place(mesh), position=position, sees=sees)

    def grow(state: State) -> State:
        logits, state = next_logits(state)
        logprob, token = best(logits)  # no other token of a beam can be among the k best candidates of its image
        frozen = jnp.where(jnp.arange(k) == 0, 0.0, -jnp.inf)[None]
        logprob = jnp.where(state.done[:, None], frozen, logprob)
        token = jnp.where(state.done[:, None], 0, token)
        length = state.length + ~state.done
        total = state.total[:, None] + logprob
        _, chosen = jax.lax.top_k((total / length[:, None]).reshape(b, k * k), k)
        parent = chosen // k  # within the image
        row = (jnp.arange(b)[:, None] * k + parent).reshape(-1)
        last = jnp.take_along_axis(token.reshape(b, k * k), chosen, axis=1).reshape(-1)
        tokens = jax.lax.dynamic_update_slice(state.tokens[row], last[:, None], (0, state.step))
        return State(
            step=state.step + 1,
            cache=state.cache,
            last=last,
            position=state.position[row],
            tokens=tokens,
            length=length[row],
            total=jnp.take_along_axis(total.reshape(b, k * k), chosen, axis=1).reshape(-1),
            done=state.done[row] | _ends(last, ends) & ~state.done[row],
            sees=jnp.take_along_axis(state.sees, parent[:, :, None], axis=1),
        )

    first, token = best(logits)
    last = token.reshape(-1)
    tokens = jnp.zeros((b * k, config.max_tokens), jnp.int32).at[:, 0].set(last)
    one = jnp.ones(b * k, jnp.int32)
    sees = jnp.broadcast_to(cache.valid[:, None], (b, k, slots))
    position = jnp.repeat(read.positions[:, -1], k)
    start = State(jnp.int32(1), cache, last, position, tokens, one, first.reshape(-1), _ends(last, ends), sees)
    state = _loop(grow, start, config.max_tokens)
    winner = jnp.argmax((state.total / state.length).reshape(b, k), axis=1) + jnp.arange(b) * k
    return state._replace(
        **{f: getattr(state, f)[winner] for f in ("last", "position", "tokens", "length", "total", "done")}
    )


def _beams(lm, config: DecodeConfig) -> int:
    """Beams of an image: no more than there are tokens."""
    return min(config.beams, lm.config.vocab)

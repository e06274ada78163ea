"""ClipCap's beam search over a key-value cache that the beams of an image share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eim_jax.generation.decode_state import DecodeConfig, State, ended, loop, run


def beam(lm, config, ends, mesh, params, logits, cache, read, index) -> State:
    """Searches as ClipCap does (generate_beam in its predict.py), for a batch of images.

    The first step takes the k most probable tokens. From then on candidates compete by the *mean* log-probability of
    their tokens; a beam that has ended keeps its mean and competes as one candidate.

    The k beams of an image share one row of the cache, so that its prefix is stored once. Every step writes k slots,
    one a beam. The mask `sees` says which slots belong to which beam: the prefix and the beam's own past. When a beam
    continues another one's text, it takes over that one's line of the mask; keys and values stay where they are.

    Args:
      lm: the language model.
      config: the number of beams and the most tokens.
      ends: tokens that end a text.
      mesh: over which the cache is laid out, or None.
      params: the LM's parameters.
      logits: of the first new token [b V].
      cache: holds the prefix, with k free slots for each further token.
      read: the prefix.
      index: unused: nothing is sampled.

    Returns:
      the state of each image's best beam.
    """
    b, k = logits.shape[0], beams_of(lm, config)
    first, token = _most_probable(logits, k)
    last = token.reshape(-1)
    tokens = jnp.zeros((b * k, config.max_tokens), jnp.int32).at[:, 0].set(last)
    one = jnp.ones(b * k, jnp.int32)
    sees = jnp.broadcast_to(cache.valid[:, None], (b, k, cache.valid.shape[1]))
    position = jnp.repeat(read.last_position, k)
    start = State(jnp.int32(1), cache, last, position, tokens, one, first.reshape(-1), ended(last, ends), sees)
    state = loop(lambda state: _grow(lm, params, ends, mesh, read, state), start, config.max_tokens)
    winner = jnp.argmax((state.total / state.length).reshape(b, k), axis=1) + jnp.arange(b) * k
    return state._replace(
        **{f: getattr(state, f)[winner] for f in ("last", "position", "tokens", "length", "total", "done")}
    )


def _grow(lm, params, ends, mesh, read, state: State) -> State:
    """Replaces the beams of every image by the k best continuations of any of them."""
    b, k, _ = state.sees.shape
    logits, state = _next_logits(lm, params, mesh, read, state)
    logprob, token = _most_probable(logits, k)  # no other token of a beam can be among its image's k best candidates
    # A beam that has ended is one candidate: it adds token 0 at no cost, and its other continuations are impossible.
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
        done=state.done[row] | ended(last, ends) & ~state.done[row],
        sees=jnp.take_along_axis(state.sees, parent[:, :, None], axis=1),
    )


def _next_logits(lm, params, mesh, read, state: State) -> tuple[Float[Array, "r V"], State]:
    """Runs the LM over each beam's newest token, in the slot that this step writes for it."""
    b, k, slots = state.sees.shape
    own = read.valid.shape[1] + (state.step - 1) * k + jnp.arange(k)
    sees = state.sees | (jnp.arange(slots)[None] == own[:, None])[None]
    embeds = lm.apply({"params": params}, state.last.reshape(b, k), method="embed")
    position = state.position + 1
    past = state.cache._replace(mask=sees[:, None])
    hidden, cache = run(lm, params, embeds, position.reshape(b, k), past, read.steer)
    logits = lm.apply({"params": params}, hidden, method="logits").reshape(b * k, -1)
    return logits, state._replace(cache=cache.place(mesh), position=position, sees=sees)


def _most_probable(logits: Float[Array, "r V"], k: int) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
    """The k most probable tokens of each row: log-probabilities and tokens."""
    top, token = jax.lax.top_k(logits, k)
    return top - jax.nn.logsumexp(logits, axis=-1, keepdims=True), token


def beams_of(lm, config: DecodeConfig) -> int:
    """Returns the number of beams of an image: no more than the vocabulary holds tokens."""
    return min(config.beams, lm.config.vocab)

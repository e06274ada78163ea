"""Continuous batching: a text that has ended makes room for a waiting one, so that no place in the batch stays idle.

The batch has a fixed number of places. Each step adds one token to every unfinished text. Texts wait in groups of one
size; as soon as as many places are free as a group has texts, the group's prefixes are run through the LM (`prefill`)
and put into these places. All shapes are fixed, so there is one program a prefix length, one to fill places and one to
step.

The cache is a ring buffer along the slots, with one position, common to all places, where the next key and value are
written. A step therefore writes one contiguous slice, not a different slot in every row. A new text's prefix is put
into the slots that come just before that position, wherever in the ring it is, so texts of different lengths run side
by side. A text does not depend on what runs beside it: it is the one that `sampler.continue_text` gives.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from eim_jax.generation.decode_state import (
    DecodeConfig,
    Decoded,
    State,
    admit,
    advance,
    begin,
    decoded,
    extend,
    prefill,
    put_rows,
    stops,
)
from eim_jax.generation.sampler import check
from eim_jax.models.adapters.adapter import Steering
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.lm_input import LMInput
from eim_jax.models.lora import Tuned


class _Places(NamedTuple):
    """The texts that are being decoded; a free place is one whose text is done."""

    state: State
    steer: Steering | None
    index: Int[Array, "r"]  # each text's identity for sampling


def continue_all(
    lm: nn.Module | Tuned,
    params: dict,
    groups: Iterable[tuple[Int[np.ndarray, "g"], LMInput]],
    config: DecodeConfig,
    *,
    rows: int,
    prefix: int,
    eos_id: int | None,
    period_id: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, Decoded]]:
    """Decodes any number of texts, a fixed number at a time.

    Args:
      lm: the language model.
      params: its parameters.
      groups: (indices, what the LM reads for them), all with the same number g <= `rows` of texts; index -1 marks
        padding of the group. They are taken one by one as places become free.
      config: greedy or nucleus decoding, and its settings.
      rows: places: how many texts are decoded at once.
      prefix: the longest of the groups' prefixes.
      eos_id: the token that ends a text; None for a model that has none.
      period_id: the token of ".", for stop_at_period.
      mesh: the cache is laid out over it.

    Yields:
      (index, its text as NumPy arrays without batch axis) of every text, in the order in which they end.

    Raises:
      ValueError: beam search (the beams of an image take their steps together: use `continue_text`), a group larger
        than `rows` or longer than `prefix`, and what `continue_text` raises.
    """
    if config.method == "beam":
        raise ValueError("beam search is decoded in whole batches, by sampler.continue_text")
    check(lm, config, prefix, period_id)
    how = (lm, config, eos_id, period_id, mesh)
    owner, held = np.full(rows, -1), None  # owner: the index of the text in each place, -1 for a free place
    waiting = _fitting(groups, rows, prefix)
    group = next(waiting, None)
    while group is not None or (owner >= 0).any():
        while group is not None and (free := np.flatnonzero(owner < 0)).size >= (group[0] >= 0).sum():
            index, read = group
            g = len(index)
            held = _empty(*how, rows, prefix, read) if held is None else held
            coming = np.flatnonzero(index >= 0)
            places = np.full(g, rows)  # place `rows` does not exist: what is put there (padding) is dropped
            places[coming] = free[: len(coming)]
            owner[places[coming]] = index[coming]
            held = _admit(*how, params, held, read, index.astype(np.int32), places.astype(np.int32))
            group = next(waiting, None)
        wanted = rows if group is None else int((group[0] >= 0).sum())
        held, done, said = _run(*how, params, held, wanted)
        done, said = jax.device_get((done, said))
        for place in np.flatnonzero(done & (owner >= 0)):
            yield int(owner[place]), jax.tree.map(lambda a, place=place: a[place], said)
            owner[place] = -1


def _fitting(groups, rows: int, prefix: int) -> Iterator[tuple]:
    """Yields the groups; raises ValueError at one that no number of free places could take."""
    for index, read in groups:
        g, length = read.valid.shape
        if g > rows or length > prefix:
            raise ValueError(f"a group of {g} rows of {length} slots does not fit {rows} rows of {prefix}")
        yield index, read


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _empty(lm, config, eos_id, period_id, mesh, rows, prefix, read: LMInput) -> _Places:
    """Returns `rows` free places."""
    cache = init_cache(lm.config, rows, prefix + config.max_tokens - 1).place(mesh)
    state = begin(cache, jnp.zeros(rows, jnp.int32), config.max_tokens)
    steer = jax.tree.map(lambda a: jnp.zeros((a.shape[0], rows, *a.shape[2:]), a.dtype), read.steer)
    return _Places(state._replace(done=jnp.ones(rows, bool)), steer, jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=6)
def _admit(lm, config, eos_id, period_id, mesh, params, held: _Places, read: LMInput, index, places) -> _Places:
    """Runs a group's prefixes through the LM and puts them, with their first tokens, into these places.

    A text whose place does not exist (the group's padding) is dropped.
    """
    logits, cache = prefill(lm, params, read, 0, mesh)
    new = begin(cache, read.last_position, config.max_tokens)
    new = extend(config, stops(config, eos_id, period_id), new, logits, index)

    state, steer = admit(held.state, held.steer, new, read.steer, cache, places, mesh)
    return _Places(state, steer, put_rows(held.index, index, places))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=6)
def _run(lm, config, eos_id, period_id, mesh, params, held: _Places, wanted) -> tuple[_Places, Array, Decoded]:
    """Steps until `wanted` places are free.

    Returns:
      the places, which of them are done, and the texts so far.
    """
    ends = stops(config, eos_id, period_id)

    def step(state: State) -> State:
        logits, state = advance(lm, params, state, held.steer, mesh)
        state = extend(config, ends, state, logits, held.index)
        # A finished text is stepped with the others, unread; its position stays, or it would leave the LM's context.
        position = jnp.where(state.done, held.state.position, state.position)
        return state._replace(cache=state.cache.turn(), position=position)

    state = jax.lax.while_loop(lambda s: jnp.sum(s.done) < wanted, step, held.state)
    out = state.done, decoded(state, eos_id)
    if mesh is not None:  # every process reads them
        out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec()))
    return held._replace(state=state), *out

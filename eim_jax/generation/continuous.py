"""Decoding in continuous batches: rows that have ended make room for waiting ones, in programs of fixed shape.

A fixed number of rows is held. Each step gives every unfinished one its next token; whenever a group's worth of rows
has ended, the next group is read (`prefill`) and takes their places. The cache is a ring that all rows write at the
same slot: a row that comes in gets its prefix in the slots just before it, so no row waits for another one's length,
and no step scatters. What a row says is what it says in any other batch (decode.continue_text).
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

from eim_jax.generation.decode_steps import (
    DecodeConfig,
    Decoded,
    State,
    advance,
    begin,
    decoded,
    extend,
    prefill,
    stops,
)
from eim_jax.generation.sampler import check
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.llama import Steer
from eim_jax.models.vlm import LMInput


class _Held(NamedTuple):
    """The rows that are being decoded; a free place is a row that is done."""

    state: State
    steer: Steer | None
    index: Int[Array, "r"]  # each row's identity for sampling


def continue_all(
    lm: nn.Module,
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
    """Yields (index, its text as NumPy arrays without batch axis) of every row of `groups`, in the order of their ends.

    Args:
      lm, params, config, eos_id, period_id, mesh: as decode.continue_text's; the method is greedy or nucleus.
      groups: (indices, what the LM reads for them), all of one number of rows g <= `rows`; -1 marks filling. Taken one
        by one as places become free. One program is compiled for each length of prefix.
      rows: how many are decoded at once.
      prefix: the longest of the groups' prefixes.

    Raises:
      ValueError: beam search (an image's beams share their steps: continue_text), a group larger than `rows` or longer
        than `prefix`, and what continue_text raises.
    """
    if config.method == "beam":
        raise ValueError("beam search is decoded in whole batches, by decode.continue_text")
    check(lm, config, prefix, period_id)
    how = (lm, config, eos_id, period_id, mesh)
    owner, held = np.full(rows, -1), None
    waiting = _fitting(groups, rows, prefix)
    group = next(waiting, None)
    while group is not None or (owner >= 0).any():
        while group is not None and (free := np.flatnonzero(owner < 0)).size >= (group[0] >= 0).sum():
            index, read = group
            g = len(index)
            held = _empty(*how, rows, prefix, read) if held is None else held
            coming = np.flatnonzero(index >= 0)
            places = np.full(g, rows)  # filling goes nowhere
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
    """The groups; raises ValueError at one that could never be held."""
    for index, read in groups:
        g, length = read.valid.shape
        if g > rows or length > prefix:
            raise ValueError(f"a group of {g} rows of {length} slots does not fit {rows} rows of {prefix}")
        yield index, read


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _empty(lm, config, eos_id, period_id, mesh, rows, prefix, read: LMInput) -> _Held:
    """`rows` free places."""
    cache = init_cache(lm.config, rows, prefix + config.max_tokens - 1).place(mesh)
    state = begin(cache, jnp.zeros(rows, jnp.int32), config.max_tokens)
    steer = jax.tree.map(lambda a: jnp.zeros((a.shape[0], rows, *a.shape[2:]), a.dtype), read.steer)
    return _Held(state._replace(done=jnp.ones(rows, bool)), steer, jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=6)
def _admit(lm, config, eos_id, period_id, mesh, params, held: _Held, read: LMInput, index, places) -> _Held:
    """Reads a group's prefixes and first tokens into these places; one from the number of rows on is left out."""
    logits, cache = prefill(lm, params, read, 0, mesh)
    new = begin(cache, read.positions[:, -1], config.max_tokens)
    new = extend(config, stops(config, eos_id, period_id), new, logits, index)

    def put(a: Array, b: Array) -> Array:
        return a.at[places].set(b, mode="drop")

    fields = ("last", "position", "tokens", "length", "total", "done")
    state = held.state._replace(
        cache=held.state.cache.admit(places, cache).place(mesh),
        **{name: put(getattr(held.state, name), getattr(new, name)) for name in fields},
    )
    steer = jax.tree.map(lambda a, b: a.at[:, places].set(b, mode="drop"), held.steer, read.steer)
    return _Held(state, steer, put(held.index, index))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=6)
def _run(lm, config, eos_id, period_id, mesh, params, held: _Held, wanted) -> tuple[_Held, Array, Decoded]:
    """Steps until `wanted` places are free: the rows, which of them are done, and what they have said."""
    ends = stops(config, eos_id, period_id)

    def step(state: State) -> State:
        logits, state = advance(lm, params, state, held.steer, mesh)
        state = extend(config, ends, state, logits, held.index)
        # A free place stays at its position, so that it never leaves the LM's context.
        position = jnp.where(state.done, held.state.position, state.position)
        return state._replace(cache=state.cache.turn(), position=position)

    state = jax.lax.while_loop(lambda s: jnp.sum(s.done) < wanted, step, held.state)
    out = state.done, decoded(state, eos_id)
    if mesh is not None:  # every process reads them
        out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec()))
    return held._replace(state=state), *out

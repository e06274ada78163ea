"""Continuous batches say what whole batches say, in any order of arrival, with one program a prefix length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from test_decode import EOS, VOCAB, logit_size, tiny, visual

from eim_jax.generation import continuous
from eim_jax.generation.sampler import DecodeConfig, continue_text
from eim_jax.models.lm_input import LMInput
from eim_jax.parallel.sharding import make_mesh

ROWS, LONGEST = 23, 9


@pytest.fixture(scope="module")
def world():
    """A tiny LM and the inputs of 23 rows: 3 visual tokens and prompts of 1 to 6 tokens."""
    lm, params = tiny()
    lengths = np.random.default_rng(0).integers(1, 7, ROWS)
    prompts = jax.random.randint(jax.random.key(5), (ROWS, 6), 0, VOCAB)
    words = lm.apply({"params": params}, prompts, method="embed")
    embeds = jnp.concatenate([visual(ROWS), words], axis=1)
    valid = jnp.arange(LONGEST)[None] < 3 + lengths[:, None]
    return lm, params, LMInput(embeds, valid, jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0))


def rows_of(read, rows, width):
    return jax.tree.map(lambda a: a[rows, :width], read)


def groups(read, order, size):
    """The rows in this order, `size` at a time, each group cut to its longest prefix."""
    for begin in range(0, len(order), size):
        real = order[begin : begin + size]
        index = np.full(size, -1)
        index[: len(real)] = real
        width = int(read.valid[jnp.asarray(real)].sum(1).max())
        yield index, rows_of(read, np.where(index < 0, real[-1], index), width)


def spoken(world, config, order, size=2, rows=5, **options):
    lm, params, read = world
    coming = groups(read, order, size)
    return dict(continuous.continue_all(lm, params, coming, config, rows=rows, prefix=LONGEST, eos_id=EOS, **options))


@pytest.mark.parametrize("method", ["greedy", "nucleus"])
def test_every_row_says_what_it_says_in_one_batch_whatever_the_order_of_arrival(world, method):
    lm, params, read = world
    config = DecodeConfig(method, max_tokens=12, seed=3)
    whole = continue_text(lm, params, read, config, eos_id=EOS, index=jnp.arange(ROWS))
    assert len(set(whole.length.tolist())) > 3  # they end at different steps
    size = logit_size(lm, params, visual(ROWS))
    for order in (np.arange(ROWS), np.random.default_rng(1).permutation(ROWS)):
        found = spoken(world, config, order)
        assert sorted(found) == list(range(ROWS))
        for row, said in found.items():
            assert said.tokens.tolist() == whole.tokens[row].tolist()
            assert said.length == whole.length[row]
            assert_close(said.logprob, whole.logprob[row], size=size)


def test_rows_enter_as_others_end_and_nothing_is_compiled_anew(world):
    read, config = world[2], DecodeConfig(max_tokens=11)
    continuous._run.clear_cache()
    continuous._admit.clear_cache()
    found = spoken(world, config, np.arange(ROWS), size=1, rows=3)
    assert continuous._run._cache_size() == 1
    assert continuous._admit._cache_size() == len({int(n) for n in read.valid.sum(1)})
    assert list(found) != sorted(found)  # a short late row overtakes a long early one


def test_a_ring_of_scanned_layers_is_the_same():
    lm, params = tiny(scan=True)
    embeds = visual(7)
    valid = jnp.ones((7, 3), bool)
    read = LMInput(embeds, valid, jnp.cumsum(valid, axis=1) - 1)
    config = DecodeConfig(max_tokens=9)
    whole = continue_text(lm, params, read, config, eos_id=EOS)
    coming = ((np.array([row]), rows_of(read, np.array([row]), 3)) for row in range(7))
    found = dict(continuous.continue_all(lm, params, coming, config, rows=2, prefix=3, eos_id=EOS))
    assert [found[row].tokens.tolist() for row in range(7)] == whole.tokens.tolist()


@pytest.mark.parametrize("method", ["greedy", "nucleus"])
def test_on_eight_devices_the_cache_is_split_by_rows_and_heads_and_the_texts_are_the_same(world, method):
    lm, params, read = world
    mesh, config = make_mesh((2, 2, 2)), DecodeConfig(method, max_tokens=8)
    whole = continue_text(lm, params, read, config, eos_id=EOS, index=jnp.arange(ROWS))
    seen, run = [], continuous._run

    def watched(*args):
        found = run(*args)
        seen.append(found[0].state.cache)
        return found

    continuous._run = watched
    try:
        found = spoken(world, config, np.arange(ROWS), size=4, rows=8, mesh=mesh)
    finally:
        continuous._run = run
    assert [found[row].tokens.tolist() for row in range(ROWS)] == whole.tokens.tolist()
    for leaf in jax.tree.leaves(seen[-1].kv):  # 8 rows over 4 parts, 2 heads over 2
        slots, width = leaf.shape[1], leaf.shape[3]
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, slots, 1, width)}


def test_what_cannot_be_decoded_continuously_is_an_error(world):
    with pytest.raises(ValueError, match="whole batches"):
        spoken(world, DecodeConfig("beam"), np.arange(3))
    with pytest.raises(ValueError, match="does not fit"):
        spoken(world, DecodeConfig(max_tokens=4), np.arange(9), size=9)

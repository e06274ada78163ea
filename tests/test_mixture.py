"""Claims about sources mixed by weight; oracles: counted rows, and the stream without a stop."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_instruct import alpaca, write

from eim_jax.config import Config, ConfigError, Data
from eim_jax.data.batch_order import Order
from eim_jax.data.datasets import DATASETS, load_files, load_split
from eim_jax.data.loader import batches
from eim_jax.data.mixture import Mixture
from eim_jax.data.shard_writer import prepare

SOURCES = st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 9)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.integers(0, 3))
def test_every_epoch_has_the_weights_shares_and_no_row_comes_again_before_its_sources_others(sources, seed):
    source_of = [number for number, (size, _) in enumerate(sources) for _ in range(size)]
    weights = [weight for _, weight in sources]
    mixture = Mixture(source_of, weights)
    epochs = [mixture.rows(seed, epoch) for epoch in range(5)]
    for rows in epochs:
        shown = collections.Counter(source_of[row] for row in rows)
        assert len(rows) == len(source_of)
        for number, weight in enumerate(weights):
            assert abs(shown[number] - len(source_of) * weight / sum(weights)) < 1
    times = collections.Counter(np.concatenate(epochs).tolist())
    for number in range(len(sources)):
        own = [times[row] for row, source in enumerate(source_of) if source == number]
        assert max(own) - min(own) <= 1


def data(tmp_path, **changes):
    small = write(tmp_path / "a.json", [alpaca(n, instruction=f"A {n}") for n in range(4)])
    large = write(tmp_path / "b.json", [alpaca(n) for n in range(20)])
    return Data(kind="instruct", **{"sources": (str(small), str(large)), "mix": (1, 2.0), **changes})


def test_a_mixed_run_keeps_a_row_for_every_sample_and_resumes_where_it_stopped(tmp_path):
    split, _ = load_files(data(tmp_path), "train", tmp_path)
    plain, _ = load_files(data(tmp_path, mix=()), "train", tmp_path)
    assert split.samples == plain.samples and split.fingerprint() == plain.fingerprint()  # as many keys in the queues
    options = {"fields": {"has_image"}, "batch_size": 6, "seed": 3, "epochs": 3}
    stream = [batch.index.tolist() for batch in batches(split, None, **options)]
    shown = collections.Counter(int(row) < 4 for rows in stream for row in rows)
    assert (shown[True], shown[False]) == (24, 48)
    first = batches(split, None, **options)
    before = [next(first).index.tolist() for _ in range(5)]
    state = first.get_state()
    second = batches(split, None, **options)
    second.set_state(state)
    assert [*before, *(batch.index.tolist() for batch in second)] == stream
    unmixed = [batch.index.tolist() for batch in batches(plain, None, **options)]
    assert [tuple(Order(24, 6, 3).rows(step)) for step in range(12)] == list(map(tuple, unmixed))


def test_prepared_data_are_mixed_as_their_files_are(tmp_path):
    prepare(Config(data=data(tmp_path)), tmp_path / "out")
    split, _ = load_files(data(tmp_path), "train", tmp_path)
    read = load_split(Config(data=data(tmp_path, prepared=str(tmp_path / "out"))), "train", tmp_path)
    np.testing.assert_array_equal(read.mixture.rows(0, 7), split.mixture.rows(0, 7))


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ((1,), "has 1 weights, but config.data.sources has 2"),
        ((1, 0), "give a number above 0 for each"),
        ((1, "2"), "give a number above 0 for each"),
        ((1, float("nan")), "give a number above 0 for each"),
    ],
)
def test_a_mix_that_cannot_be_meant_is_refused(tmp_path, mix, said):
    with pytest.raises(ConfigError, match=rf"config\.data\.mix.*{said}"):
        load_files(data(tmp_path, mix=mix), "train", tmp_path)


def test_a_mix_decides_a_runs_numbers_and_none_is_the_default():
    assert DATASETS["instruct"].config().mix == () and "mix" not in " ".join(DATASETS["instruct"].free_on_resume)

"""Claims about batches of similar lengths: each sample once an epoch, texts cut and never lost, the least padding."""

import itertools

import numpy as np
import pytest

from eim_jax.data.batch_order import Order, best_widths
from eim_jax.data.loader import batches
from eim_jax.data.miniature import captioning
from eim_jax.data.samples import DrawnImages, Sample, Split
from eim_jax.data.tokenize import Encoded, encode_split, load_tokenizer

COUNT, BATCH = 107, 4


def texts(seed=0):
    """Lengths as uneven as captions': most are short, one is 40."""
    lengths = np.minimum(np.random.default_rng(seed).geometric(0.15, COUNT), 39)
    lengths[17] = 40
    valid = np.arange(40)[None] < lengths[:, None]
    tokens = np.where(valid, np.arange(1, COUNT + 1)[:, None] * 100 + np.arange(40), 0).astype(np.int32)
    return Encoded(tokens, valid, valid & (tokens % 2 == 0))


def stream(buckets=3, window=5, **changes):
    samples = tuple(Sample(str(i), None, "", "x") for i in range(COUNT))
    split = Split("train", samples, DrawnImages([], lambda row: None, []))
    settings = {"fields": {"tokens", "valid", "supervised"}, "batch_size": BATCH, "seed": 3, "epochs": 2} | changes
    return batches(split, texts(), buckets=buckets, window=window, **settings)


def rows(iterator):
    return [tuple(batch.index.tolist()) for batch in iterator]


def test_an_epoch_of_grouped_batches_shows_the_samples_of_the_shuffled_one_each_once():
    grouped, shuffled = rows(stream()), rows(stream(window=1))
    half = len(grouped) // 2
    for epoch in (slice(half), slice(half, None)):
        one, other = sum(grouped[epoch], ()), sum(shuffled[epoch], ())
        assert len(one) == COUNT // BATCH * BATCH and len(set(one)) == len(one) and set(one) == set(other)
    assert rows(stream(buckets=1, window=1)) == shuffled  # cutting does not touch the order
    assert grouped[:half] != grouped[half:] and grouped == rows(stream(threads=0))
    assert len({tuple(rows(stream(seed=seed))) for seed in range(4)}) == 4


def test_batches_of_a_window_do_not_come_in_order_of_length():
    longest = [batch.valid.sum(1).max() for batch in stream(window=100, epochs=1)]
    assert longest != sorted(longest) and sorted(longest) != longest[::-1]


@pytest.mark.parametrize("window", [1, 5, 100])
def test_a_batch_is_the_full_one_cut_to_the_smallest_width_that_holds_it(window):
    full, widths = texts(), set()
    for batch in stream(window=window):
        width = batch.tokens.shape[1]
        widths.add(width)
        for field in ("tokens", "valid", "supervised"):
            np.testing.assert_array_equal(getattr(batch, field), getattr(full, field)[batch.index][:, :width])
        assert full.valid[batch.index].sum() == batch.valid.sum()  # nothing is lost
        assert all(other >= width for other in widths if other >= batch.valid.sum(1).max())
    assert len(widths) == 3 and max(widths) == 40


def test_one_bucket_leaves_texts_as_wide_as_they_are():
    assert {batch.tokens.shape for batch in stream(buckets=1)} == {(BATCH, 40)}


def test_stages_without_text_are_neither_cut_nor_grouped():
    blind = rows(stream(fields={"has_image"}))
    assert blind == rows(stream(fields={"has_image"}, window=1)) == rows(stream(window=1))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_agree_on_the_width_and_share_the_rows(count):
    alone = list(stream())
    parts = [list(stream(process_index=i, process_count=count)) for i in range(count)]
    for step, batch in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([part[step].index for part in parts]), batch.index)
        np.testing.assert_array_equal(np.concatenate([part[step].tokens for part in parts]), batch.tokens)


def test_a_stop_at_any_step_changes_nothing():
    whole = [(tuple(b.index.tolist()), b.tokens.tobytes()) for b in stream()]
    for step in (0, 1, 17, 26, 27, 52):
        first = stream()
        for _ in range(step):
            next(first)
        state = first.get_state()
        first.close()
        second = stream()
        second.set_state(state)
        assert [(tuple(b.index.tolist()), b.tokens.tobytes()) for b in second] == whole[step:]


@pytest.mark.parametrize("seed", range(6))
def test_widths_pad_least_of_all_choices(seed):
    longest_of = np.random.default_rng(seed).integers(1, 14, 12)
    for count in (1, 2, 3, 5):
        found = best_widths(longest_of, 15, count)
        assert len(found) <= count and list(found) == sorted(set(found)) and found[-1] == 15

        def cost(widths):
            return sum(min(w for w in widths if w >= length) for length in longest_of)

        others = itertools.combinations(range(1, 15), count - 1)
        assert cost(found) == min(cost((*other, 15)) for other in others)


def test_eight_widths_and_a_window_bring_captions_from_half_padding_to_a_tenth():
    split = captioning.load("train", seed=0, scenes=300)
    encoded = encode_split(split, load_tokenizer("miniature/gpt2"), 40, eos=True)

    def padding(**options):
        found = batches(split, encoded, fields={"tokens", "valid"}, batch_size=32, seed=0, epochs=2, **options)
        real, size = np.sum([(b.valid.sum(), b.valid.size) for b in found], axis=0)
        return 1 - real / size

    shares = [padding(), padding(buckets=4), padding(buckets=8, window=100)]
    assert shares[0] > 0.5 and shares[0] > shares[1] > shares[2] and shares[2] < 0.1


def test_widths_hold_what_an_order_was_not_made_from():
    """Another epoch's batches may be longer than any of the first: the last width is the longest text's."""
    lengths = np.r_[np.full(7, 3), 30]
    order = next(
        o
        for s in range(99)
        for o in [Order(8, 3, s, lengths).with_widths(2)]
        if 7 not in o.rows(0) and 7 not in o.rows(1)
    )
    assert order.widths == (3, 30)
    assert {order.width(order.rows(step)) for step in range(40)} == {3, 30}


@pytest.mark.parametrize("changes", [{"buckets": 0}, {"window": 0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match="give at least 1"):
        stream(**changes)

"""Claims about batches: rows keep their samples, epochs are permutations, processes share, a stop changes nothing."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from eim_jax.data.loader import batches, eval_images, steps_per_epoch
from eim_jax.data.samples import DrawnImages, FileImages, Sample, Split
from eim_jax.data.tokenize import Encoded
from eim_jax.models.batch import Batch
from eim_jax.utils.images import clip_preprocess

COUNT, IMAGES, SIZE = 23, 7, 8
TEXT = frozenset({"tokens", "valid", "supervised"})
ALL = TEXT | {"image", "has_image"}


def picture(row):
    return Image.fromarray(np.random.default_rng(row).integers(0, 256, (11, 9, 3), np.uint8))


def split_of(count=COUNT, draw=picture):
    """Sample i shows image i % 8, where 7 is none: text only."""
    samples = tuple(Sample(f"s{i}", i % 8 if i % 8 < IMAGES else None, "", f"text {i}") for i in range(count))
    names = [f"i{row}" for row in range(IMAGES)]
    return Split("train", samples, DrawnImages(names, draw, names))


def encoded(count=COUNT, width=5):
    tokens = np.arange(count * width, dtype=np.int32).reshape(count, width)
    valid = np.arange(width)[None] < (np.arange(count) % width + 1)[:, None]
    return Encoded(np.where(valid, tokens, 0), valid, valid & (tokens % 2 == 0))


def stream(**changes):
    settings = {"fields": TEXT, "batch_size": 4, "seed": 3, "epochs": 2, "image_size": SIZE} | changes
    split = settings.pop("split", None)
    split = split_of() if split is None else split
    return batches(split, settings.pop("encoded", encoded()), **settings)


def digest(batch):
    parts = [b"none" if value is None else np.ascontiguousarray(value).tobytes() for value in batch]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def forbidden(row):
    raise AssertionError(f"image {row} was opened")


def test_every_field_belongs_to_the_sample_that_index_names():
    split, text = split_of(), encoded()
    features = np.random.default_rng(0).normal(size=(IMAGES, 3, 2)).astype(np.float32)
    for batch, seen in zip(stream(fields=ALL), stream(fields=ALL, features=features), strict=True):
        assert isinstance(batch, Batch) and batch.index.dtype == np.int32
        np.testing.assert_array_equal(batch.tokens, text.tokens[batch.index])
        np.testing.assert_array_equal(batch.valid, text.valid[batch.index])
        np.testing.assert_array_equal(batch.supervised, text.supervised[batch.index])
        np.testing.assert_array_equal(seen.index, batch.index)
        assert batch.features is None and seen.image is None and batch.image.dtype == np.uint8
        for place, row in enumerate(batch.index):
            image = split.samples[row].image
            assert batch.has_image[place] == seen.has_image[place] == (image is not None)
            expected = np.zeros((SIZE, SIZE, 3)) if image is None else clip_preprocess(picture(image), SIZE)
            np.testing.assert_array_equal(batch.image[place], expected)
            np.testing.assert_array_equal(seen.features[place], 0 if image is None else features[image])


def test_an_epoch_shows_no_sample_twice_and_epochs_differ():
    rows = np.stack([batch.index for batch in stream(epochs=6)]).reshape(6, -1)
    assert rows.shape == (6, 5 * 4) and steps_per_epoch(split_of(), 4) == 5
    for epoch in rows:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(COUNT))
    assert len({tuple(epoch) for epoch in rows}) == 6
    assert set(rows.ravel()) == set(range(COUNT))  # what one epoch drops, another shows


def test_the_order_is_the_seeds_alone():
    def order(**changes):
        return [tuple(batch.index) for batch in stream(**changes)]

    assert order() == order() == order(threads=0) == order(threads=9) == order(epochs=4)[:10]
    assert order() == order(fields=ALL)  # what is loaded does not matter
    assert len({tuple(order(seed=seed)) for seed in range(5)}) == 5


def test_seeds_and_epochs_do_not_overlap():
    """Seed s, epoch e + 1 must not repeat seed s + 1, epoch e: runs over several seeds would share their orders."""
    epochs = [
        tuple(np.concatenate([batch.index for batch in stream(seed=seed, epochs=4)])[start : start + 20])
        for seed in range(4)
        for start in range(0, 80, 20)
    ]
    assert len(set(epochs)) == 16


@pytest.mark.parametrize("threads", [0, 3])
def test_interrupted_at_every_step_equals_uninterrupted(threads):
    whole = [digest(batch) for batch in stream(fields=ALL, threads=threads)]
    assert len(whole) == len(set(whole)) == 10
    for step in range(len(whole) + 1):
        first = stream(fields=ALL, threads=threads)
        before = [digest(next(first)) for _ in range(step)]
        state = first.get_state()
        first.close()
        second = stream(fields=ALL, threads=threads)
        second.set_state(state)
        assert before + [digest(batch) for batch in second] == whole


def test_batches_placed_ahead_leave_the_state_at_the_batch_last_returned():
    whole = [digest(batch) for batch in stream(fields=ALL)]
    placed = []

    def place(batch):
        placed.append(digest(batch))
        return len(placed)

    for step in range(len(whole) + 1):
        placed.clear()
        first, plain = stream(fields=ALL, place=place), stream(fields=ALL)
        before = [next(first) for _ in range(step)]
        assert [number for _, number in before] == list(range(1, step + 1))  # each with what its own placing gave
        for _ in range(step):
            next(plain)
        state = first.get_state()
        assert state == plain.get_state()
        first.close()
        assert placed == whole[: len(placed)] and step <= len(placed) <= step + 4  # a few ahead, and no more
        second = stream(fields=ALL)
        second.set_state(state)
        assert [digest(batch) for batch, _ in before] + [digest(batch) for batch in second] == whole


def test_an_error_of_placing_is_raised_where_the_batch_was_wanted():
    def place(batch):
        if batch.index[0] == third.index[0]:
            raise ValueError("no room")

    third = [next(iterator := stream()), next(iterator), next(iterator)][2]
    iterator.close()
    broken = stream(place=place)
    next(broken), next(broken)
    with pytest.raises(ValueError, match="no room"):
        next(broken)
    broken.close()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_see_disjoint_rows_whose_concatenation_is_the_single_process_batch(count):
    alone = list(stream(fields=ALL))
    parts = [list(stream(fields=ALL, process_index=i, process_count=count)) for i in range(count)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, batch in enumerate(alone):
        for name in ("index", "tokens", "image", "has_image"):
            joined = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(batch, name))


def test_only_the_wanted_fields_are_loaded():
    blind = split_of(draw=forbidden)
    for batch in stream(split=blind, fields={"tokens", "valid"}):
        filled = {name for name, value in batch._asdict().items() if value is not None}
        assert filled == {"index", "tokens", "valid"}
    features = np.ones((IMAGES, 1, 2), np.float32)
    for batch in stream(split=blind, fields={"image"}, features=features, encoded=None):
        assert batch.image is None and batch.features.shape == (4, 1, 2)


def test_bfloat16_features_stay_bfloat16():
    features = np.ones((IMAGES, 1, 2), ml_dtypes.bfloat16)
    assert next(stream(fields={"features"}, features=features)).features.dtype == ml_dtypes.bfloat16


def test_an_endless_stream_goes_past_the_epoch():
    iterator = stream(epochs=None)
    rows = [tuple(next(iterator).index) for _ in range(12)]
    iterator.close()
    assert rows[:10] == [tuple(batch.index) for batch in stream()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, "split 'train' has 23 samples, fewer than one batch of 24"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"fields": {"pixels"}}, "Batch has no field pixels"),
        ({"encoded": None}, "need `encoded`"),
        ({"encoded": encoded(9)}, "`encoded` has 9 rows, but split 'train' has 23 samples"),
        ({"fields": {"features"}}, "needs `features`"),
        ({"features": np.zeros((3, 1, 1))}, "`features` has 3 rows, but split 'train' has 7 images"),
        ({"fields": {"image"}, "image_size": None}, "needs `image_size`"),
        ({"process_count": 3}, "does not divide over 3 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stream(**changes)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_breaks_during_the_run_is_named(tmp_path, threads):
    for row in range(4):
        picture(row).save(tmp_path / f"{row}.png")
    samples = tuple(Sample(str(row), row, "", "x") for row in range(4))
    split = Split("train", samples, FileImages(tmp_path, ["70", "71", "72", "73"], [f"{r}.png" for r in range(4)]))
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image id 72 \(2\.png\) cannot be read"):
        list(batches(split, None, fields={"image"}, batch_size=2, seed=0, epochs=1, image_size=4, threads=threads))
    with pytest.raises(ValueError, match=r"image id 72 \(2\.png\) cannot be read"):
        list(eval_images(split, 3, 4, threads=threads))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_eval_images_shows_each_image_once_in_full_batches(batch_size):
    rows, images = zip(*eval_images(split_of(), batch_size, SIZE), strict=True)
    assert all(
        len(r) == len(i) == batch_size and r.dtype == np.int32 and i.dtype == np.uint8
        for r, i in zip(rows, images, strict=True)
    )
    rows, images = np.concatenate(rows), np.concatenate(images)
    assert rows[rows >= 0].tolist() == list(range(IMAGES)) and (rows[IMAGES:] == -1).all()
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(image, clip_preprocess(picture(row), SIZE) if row >= 0 else 0)


def test_eval_images_of_chosen_rows_and_of_none():
    found = list(eval_images(split_of(), 2, SIZE, rows=[5, 1, 3]))
    assert [r.tolist() for r, _ in found] == [[5, 1], [3, -1]]
    assert list(eval_images(split_of(), 2, SIZE, rows=[])) == []

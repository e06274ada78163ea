"""Claims about cached features: exact values, one computation, resumed after a kill, never stale."""

import collections
import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from close import assert_close
from PIL import Image

from eim_jax.data import feature_cache
from eim_jax.data.feature_cache import cached_features
from eim_jax.data.samples import DrawnImages, FileImages, Split
from eim_jax.utils.files import Damaged
from eim_jax.utils.images import clip_preprocess

COUNT, SIZE = 11, 6


def picture(row):
    return Image.fromarray(np.random.default_rng(row).integers(0, 256, (9, 12, 3), np.uint8))


def split_of(count=COUNT, draw=picture):
    names = [f"i{row}" for row in range(count)]
    return Split("train", (), DrawnImages(names, draw, names))


@jax.jit
def see(images):
    """Means of rows and columns as a [b 2 18] stand-in for a vision tower."""
    pixels = images.astype(jnp.float32) / 255.0
    flat = (len(images), 1, SIZE * 3)
    return jnp.concatenate([pixels.mean(1).reshape(flat), pixels.mean(2).reshape(flat)], 1)


def expected(count=COUNT):
    pixels = np.stack([clip_preprocess(picture(row), SIZE) for row in range(count)]).astype(np.float64) / 255
    return np.stack([pixels.mean(1).reshape(count, -1), pixels.mean(2).reshape(count, -1)], 1)


def cached(place, split=None, tower=see, manifest=None, **changes):
    settings = {"image_size": SIZE, "batch_size": 4, "threads": 2} | changes
    return cached_features(
        place / "cache", split_of() if split is None else split, tower, manifest or {"weights": "w1"}, **settings
    )


def forbidden(row):
    raise AssertionError(f"image {row} was opened")


def test_row_i_holds_the_features_of_image_i(tmp_path):
    found = cached(tmp_path)
    assert found.shape == (COUNT, 2, 18) and found.dtype == np.float32 and not found.flags.writeable
    assert isinstance(found, np.memmap)
    assert_close(found, expected(), 1e-5)


def test_bfloat16_takes_half_the_disk_and_rounds_once(tmp_path):
    full, half = cached(tmp_path / "full"), cached(tmp_path / "half", dtype="bfloat16")
    assert half.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half, np.asarray(full).astype(ml_dtypes.bfloat16))
    sizes = [(tmp_path / name / "cache" / "features.npy").stat().st_size - 128 for name in ("full", "half")]
    assert sizes == [COUNT * 2 * 18 * 4, COUNT * 2 * 18 * 2]


def test_a_second_start_opens_no_image(tmp_path):
    first = np.array(cached(tmp_path))
    np.testing.assert_array_equal(cached(tmp_path, split_of(draw=forbidden)), first)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["features.npy", "manifest.json"]


def test_one_trace_also_for_the_incomplete_last_batch(tmp_path):
    traces = []
    cached(tmp_path, tower=jax.jit(lambda images: (traces.append(images.shape), see(images))[1]))
    assert set(traces) == {(4, SIZE, SIZE, 3)}


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_equals_uninterrupted_and_does_not_start_over(tmp_path, after):
    whole = np.array(cached(tmp_path / "whole"))
    calls = []

    def failing(images):
        if isinstance(images, jax.core.Tracer):  # asked for its shape alone
            return see(images)
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return see(images)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, tower=failing)
    assert not (tmp_path / "cache" / "features.npy").exists()
    marked = json.loads((tmp_path / "cache" / "manifest.partial.json").read_text())["rows_done"]
    assert marked == 4 * max(after - 1, 0)  # the batch in flight was not written

    opened = collections.Counter()

    def counting(row):
        opened[row] += 1
        return picture(row)

    np.testing.assert_array_equal(cached(tmp_path, split_of(draw=counting)), whole)
    assert sorted(opened) == list(range(marked, COUNT))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", ["a count", "a bit"])
def test_a_half_filled_file_that_is_not_what_was_written_is_computed_again(tmp_path, capsys, dtype, damage):
    whole = np.array(cached(tmp_path / "whole", dtype=dtype))
    calls = []

    def failing(images):
        calls.append(isinstance(images, jax.core.Tracer))
        if calls.count(False) == 3:
            raise KeyboardInterrupt
        return see(images)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, tower=failing, dtype=dtype)
    note, rows = (tmp_path / "cache" / name for name in ("manifest.partial.json", "features.partial.npy"))
    content = json.loads(note.read_text())
    assert content["rows_done"] == 4
    if damage == "a count":  # rows that were never computed would stay zero
        note.write_text(json.dumps({**content, "rows_done": 6}))
    else:
        data = bytearray(rows.read_bytes())
        data[128] ^= 1
        rows.write_bytes(data)
    np.testing.assert_array_equal(np.array(cached(tmp_path, dtype=dtype)), whole)
    assert "features.partial.npy is damaged: computing" in " ".join(capsys.readouterr().out.split())


def test_a_half_filled_file_of_an_earlier_version_is_continued(tmp_path):
    calls = []

    def failing(images):
        calls.append(isinstance(images, jax.core.Tracer))
        if calls.count(False) == 3:
            raise KeyboardInterrupt
        return see(images)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, tower=failing)
    note = tmp_path / "cache" / "manifest.partial.json"
    content = json.loads(note.read_text())
    assert len(content.pop("rows_sha256")) == 64
    note.write_text(json.dumps(content))
    opened = []
    found = cached(tmp_path, split_of(draw=lambda row: opened.append(row) or picture(row)))
    assert min(opened) == 4
    assert_close(found, expected(), 1e-5)


def test_an_interrupted_cache_of_other_weights_is_not_continued(tmp_path):
    def broken(images):
        if isinstance(images, jax.core.Tracer):
            return see(images)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, tower=broken, manifest={"weights": "old"})
    assert_close(cached(tmp_path), expected(), 1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"manifest": {"weights": "w2"}}, "weights: expected w2, found w1"),
        ({"manifest": {"weights": "w1", "prompts": 4}}, "prompts: expected 4, found None"),
        ({"dtype": "bfloat16"}, "dtype: expected bfloat16, found float32"),
        ({"split": split_of(COUNT - 1)}, "shape: expected [10, 2, 18], found [11, 2, 18]"),
    ],
)
def test_a_stale_cache_is_rebuilt_and_the_field_named(tmp_path, capsys, changes, field):
    cached(tmp_path)
    capsys.readouterr()
    found = cached(tmp_path, **changes)
    assert field in capsys.readouterr().out
    assert_close(found.astype(np.float32), expected(len(found)), 1e-2)


def test_a_changed_photo_makes_the_cache_stale(tmp_path, capsys):
    for row in range(2):
        picture(row).save(tmp_path / f"{row}.png")

    def files():
        return Split("train", (), FileImages(tmp_path, ["a", "b"], ["0.png", "1.png"]))

    cached(tmp_path, files())
    picture(7).resize((40, 40)).save(tmp_path / "1.png")
    capsys.readouterr()
    cached(tmp_path, files())
    assert "images: expected" in capsys.readouterr().out


def test_a_damaged_manifest_is_rebuilt(tmp_path):
    cached(tmp_path)
    (tmp_path / "cache" / "manifest.json").write_text("{")
    assert_close(cached(tmp_path), expected(), 1e-5)


@pytest.mark.parametrize("change", ["flip", "cut", "extend", "pickle"])
def test_a_changed_file_of_features_is_called_damaged(tmp_path, change):
    cached(tmp_path)
    file = tmp_path / "cache" / "features.npy"
    content = file.read_bytes()
    middle = len(content) // 2
    changed = {
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:-1],
        "extend": content + b"0",
        "pickle": pickle.dumps(np.array([{}])),
    }
    file.write_bytes(changed[change])
    with pytest.raises(Damaged, match=f"damaged .*delete {tmp_path / 'cache'}, the same command makes it again"):
        cached(tmp_path)
    manifest = tmp_path / "cache" / "manifest.json"  # as an earlier version wrote it, without the sum
    manifest.write_text(json.dumps({key: v for key, v in json.loads(manifest.read_text()).items() if key != "sha256"}))
    file.write_bytes(content)
    assert_close(cached(tmp_path), expected(), 1e-5)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda place: usage(2**40, 0, 300 * 2**20))
    wide = jax.jit(lambda images: jnp.zeros((len(images), 50, 768 * 64)))
    with pytest.raises(OSError, match=r"11 x 50 x 49,152 in float32, 103\.1 MiB.*only 300\.0 MiB are free"):
        cached(tmp_path, tower=wide)
    assert not list((tmp_path / "cache").iterdir())


def test_features_that_are_not_finite_name_the_image(tmp_path):
    names = [f"id{row}" for row in range(5)]
    black = DrawnImages(names, lambda row: Image.new("RGB", (8, 8), (0,) * 3 if row == 4 else (9,) * 3), names)
    with pytest.raises(ValueError, match=r"features of image id id4 .* are not finite"):
        cached(tmp_path, Split("train", (), black), tower=jax.jit(lambda images: see(images) / see(images)))


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype 'float16'"):
        cached(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="must be"):
        cached(tmp_path, tower=jax.jit(lambda images: see(images)[:, 0]))

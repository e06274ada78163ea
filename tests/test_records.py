"""Claims about samples, splits and their fingerprints."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from eim_jax.data.samples import DrawnImages, FileImages, Sample, Split


def drawn(count=3, marks=None):
    ids = [f"i{row}" for row in range(count)]
    return DrawnImages(ids, lambda row: Image.new("L", (4, 3), 40 * row), marks or ids)


SAMPLES = (
    Sample("a", 0, "", "one"),
    Sample("b", 2, "say", "two"),
    Sample("c", None, "say", "three"),
    Sample("d", 0, "", "four"),
    Sample("e", None, "", "five"),
)


def test_captions_of_one_image_share_a_group_and_text_only_samples_share_none():
    groups = Split("s", SAMPLES, drawn()).groups
    assert groups.dtype == np.int32
    same = groups[:, None] == groups[None]
    expected = np.eye(5, dtype=bool)
    expected[0, 3] = expected[3, 0] = True
    np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "z"},
        {"image": 1},
        {"image": None},
        {"instruction": "x"},
        {"response": "One"},
        {"instruction": "on", "response": "e"},  # the same characters, cut elsewhere
    ],
)
def test_fingerprint_changes_with_every_field_of_a_sample(change):
    changed = (dataclasses.replace(SAMPLES[0], **change), *SAMPLES[1:])
    assert Split("s", changed, drawn()).fingerprint() != Split("s", SAMPLES, drawn()).fingerprint()


def test_fingerprint_depends_on_order_and_images_but_not_on_the_name():
    base = Split("s", SAMPLES, drawn()).fingerprint()
    assert Split("other", SAMPLES, drawn()).fingerprint() == base
    assert Split("s", SAMPLES[::-1], drawn()).fingerprint() != base
    assert Split("s", SAMPLES, drawn(marks=["i0", "i1", "new"])).fingerprint() != base


def test_fingerprint_of_files_follows_name_and_size_not_the_folder(tmp_path):
    prints = {}
    for name, size in (("here", (5, 5)), ("there", (5, 5)), ("changed", (90, 70))):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", size).save(folder / "x.png")
        prints[name] = FileImages(folder, ["1"], ["x.png"]).fingerprint()
    assert prints["here"] == prints["there"] != prints["changed"]


def test_duplicate_ids_and_rows_without_image_are_refused_by_name():
    with pytest.raises(ValueError, match="sample id 'a' occurs more than once"):
        Split("s", (SAMPLES[0], SAMPLES[0]), drawn())
    with pytest.raises(ValueError, match="image id 'i' occurs more than once"):
        Split("s", SAMPLES[:1], DrawnImages(["i", "i"], lambda row: None, ["", ""]))
    with pytest.raises(ValueError, match="sample q points to image row 3, but there are 3 images"):
        Split("s", (Sample("q", 3, "", "x"),), drawn())


def test_an_unreadable_file_is_named_with_its_id(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    source = FileImages(tmp_path, ["77", "78"], ["x.jpg", "gone.jpg"])
    with pytest.raises(ValueError, match=r"image id 77 \(x\.jpg\) cannot be read"):
        source[0]
    with pytest.raises(ValueError, match=r"image id 78 \(gone\.jpg\) cannot be read"):
        source[1]
    with pytest.raises(IndexError, match="2 images"):
        source[2]


def test_images_come_as_rgb_whatever_is_drawn():
    picture = drawn()[2]
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (80, 80, 80)

"""Claims about loading COCO captions: what is kept, and that every bad item is found and named."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from eim_jax.data import image_checks
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.coco import load_coco
from eim_jax.data.image_checks import file_problem


def photo(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


def write(tmp_path, images, annotations, name="captions.json"):
    file = tmp_path / name
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def caption(identifier, image, text="a dog runs"):
    return {"id": identifier, "image_id": image, "caption": text}


@pytest.fixture
def small(tmp_path):
    """Three good photos with two captions each: (image records, annotation records, folder)."""
    folder = tmp_path / "images"
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (5, 3, 9)]
    for record in images:
        photo(folder / record["file_name"], record["id"])
    annotations = [caption(10 * i + k, i, f"text {i} {k}") for k in range(2) for i in (3, 5, 9)]
    return images, annotations, folder


def bomb(path, width, height):
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def test_one_sample_a_caption_in_the_files_order_and_one_row_an_image(small, tmp_path):
    images, annotations, folder = small
    split, report = load_coco(write(tmp_path, images, annotations), folder, "train")
    assert split.name == "train" and report.bad == ()
    assert split.images.ids == ["5", "3", "9"] and split.images.names == ["5.jpg", "3.jpg", "9.jpg"]
    assert [s.id for s in split.samples] == ["30", "50", "90", "31", "51", "91"]
    assert [split.images.ids[s.image] for s in split.samples] == ["3", "5", "9"] * 2
    assert all(s.instruction == "" for s in split.samples)
    assert split.references["9"] == ["text 9 0", "text 9 1"]
    with Image.open(folder / "3.jpg") as expected:
        np.testing.assert_array_equal(np.asarray(split.images[1]), np.asarray(expected))


def test_captions_without_ids_are_numbered_within_their_image(small, tmp_path):
    images, annotations, folder = small
    for record in annotations:
        del record["id"]
    split, _ = load_coco(write(tmp_path, images, annotations), folder)
    assert [s.id for s in split.samples] == ["3#0", "5#0", "9#0", "3#1", "5#1", "9#1"]


def test_white_space_is_stripped_unless_asked_to_stay(small, tmp_path):
    images, _, folder = small
    file = write(tmp_path, images[:1], [caption(1, 5, " A dog. \n")])
    assert load_coco(file, folder).split.samples[0].response == "A dog."
    assert load_coco(file, folder, strip=False).split.samples[0].response == " A dog. \n"


def damage_missing(images, annotations, folder):
    (folder / "5.jpg").unlink()
    return "image 5 (5.jpg): no such file", {"50", "51"}


def damage_truncated(images, annotations, folder):
    whole = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(whole[: len(whole) // 2])
    return "image 5 (5.jpg): image file is truncated", {"50", "51"}


def damage_truncated_png(images, annotations, folder):
    photo(folder / "5.png", 1)
    images[0]["file_name"] = "5.png"
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:900])
    return "image 5 (5.png): image file is truncated", {"50", "51"}


def damage_not_a_picture(images, annotations, folder):
    (folder / "5.jpg").write_text("<html>404</html>")
    return "image 5 (5.jpg): not a picture in a known format", {"50", "51"}


def damage_empty_file(images, annotations, folder):
    (folder / "5.jpg").write_bytes(b"")
    return "image 5 (5.jpg): the file is empty", {"50", "51"}


def damage_bomb(images, annotations, folder):
    bomb(folder / "5.jpg", 20_000, 20_000)
    return "image 5 (5.jpg): Image size (400000000 pixels) exceeds limit", {"50", "51"}


def damage_float(images, annotations, folder):
    images[0]["file_name"] = "5.tif"
    Image.new("F", (4, 4), 0.5).save(folder / "5.tif")
    return "image 5 (5.tif): its pixels are floating-point", {"50", "51"}


def damage_empty_caption(images, annotations, folder):
    annotations[0]["caption"] = ""
    return "caption 30 (image 3, 3.jpg): the text is empty", {"30"}


def damage_blank_caption(images, annotations, folder):
    annotations[0]["caption"] = " \n\t "
    return "caption 30 (image 3, 3.jpg): the text is empty", {"30"}


def damage_long_caption(images, annotations, folder):
    annotations[0]["caption"] = "word " * 500
    return "caption 30 (image 3, 3.jpg): 2500 characters, more than 2000", {"30"}


def damage_caption_id(images, annotations, folder):
    annotations[4]["id"] = 30
    return "caption 30 (image 5, 5.jpg): caption id listed twice", {"51"}


def damage_image_id(images, annotations, folder):
    images.append({"id": 3, "file_name": "other.jpg"})
    return "image 3 (other.jpg): image id listed twice (first as 3.jpg)", set()


def damage_unlisted(images, annotations, folder):
    annotations.append(caption(77, 1234))
    return "caption 77 (image 1234, captions.json): its image is not listed", set()


def damage_no_caption(images, annotations, folder):
    photo(folder / "8.jpg")
    images.append({"id": 8, "file_name": "8.jpg"})
    return "image 8 (8.jpg): it has no caption", set()


def damage_caption_type(images, annotations, folder):
    annotations[0]["caption"] = ["a dog"]
    return 'caption 30 (captions.json annotations[0]): needs "image_id" and a text "caption"', {"30"}


def damage_image_record(images, annotations, folder):
    del images[2]["file_name"]
    return 'image 9 (captions.json images[2]): needs "id" and "file_name"', {"90", "91"}


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_every_kind_of_bad_item_is_named_or_dropped_from_the_split(small, tmp_path, damage):
    images, annotations, folder = small
    good = {str(record["id"]) for record in annotations}
    expected, lost = damage(images, annotations, folder)
    file = write(tmp_path, images, annotations)
    with pytest.raises(BadDataError) as caught:
        load_coco(file, folder)
    assert expected in str(caught.value) and "on_bad='drop'" in str(caught.value)

    split, report = load_coco(file, folder, on_bad="drop")
    # A repeated caption id keeps its first caption, so "lost" names what the split has no more.
    assert {s.id for s in split.samples} == good - lost
    assert expected in str(report) and len(report.bad) == len(caught.value.bad)
    assert all(split.images[s.image].mode == "RGB" for s in split.samples)
    assert set(split.references) == set(split.images.ids) == {split.images.ids[s.image] for s in split.samples}
    assert report.dropped_images == len({r["id"] for r in images if "file_name" in r}) - len(split.images)


def test_dropping_leaves_groups_and_rows_consistent(small, tmp_path):
    images, annotations, folder = small
    (folder / "3.jpg").unlink()
    split, report = load_coco(write(tmp_path, images, annotations), folder, on_bad="drop")
    assert split.images.ids == ["5", "9"] and split.groups.tolist() == [0, 1, 0, 1]
    assert (report.dropped_images, report.dropped_captions) == (1, 2)


def test_unusual_but_sound_pictures_are_not_bad(tmp_path):
    """Grey, CMYK, palette, alpha, 16 bit, rotated, one pixel wide."""
    folder = tmp_path / "images"
    folder.mkdir()
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    base.convert("L").save(folder / "grey.jpg")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.quantize(16).save(folder / "palette.gif")
    base.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(30, 20) * 100).save(folder / "deep.png")
    base.save(folder / "turned.jpg", exif=exif)
    base.crop((0, 0, 1, 30)).save(folder / "thin.jpg")
    base.save(folder / "web.webp")
    names = sorted(path.name for path in folder.iterdir())
    file = write(tmp_path, [{"id": n, "file_name": n} for n in names], [caption(i, n) for i, n in enumerate(names)])
    split, report = load_coco(file, folder)
    assert report.bad == () and len(split) == len(names) == 8
    assert split.images[names.index("turned.jpg")].size == (30, 20)


def test_many_bad_items_are_counted_after_the_first_twenty(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(50)]
    (tmp_path / "empty").mkdir()
    file = write(tmp_path, images, [caption(i, i) for i in range(50)])
    with pytest.raises(BadDataError) as caught:
        load_coco(file, tmp_path / "empty")
    text = str(caught.value)
    assert "50 bad items" in text and "... and 30 more" in text and "Is the image folder the right one?" in text
    assert len(caught.value.bad) == 50
    with pytest.raises(ValueError, match="no captions are left; 50 bad items"):
        load_coco(file, tmp_path / "empty", on_bad="drop")


def karpathy(folder):
    records = []
    for i, name in enumerate(("train", "restval", "val", "test", "test")):
        place = "val2014" if i else "train2014"
        photo(folder / place / f"COCO_{i}.jpg", i)
        records.append(
            {
                "filepath": place,
                "filename": f"COCO_{i}.jpg",
                "cocoid": 100 + i,
                "imgid": i,
                "split": name,
                "sentences": [{"raw": f"caption {i} {k}", "sentid": 10 * i + k, "imgid": i} for k in range(2)],
            }
        )
    return records


@pytest.mark.parametrize(
    ("split", "ids"),
    [("train", ["100", "101"]), ("val", ["102"]), ("test", ["103", "104"]), (None, [str(100 + i) for i in range(5)])],
)
def test_karpathys_splits_and_train_takes_restval(tmp_path, split, ids):
    folder = tmp_path / "images"
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": karpathy(folder), "dataset": "coco"}))
    loaded = load_coco(file, folder, split).split
    assert loaded.images.ids == ids
    rows = [int(i) - 100 for i in ids]
    assert [s.id for s in loaded.samples] == [str(10 * i + k) for i in rows for k in range(2)]
    assert [s.response for s in loaded.samples] == [f"caption {i} {k}" for i in rows for k in range(2)]
    with Image.open(folder / ("val2014" if rows[0] else "train2014") / f"COCO_{rows[0]}.jpg") as expected:
        np.testing.assert_array_equal(np.asarray(loaded.images[0]), np.asarray(expected))


def test_karpathy_with_all_photos_in_one_folder(tmp_path):
    records = karpathy(tmp_path / "images")
    flat = tmp_path / "flat"
    for record in records:
        photo(flat / record["filename"])
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": records}))
    assert load_coco(file, flat, "test").split.images.names == ["COCO_3.jpg", "COCO_4.jpg"]
    with pytest.raises(ValueError, match="split 'dev'"):
        load_coco(file, flat, "dev")


def test_karpathy_bad_sentences_are_named(tmp_path):
    records = karpathy(tmp_path / "images")
    records[3]["sentences"][1] = {"tokens": ["a"]}
    records[4]["sentences"] = []
    records[2] |= {"split": "test", "filepath": 7}
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": [*records, 7]}))
    with pytest.raises(BadDataError) as caught:
        load_coco(file, tmp_path / "images", "test")
    text = str(caught.value)
    for part in (
        "caption 103#1 (dataset_coco.json images[3])",
        "image 104 (val2014/COCO_4.jpg): it has no",
        'image 102 (dataset_coco.json images[2]): its "filepath" is no text, but 7',
        "images[5]",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", 'needs a list "images"'),
        ('{"images": []}', 'needs a list "images" with at least one'),
        ('{"images": [{"id": 1, "file_name": "x"}]}', 'needs a list "annotations"'),
    ],
)
def test_a_file_in_another_form_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_coco(tmp_path / "x.json", tmp_path)


def test_wrong_paths_and_options_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        load_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no image folder"):
        load_coco(tmp_path / "none.json", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="on_bad is 'skip'"):
        load_coco(tmp_path / "none.json", tmp_path, on_bad="skip")


def test_text_only_loading_keeps_the_groups_and_opens_no_image(small, tmp_path):
    images, annotations, folder = small
    file = write(tmp_path, images, annotations)
    split = load_coco(file, None).split
    np.testing.assert_array_equal(split.groups, load_coco(file, folder).split.groups)
    with pytest.raises(ValueError, match="loaded as text only"):
        split.images[0]


def test_a_second_start_decodes_only_what_changed(small, tmp_path, monkeypatch):
    images, annotations, folder = small
    file, cache = write(tmp_path, images, annotations), tmp_path / "cache"
    opened = []

    def counting(path):
        opened.append(path.name)
        return file_problem(path)

    monkeypatch.setattr(image_checks, "file_problem", counting)
    load_coco(file, folder, cache=cache)
    assert sorted(opened) == ["3.jpg", "5.jpg", "9.jpg"]
    opened.clear()
    load_coco(file, folder, cache=cache)
    assert opened == []
    photo(folder / "5.jpg", 123, size=(50, 50))
    load_coco(file, folder, cache=cache)
    assert opened == ["5.jpg"]
    (folder / "3.jpg").write_bytes(b"broken")
    for _ in range(2):  # a bad verdict is never remembered
        opened.clear()
        with pytest.raises(BadDataError, match=r"3\.jpg"):
            load_coco(file, folder, cache=cache)
        assert opened == ["3.jpg"]
    next(cache.iterdir()).write_text("{ damaged")
    photo(folder / "3.jpg", 3)
    opened.clear()
    load_coco(file, folder, cache=cache)
    assert sorted(opened) == ["3.jpg", "5.jpg", "9.jpg"]


def test_every_truncation_that_a_full_decode_finds_is_found_at_an_eighth(shared_data, tmp_path):
    file = sorted((shared_data("coco_ccby") / "images").glob("*.jpg"))[0]
    whole = file.read_bytes()
    for cut in (1, 2, 50, 1000, len(whole) // 2, len(whole) - 300):
        (tmp_path / "cut.jpg").write_bytes(whole[:-cut])
        with pytest.raises(OSError, match=r"(?i)truncated"), Image.open(tmp_path / "cut.jpg") as picture:
            picture.load()
        assert "truncated" in file_problem(tmp_path / "cut.jpg").lower()
    assert file_problem(file) is None


def test_the_real_photos_load_whole(shared_data):
    folder = shared_data("coco_ccby")
    split, report = load_coco(folder / "captions.json", folder / "images")
    assert report.bad == () and (len(split), len(split.images)) == (355, 71)
    content = json.loads((folder / "captions.json").read_text())
    assert [s.id for s in split.samples] == [str(a["id"]) for a in content["annotations"]]
    assert [split.images.ids[s.image] for s in split.samples] == [str(a["image_id"]) for a in content["annotations"]]
    assert [s.response for s in split.samples] == [a["caption"].strip() for a in content["annotations"]]

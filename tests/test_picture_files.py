"""Claims about picture files: which formats are read, what the others are called, and what thin or deep ones give."""

import resource
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image
from test_coco import caption, photo, write

from eim_jax.commands.caption import pictures_of, places_of
from eim_jax.config import ConfigError, Data
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.coco import COCO, load_coco
from eim_jax.data.image_checks import file_problem
from eim_jax.utils.images import clip_preprocess, load_rgb
from eim_jax.utils.picture_files import FORMATS, UnknownPictureError, open_picture
from eim_jax.utils.thin_images import resized_piece

HEADS = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    "JPEG XL": b"\xff\x0a\0\0",
    "web page": b"\n<!DOCTYPE html><html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "Photoshop": b"8BPS\0\1",
    "git-annex": b"/annex/objects/SHA256E-s1--2.jpg\n",
}


@pytest.mark.parametrize("what", HEADS)
def test_what_is_no_picture_is_named_as_what_it_is(tmp_path, what):
    (tmp_path / "a.jpg").write_bytes(HEADS[what])
    problem = file_problem(tmp_path / "a.jpg")
    assert problem is not None and problem.startswith("not a picture in a known format: it is") and what in problem


def test_no_external_program_is_ever_started(tmp_path, monkeypatch):
    """PIL draws EPS through Ghostscript; a real file of PIL's own writing is refused before anything is started."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    shutil.copy(tmp_path / "a.eps", tmp_path / "a.png")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for name in ("a.eps", "a.png"):
        with pytest.raises(UnknownPictureError, match="PostScript"):
            load_rgb(tmp_path / name)
    assert "EPS" not in FORMATS


@pytest.mark.parametrize("name", ["a.jpg", "a.jfif", "a.png", "a.webp", "a.avif", "a.bmp", "a.gif", "a.tif", "a.ppm"])
def test_every_format_of_the_list_is_read(tmp_path, name):
    Image.new("RGB", (8, 6), "red").save(tmp_path / name, **({"format": "JPEG"} if name == "a.jfif" else {}))
    assert file_problem(tmp_path / name) is None and load_rgb(tmp_path / name).size == (8, 6)
    (tmp_path / "bare").write_bytes((tmp_path / name).read_bytes())
    with open_picture(tmp_path / "bare") as picture:
        assert picture.size == (8, 6)


@pytest.mark.parametrize(
    "shape", [(1, 400), (400, 1), (3, 777), (777, 3), (40, 9000), (9000, 40), (300, 7000), (32, 999)]
)
@pytest.mark.parametrize(("size", "resample"), [(32, 3), (50, 3), (32, 2)])
def test_a_piece_of_a_resize_has_pils_own_digits(shape, size, resample):
    width, height = shape
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    scaled = size * max(shape) // min(shape)
    new = (size, scaled) if width <= height else (scaled, size)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    whole = picture.resize(new, Image.Resampling(resample)).crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(resized_piece(picture, new, left, top, size, resample), np.asarray(whole))


def test_a_line_of_65000_pixels_takes_a_few_megabytes(shared_case):
    file = next((shared_case("photo_1x65000") / "photos").iterdir())
    picture = load_rgb(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (clip_preprocess(picture, 224) == np.array([255, 0, 0], np.uint8)).all()  # it is red throughout
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 40 * 2**20


def test_a_line_of_millions_of_pixels_is_refused(tmp_path):
    Image.new("1", (2_000_000, 1)).save(tmp_path / "a.png")
    assert "2000000 x 1, a side of more than 1000000" in (file_problem(tmp_path / "a.png") or "")


def test_more_than_8_bits_are_scaled_by_their_real_range_or_refused(shared_case):
    folder = shared_case("photos_of_more_than_8_bits")
    assert abs(np.asarray(load_rgb(folder / "g16.png")).mean() - 127) < 1
    assert "needs 12 of 16 bits" in (file_problem(folder / "g12in16.png") or "")
    assert "needs 8 of 16 bits" in (file_problem(folder / "i32_0_255.tif") or "")


def test_16_bit_colours_of_fewer_bits_are_refused_too(tmp_path):
    """A PNG of 16 bits a channel, written by hand: PIL reads it, but writes none."""
    import struct
    import zlib

    def png(largest):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        ramp = np.linspace(0, largest, 64).astype(">u2").repeat(3).tobytes()
        header = struct.pack(">IIBBBBB", 64, 1, 16, 2, 0, 0, 0)
        parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + ramp)), (b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    (tmp_path / "full.png").write_bytes(png(65535))
    (tmp_path / "twelve.png").write_bytes(png(4095))
    assert abs(np.asarray(load_rgb(tmp_path / "full.png")).mean() - 127) < 1
    assert "needs 12 of 16 bits" in (file_problem(tmp_path / "twelve.png") or "")


def test_a_folder_to_caption_gives_its_pictures_and_names_the_others(shared_case, capsys):
    folder = shared_case("folder_of_many_formats") / "photos"
    found = pictures_of([folder])
    assert [file.name for file in found] == ["a, b.jpg", "d.jfif", "e.avif", "noext"]
    said = capsys.readouterr().out
    assert "c.heic: not a picture in a known format: it is HEIC" in said and said.count("left out") == 1
    assert [file.name for file in pictures_of(places_of(f"{folder}/a, b.jpg,{folder}/d.jfif"))] == [
        "a, b.jpg",
        "d.jfif",
    ]
    with pytest.raises(ConfigError, match=r"c\.heic: not a picture"):
        pictures_of([folder / "c.heic"])


def test_places_are_split_at_commas_that_are_in_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b.jpg", "a,b", "c, d"):
        (tmp_path / name).touch()
    assert [str(place) for place in places_of("a, b.jpg")] == ["a", "b.jpg"]
    assert [str(place) for place in places_of("a,b,c, d,a")] == ["a,b", "c, d", "a"]
    assert places_of("~/b.jpg") == [tmp_path / "b.jpg"]
    with pytest.raises(ConfigError, match=r"no file or folder e\.jpg"):
        places_of("a,e.jpg")


@pytest.mark.parametrize("name", ["../secret.jpg", "{}/secret.jpg", "a/../../secret.jpg"])
def test_a_file_name_that_leaves_the_image_folder_is_a_bad_item(tmp_path, name):
    photo(tmp_path / "secret.jpg")
    photo(tmp_path / "images" / "a" / "1.jpg")
    images = [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": name.format(tmp_path)}]
    file = write(tmp_path, images, [caption(1, 1), caption(2, 2)])
    with pytest.raises(BadDataError, match=r"image 2 .* leads out of the image folder"):
        load_coco(file, tmp_path / "images")
    split, _ = load_coco(file, tmp_path / "images", on_bad="drop")
    assert split.images.ids == ["1"]
    split, _ = load_coco(file, tmp_path / "images", outside_images=True)
    assert split.images.ids == ["1", "2"] and split.images[1].size == (40, 30)


def test_the_config_says_whether_names_may_lead_out_and_how_long_captions_may_be(tmp_path):
    photo(tmp_path / "1.jpg")
    (tmp_path / "images").mkdir()
    file = write(tmp_path, [{"id": 1, "file_name": "../1.jpg"}], [caption(1, 1, "a" * 3000)])
    fields = {"annotations": str(file), "images": str(tmp_path / "images"), "outside_images": True}
    data = Data(kind="coco", max_caption_chars=3000, **fields)
    assert len(COCO.load(data, COCO.settings(data), "train", tmp_path / "cache")[0]) == 1
    data = Data(kind="coco", **fields)
    with pytest.raises(BadDataError, match="3000 characters, more than 2000"):
        COCO.load(data, COCO.settings(data), "train", tmp_path / "cache")


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_unicodes_other_form_is_found(tmp_path, written, stored):
    photo(tmp_path / "images" / unicodedata.normalize(stored, "café.jpg"), 3)
    images = [{"id": 1, "file_name": unicodedata.normalize(written, "café.jpg")}]
    split, report = load_coco(write(tmp_path, images, [caption(1, 1)]), tmp_path / "images", cache=tmp_path / "cache")
    assert not report.bad and split.images[0].size == (40, 30) and split.images.fingerprint()


def test_two_ids_of_one_picture_are_counted_in_the_log(tmp_path, capsys):
    photo(tmp_path / "images" / "a.jpg")
    photo(tmp_path / "images" / "c.jpg", 1)
    (tmp_path / "images" / "b.jpg").symlink_to("a.jpg")
    names = {1: "a.jpg", 2: "b.jpg", 3: "a.jpg", 4: "c.jpg"}
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    load_coco(write(tmp_path, images, [caption(i, i) for i in names]), tmp_path / "images")
    assert "1 pictures go by more than one id (3 ids), the first is a.jpg (ids 1, 2, 3)" in capsys.readouterr().out


def test_an_id_or_name_too_long_for_a_file_is_named(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b" * 300 + ".jpg"}]
    with pytest.raises(BadDataError, match=r"image 2 .* its name is 304 bytes long, more than the 255"):
        load_coco(write(tmp_path, images, [caption(1, 1), caption(2, 2)]), tmp_path / "images")

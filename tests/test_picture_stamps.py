"""A picture that another of its size has replaced is noticed: in checks, cached features, shards and begun runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_features import cached

from eim_jax.commands import train, trained_arms
from eim_jax.config import Config, ConfigError
from eim_jax.data import image_checks, picture_stamps
from eim_jax.data.image_checks import check_images
from eim_jax.data.picture_stamps import stamp_of
from eim_jax.data.samples import DrawnImages, FileImages, Split
from eim_jax.evaluation import scoring
from eim_jax.training.setup import Inputs

COUNT = 11


def picture(folder, row, seed):
    """A picture without compression: of the same size whatever it shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"{row}.bmp")


def files(folder):
    names = [f"{row}.bmp" for row in range(COUNT)]
    return FileImages(folder, [f"i{row}" for row in range(COUNT)], names)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for row in range(COUNT):
        picture(place, row, row)
    return place


def swap(folder, row, seed=99):
    """Replaces a picture by one of its size; its times stay as far as a copying program can keep them."""
    file = folder / f"{row}.bmp"
    before = file.stat()
    picture(folder, row, seed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns


def test_a_stamp_follows_both_ends_and_a_file_that_nothing_touched_is_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "a"
    rng = np.random.default_rng(0)
    for size in (0, 1, 20_000, 32 * 1024, 100_000):
        content = bytearray(rng.bytes(size))
        file.write_bytes(content)
        first = stamp_of(file)
        assert first.size == size
        for place in {0, size // 2, size - 1} if size else ():
            content[place] ^= 1
            file.write_bytes(content)
            other = stamp_of(file)
            assert (other.ends != first.ends) == (place < 16384 or place >= size - 16384)
            assert other.changed != first.changed
            first = other
    monkeypatch.setattr(picture_stamps.hashlib, "sha256", None)
    assert stamp_of(file) == first


def test_the_identity_of_earlier_runs_stays_and_contents_tell_a_replaced_picture(folder, tmp_path):
    before = files(folder)
    old = before.fingerprint(), before.contents(), before.modified()
    os.rename(folder, tmp_path / "moved")
    moved = files(tmp_path / "moved")
    assert (moved.fingerprint(), moved.contents(), moved.modified()) == old
    os.utime(tmp_path / "moved" / "3.bmp")
    touched = files(tmp_path / "moved")
    assert (touched.fingerprint(), touched.contents()) == old[:2] and touched.modified() != old[2]
    swap(tmp_path / "moved", 4)
    after = files(tmp_path / "moved")
    assert after.fingerprint() == old[0] and after.contents() != old[1]
    assert DrawnImages(["a"], lambda row: None, ["a"]).contents() == ""


def test_a_picture_replaced_in_a_shared_cache_makes_its_features_stale(folder, tmp_path, capsys):
    def split():
        return Split("train", (), files(folder))

    first = np.array(cached(tmp_path, split()))
    np.testing.assert_array_equal(cached(tmp_path, split()), first)
    capsys.readouterr()
    swap(folder, 4)
    second = np.array(cached(tmp_path, split()))
    assert "contents: expected" in capsys.readouterr().out
    assert [row for row in range(COUNT) if not np.array_equal(first[row], second[row])] == [4]
    os.utime(folder / "5.bmp")  # its middle may be another one
    cached(tmp_path, split())
    said = capsys.readouterr().out
    assert "modified: expected" in said and "contents" not in said


def test_features_of_an_earlier_version_are_made_again_and_prepared_shards_share_those_of_files(
    folder, tmp_path, capsys
):
    images = files(folder)
    cached(tmp_path, Split("train", (), images))
    manifest = tmp_path / "cache" / "manifest.json"
    facts = json.loads(manifest.read_text())

    class Prepared(DrawnImages):
        def contents(self):
            return images.contents()

    identities = [images.identity(row) for row in range(COUNT)]
    shards = Prepared(images.ids, lambda row: 1 / 0, identities)
    capsys.readouterr()
    cached(tmp_path, Split("train", (), shards))  # opens none of them
    assert capsys.readouterr().out == ""
    manifest.write_text(json.dumps({key: v for key, v in facts.items() if key not in ("contents", "modified")}))
    cached(tmp_path, Split("train", (), files(folder)))
    assert "contents: expected" in capsys.readouterr().out


def test_a_replaced_picture_is_looked_at_again_and_said(folder, tmp_path, capsys):
    assert not check_images(files(folder), cache=tmp_path)
    capsys.readouterr()
    assert not check_images(files(folder), cache=tmp_path)
    assert capsys.readouterr().out == ""
    file = folder / "4.bmp"
    content = file.read_bytes()
    file.write_bytes(b"x" * len(content))
    picture_stamps._known.clear()  # as another process
    assert list(check_images(files(folder), cache=tmp_path)) == [4]
    assert f"1 pictures in {folder} were replaced since they were checked, the first is 4.bmp" in " ".join(
        capsys.readouterr().out.split()
    )


KILLED = """
import os, sys, time
from eim_jax.data import image_checks
from eim_jax.data.samples import FileImages
image_checks._SAVE_SECONDS, image_checks._CHUNK = 0, 1
looked = image_checks.file_problem
def stop(path):
    if path.name == "7.bmp":
        os._exit(9)
    found = looked(path)
    if path.name == "5.bmp":
        time.sleep(1)  # those before it are on their way to the disk
    return found
image_checks.file_problem = stop
names = [f"{row}.bmp" for row in range(11)]
image_checks.check_images(FileImages(sys.argv[1], names, names), 1, sys.argv[2])
"""


def test_a_killed_check_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    ended = subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path / "verdicts"])
    assert ended.returncode == 9
    looked = []
    monkeypatch.setattr(image_checks, "file_problem", lambda path: looked.append(path.name))
    assert not check_images(files(folder), cache=tmp_path / "verdicts")
    assert 4 <= len(looked) < COUNT and set(looked) >= {"7.bmp", "8.bmp", "9.bmp", "10.bmp"}


def begun(workdir, pictures):
    """A run's inputs, as far as its identity is asked for."""
    inputs = object.__new__(Inputs)
    vars(inputs).update(workdir=workdir, fingerprints={"training data": "d", "training pictures": pictures}, train=None)
    return inputs


def test_a_begun_run_is_refused_by_name_and_one_of_an_earlier_version_goes_on(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"identity": {"training data": "d", "training pictures": "p"}}))
    trained_arms.check_identity(begun(tmp_path, "p"))
    with pytest.raises(ConfigError, match="was trained with other training pictures: put the old files back"):
        trained_arms.check_identity(begun(tmp_path, "q"))
    file.write_text(json.dumps({"identity": {"training data": "d"}}))
    trained_arms.check_identity(begun(tmp_path, "q"))


def test_scores_of_replaced_test_pictures_are_made_again_and_others_stay(folder, tmp_path, capsys):
    config = Config(arms=("eim",))
    scores = tmp_path / "eim" / scoring.SCORES
    scores.parent.mkdir()

    def noted(before):
        scores.write_text("{}")
        return train._test_pictures(config, tmp_path, Split("test", (), files(folder)), before)

    first = noted({})
    assert scores.exists() and noted(first) == first and scores.exists()
    swap(folder, 2)
    picture_stamps._known.clear()
    second = noted(first)
    assert second != first and not scores.exists() and "scoring again" in capsys.readouterr().out
    assert noted({"test pictures": "another-split p"}) == second and scores.exists()

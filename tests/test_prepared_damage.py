"""A prepared folder that is damaged, or of other data than the run's, is refused by the file or the field."""

import dataclasses
import functools
import json
from pathlib import Path

import prepared_cases
import pytest
from prepared_cases import SMALL, reading, shards

from eim_jax.config import ConfigError
from eim_jax.data import shard_writer as writing
from eim_jax.data.datasets import load_split


@pytest.fixture
def made(tmp_path):
    """Returns a function: kind -> (its config on files, the same on the prepared folder, that folder)."""
    return functools.partial(prepared_cases.make, tmp_path)


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    (folder / "manifest.json").write_text('{"version": 1')


def other_version(folder):
    (folder / "manifest.json").write_text('{"version": 99}')


def no_shard(folder):
    shards(folder)[1].unlink()


def short_shard(folder):
    shards(folder)[0].write_bytes(shards(folder)[0].read_bytes()[:-9])


def damaged_index(folder):
    file = folder / "index" / "train.json"
    file.write_text(file.read_text().replace("runs", "sits"))


def no_index(folder):
    (folder / "index" / "train.json").unlink()


def flipped_note(folder):
    file = folder / "captions/1.0.0/features.json"
    file.write_text(file.read_text().replace("captions", "Captions", 1))


def broken_notes(folder):
    """As a folder of an earlier version, which holds no sums of its notes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest.pop("notes")) >= ["captions/1.0.0/dataset_info.json", "captions/1.0.0/features.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "captions/1.0.0/dataset_info.json").write_bytes(b"\xff")


def entry(group, content):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, group: content}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_manifest, r"coco-prepared holds no prepared data \(no manifest.json\): write it with --mode=prepare"),
        (cut_manifest, "manifest.json is damaged"),
        (other_version, "is not a manifest of this version of eim_jax"),
        (no_shard, r"captions-t\w+.array_record-0000\d is missing: copy the whole folder"),
        (short_shard, r"array_record-00000 has [\d,]+ bytes, not [\d,]+: copy it again"),
        (damaged_index, "train.json is damaged"),
        (no_index, "train.json is missing"),
        (flipped_note, r"features.json is damaged: copy it again, or prepare again"),
        (broken_notes, r"captions/1.0.0 is damaged \(\w+Error: .*: copy the whole folder"),
        (entry("files", {"captions/x": "7"}), r"manifest.json is damaged \(files has an entry 'captions/x': '7'\)"),
        (entry("files", {"../x": 7}), r"manifest.json is damaged \(files has an entry '../x'"),
        (entry("splits", {"train": 3}), r"manifest.json is damaged \(splits.train is 3\)"),
        (entry("splits", {"train": {"same_as": "dev"}}), r"splits.train.same_as is 'dev', none of the splits"),
        (entry("splits", {"train": {"index": "x", "bad": [{"id": 1}]}}), r"splits.train.bad is .*not a list of bad"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_file(made, tmp_path, damage, message):
    _, shard, folder = made("coco")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_split(shard, "train", tmp_path)


def test_a_shard_damaged_inside_names_the_picture(made, tmp_path):
    _, shard, folder = made("coco")
    for file in shards(folder):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(bytes(content))
    split = load_split(shard, "train", tmp_path)
    remedy = r"image id \d \(\d.jpg\) cannot be read.* A shard in .*coco-prepared/.* is damaged: copy the whole folder"
    with pytest.raises(ValueError, match=remedy):
        for row in range(len(split.images)):
            split.images[row]


def test_data_of_other_files_or_settings_is_refused_by_the_field(made, tmp_path):
    raw, shard, folder = made("instruct")
    questions, asked, _ = made("scienceqa")
    captions, _, their = made("coco")
    refused = [
        (reading(captions, their, strip=False), "config.data.strip is False, but .* was prepared with True"),
        (reading(questions, folder), r"prepared from data of kind 'instruct', but config.data.kind is 'scienceqa'"),
        (reading(raw, folder, multi_turn=False), "config.data.multi_turn is False, but .* was prepared with True"),
        (reading(raw, folder, template="alpaca"), "config.data.template is alpaca, but .* was prepared with plain"),
        (reading(raw, folder, seam="spaced"), "seam is spaced, but the conversations in .* prepared with one_string"),
        (reading(raw, folder, sources=raw.data.own["sources"][:1]), "config.data.sources is"),
        (
            dataclasses.replace(asked, data=dataclasses.replace(asked.data, splits=("test",) * 3)),
            "config.data.splits is",
        ),
        (reading(raw, tmp_path / "nowhere"), "nowhere holds no prepared data .*: there is no such folder"),
    ]
    for config, message in refused:
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            load_split(config, "train", tmp_path)
    other = dataclasses.replace(asked, data=dataclasses.replace(asked.data, form="QCM-A", captions_in_context=True))
    files = dataclasses.replace(other, data=dataclasses.replace(other.data, prepared=""))  # the form is free
    assert load_split(other, "train", tmp_path).fingerprint() == load_split(files, "train", tmp_path).fingerprint()
    source = Path(raw.data.own["sources"][0])
    source.write_text(source.read_text().replace("nothing", "much"))
    with pytest.raises(
        ConfigError, match=r"llava.json is not the file that .* was prepared from, or has changed since"
    ):
        load_split(shard, "train", tmp_path)
    with pytest.raises(ConfigError, match="was prepared from other files, or with other settings: choose another"):
        writing.prepare(raw, folder, SMALL)

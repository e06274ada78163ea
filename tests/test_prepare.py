"""Claims about prepared data: the split that the files give, bit by bit; whole after interruptions; honest errors."""

import dataclasses
import functools
import json
from pathlib import Path

import mains
import numpy as np
import prepared_cases
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from prepared_cases import DATASET, KINDS, SMALL, coco, emptied, reading, shards

from eim_jax.config import Arm, Config, ConfigError, Data
from eim_jax.data import shard_writer as writing
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets import load_split
from eim_jax.data.loader import batches
from eim_jax.data.tokenize import encode_split, load_tokenizer
from eim_jax.training import kinds

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def made(tmp_path):
    """Returns a function: kind -> (its config on files, the same on the prepared folder, that folder)."""
    return functools.partial(prepared_cases.make, tmp_path)


def epoch(split):
    encoded = encode_split(split, load_tokenizer("miniature/gpt2"), 60, eos=True)
    fields = {"tokens", "valid", "supervised", "image", "has_image"}
    return list(batches(split, encoded, fields=fields, batch_size=3, seed=1, epochs=2, image_size=16))


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_shards_give_the_same_batches_and_fingerprints(made, tmp_path, kind):
    raw, shard, folder = made(kind)
    assert len(shards(folder)) > 3
    for name in ("train",) if kind == "instruct" else ("train", "test"):
        want, got = load_split(raw, name, tmp_path), load_split(shard, name, tmp_path)
        assert got.name == name and got.samples == want.samples and got.references == want.references
        assert getattr(got, "problems", None) == getattr(want, "problems", None)
        assert not kinds.differences(raw, shard)  # a workdir may change between the two
        assert got.fingerprint() == want.fingerprint() and got.images.fingerprint() == want.images.fingerprint()
        for row in range(len(want.images)):
            assert got.images.content(row) == want.images.path(row).read_bytes()
        for one, other in zip(epoch(want), epoch(got), strict=True):
            for field, a, b in zip(one._fields, one, other, strict=True):
                assert (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b))), (
                    field
                )


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_has_tfds_reads_the_folder_without_this_package(made, tmp_path, kind):
    raw, _, folder = made(kind)
    builder = tfds.builder_from_directory(folder / DATASET[kind] / "1.0.0")
    split = load_split(raw, "train", tmp_path)
    records = list(builder.as_data_source("train"))
    shown = {r["image_id"].decode(): r["image"] for r in records if r["image"]}
    assert shown == {id_: split.images.path(row).read_bytes() for row, id_ in enumerate(split.images.ids)}
    if kind == "coco":
        told = {text for r in records for text in r["captions"]["text"]}
        assert told == {sample.response.encode() for sample in split.samples}
    elif kind == "instruct":
        told = {pair for r in records for pair in zip(r["turns"]["id"], r["turns"]["instruction"], strict=True)}
        assert told == {(s.id.encode(), s.instruction.encode()) for s in split.samples}
    else:
        told = [(r["id"].decode(), int(r["answer"]), [c.decode() for c in r["choices"]]) for r in records]
        assert told == [(p.id, p.answer, list(p.choices)) for p in split.problems.values()]


def test_reading_opens_no_picture_and_needs_no_files(made, tmp_path):
    _, shard, folder = made("coco")
    bare = Config(data=Data(prepared=str(folder)))
    for file in [*(tmp_path / "coco").rglob("*.json"), *(tmp_path / "coco").rglob("*.jpg")]:
        file.unlink()
    split = load_split(bare, "train", tmp_path)
    split.images.content = split.images._load = None  # whoever opens a picture fails
    assert split.fingerprint() == load_split(shard, "train", tmp_path).fingerprint() and len(split) == 14


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_prepare_goes_on_after_its_last_whole_shard(made, tmp_path, monkeypatch, kind):
    raw, _, whole = made(kind)
    folder, opened = tmp_path / "again", []
    examples = writing._examples

    def stops(plan, kind, start, advance):
        for number, example in enumerate(examples(plan, kind, start, advance), start):
            if number == 5:
                raise KeyboardInterrupt
            yield example

    def watched(plan, kind, start, advance):
        for example in examples(plan, kind, start, advance):
            opened.append(example["image_id"])
            yield example

    monkeypatch.setattr(writing, "_examples", stops)
    with pytest.raises(KeyboardInterrupt):
        writing.prepare(raw, folder, SMALL)
    with pytest.raises(FileNotFoundError, match="preparing was interrupted; run the same --mode=prepare again"):
        load_split(reading(raw, folder), "train", tmp_path)
    info = tfds.builder_from_directory(folder / DATASET[kind] / "1.0.0").info
    done = info.splits["train"].shard_lengths
    finished = shards(folder)[: len(done)]
    before = [(file.name, file.stat().st_mtime_ns) for file in finished]
    assert 0 < sum(done) <= 5
    monkeypatch.setattr(writing, "_examples", watched)
    writing.prepare(raw, folder, SMALL)
    assert [(file.name, file.stat().st_mtime_ns) for file in finished] == before
    assert len(opened) == sum(i.num_examples for i in _splits(whole, kind)) - sum(done)
    assert {f.name: f.read_bytes() for f in shards(folder)} == {f.name: f.read_bytes() for f in shards(whole)}
    opened.clear()
    writing.prepare(raw, folder, SMALL)  # complete: nothing is opened or written
    assert not opened


def test_what_a_kill_left_of_a_manifest_keeps_nobody_from_preparing(made, tmp_path):
    _, _, folder = made("coco")
    raw = Config(data=coco(tmp_path / "coco"), arm={"eim": Arm()})
    (folder / writing.MANIFEST).rename(folder / f"{writing.MANIFEST}.12ab34cd-99999.partial")
    writing.prepare(raw, folder, SMALL)
    assert (folder / writing.MANIFEST).exists()
    (folder / "mine.partial").write_text("")
    with pytest.raises(ConfigError, match=r"holds other things \(mine.partial\)"):
        writing.prepare(raw, folder, SMALL)


def test_a_picture_replaced_by_one_of_its_size_is_another_picture(tmp_path):
    data = coco(tmp_path)
    for file in (tmp_path / "images").iterdir():
        Image.open(file).convert("RGB").resize((20, 20)).save(file, "BMP")
    raw, folder = Config(data=data, arm={"eim": Arm()}), tmp_path / "prepared"
    writing.prepare(raw, folder, SMALL)
    size = (tmp_path / "images" / "5.jpg").stat().st_size
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "5.jpg", "BMP")
    assert (tmp_path / "images" / "5.jpg").stat().st_size == size
    with pytest.raises(ConfigError, match="was prepared from other files"):
        writing.prepare(raw, folder, SMALL)
    manifest = json.loads((folder / writing.MANIFEST).read_text())
    for split in manifest["splits"].values():
        split.pop("contents", None)
    (folder / writing.MANIFEST).write_text(json.dumps(manifest))
    writing.prepare(raw, folder, SMALL)  # one of an earlier version cannot tell


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def removed(file):
    file.unlink()


@pytest.mark.parametrize("change", [cut, emptied, removed])
@pytest.mark.parametrize(
    ("killed", "which"),
    [
        *((True, name) for name in ("dataset_info.json", "metadata.json", "features.json")),
        *((k, "*train*-00000") for k in (True, False)),
    ],
)
def test_a_file_cut_short_or_missing_is_named_and_made_again(
    made, tmp_path, monkeypatch, capsys, which, change, killed
):
    """What a power cut leaves of files that were written in the seconds before it."""
    raw, _, whole = made("coco")
    folder = tmp_path / "again"
    if killed:
        monkeypatch.setattr(
            writing, "write_json", lambda path, value: 1 / 0 if path.name == "manifest.json" else _json(path, value)
        )
        with pytest.raises(ZeroDivisionError):
            writing.prepare(raw, folder, SMALL)
        monkeypatch.undo()
    else:
        writing.prepare(raw, folder, SMALL)
    file = next(iter((folder / "captions" / "1.0.0").glob(which)))
    change(file)
    writing.prepare(raw, folder, SMALL)
    if not (change is removed and which in ("metadata.json", "features.json")):
        assert file.name in capsys.readouterr().out.replace("\n", "")
    assert {f.name: f.read_bytes() for f in shards(folder)} == {f.name: f.read_bytes() for f in shards(whole)}
    tfds.builder_from_directory(folder / "captions" / "1.0.0")


def test_a_manifest_of_zero_bytes_is_written_again(made, tmp_path):
    raw, _, _ = made("coco")
    writing.prepare(raw, tmp_path / "p", SMALL)
    emptied(tmp_path / "p" / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*prepare again into the same folder"):
        load_split(reading(raw, tmp_path / "p"), "train", tmp_path)
    writing.prepare(raw, tmp_path / "p", SMALL)
    load_split(reading(raw, tmp_path / "p"), "train", tmp_path)


def _splits(folder, kind):
    return tfds.builder_from_directory(folder / DATASET[kind] / "1.0.0").info.splits.values()


def test_what_was_begun_from_other_files_is_written_anew(made, tmp_path, monkeypatch, capsys):
    raw, _, _ = made("coco")
    folder = tmp_path / "again"
    monkeypatch.setattr(
        writing, "write_json", lambda path, value: 1 / 0 if path.name == "manifest.json" else _json(path, value)
    )
    with pytest.raises(ZeroDivisionError):
        writing.prepare(raw, folder, SMALL)
    monkeypatch.undo()
    file = Path(raw.data.own["annotations"])
    file.write_text(file.read_text().replace("runs", "sits"))
    writing.prepare(raw, folder, SMALL)
    assert "is written anew: it was begun from other data" in capsys.readouterr().out.replace("\n", " ")
    assert all("sits" in s.response for s in load_split(reading(raw, folder), "train", tmp_path).samples)


def _json(path, value):
    path.write_text(json.dumps(value))


def test_bad_items_are_named_as_for_files_and_dropped_ones_are_remembered(made, tmp_path):
    raw, _, _ = made("coco")
    (Path(raw.data.own["images"]) / "9.jpg").write_bytes(b"no picture")
    messages = []
    for act in (lambda: load_split(raw, "train", tmp_path), lambda: writing.prepare(raw, tmp_path / "bad", SMALL)):
        with pytest.raises(BadDataError) as error:
            act()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "image 9 (9.jpg): not a picture in a known format" in messages[0]
    dropping = dataclasses.replace(raw, data=dataclasses.replace(raw.data, on_bad="drop"))
    writing.prepare(dropping, tmp_path / "bad", SMALL)
    got = load_split(reading(dropping, tmp_path / "bad"), "train", tmp_path)
    assert got.fingerprint() == load_split(dropping, "train", tmp_path).fingerprint() and len(got) == 12
    with pytest.raises(BadDataError, match=r"prepared with on_bad='drop'.*\n.*image 9 \(9.jpg\): not a picture"):
        load_split(reading(raw, tmp_path / "bad"), "train", tmp_path)


def test_one_captions_file_for_training_and_scores_is_written_once(made, tmp_path):
    raw, shard, folder = made("coco", eval_annotations="")
    assert {file.name.split(".")[0] for file in shards(folder)} == {"captions-train"}
    assert load_split(shard, "test", tmp_path).references == load_split(raw, "test", tmp_path).references


def test_the_folder_must_be_free_and_the_data_have_files(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other things \(letter.txt\): choose an empty folder"):
        writing.prepare(Config(), tmp_path)
    with pytest.raises(ConfigError, match=r"config.data.kind='miniature' draws its pictures"):
        writing.prepare(Config(data=Data(kind="miniature")), tmp_path / "new")


def test_the_command_prepares_and_says_how_to_read_it(tmp_path):
    data = coco(tmp_path)
    command = ["--mode=prepare", f"--config={ROOT / 'configs/clipcap_eim_coco.py'}"]
    command += [f"--config.data.{field}={value}" for field, value in data.own.items()]
    code, said = mains.run([*command, f"--out={tmp_path / 'out'}"], tmp_path / "said.txt")
    assert code == 0, said[-2000:]
    assert "prepared 20 samples" in said and f"--config.data.prepared={tmp_path / 'out'}" in said
    code, said = mains.run(command, tmp_path / "said.txt")
    assert code != 0 and "--out=FOLDER" in said

"""Claims about prepared data: the split that the files give, bit by bit; whole after interruptions; honest errors."""

import dataclasses
import json
from pathlib import Path

import mains
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from eim_jax.config import Arm, Config, ConfigError, Data
from eim_jax.data import shard_writer as writing
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets import load_split
from eim_jax.data.loader import batches
from eim_jax.data.tokenize import encode_split, load_tokenizer
from eim_jax.training import kinds

ROOT = Path(__file__).resolve().parent.parent
SMALL = 4000  # bytes in a shard: several shards for a few pictures
KINDS = ("coco", "scienceqa", "instruct")
DATASET = {"coco": "captions", "scienceqa": "scienceqa", "instruct": "instructions"}


def picture(file, seed):
    """JPEG, PNG, transparent PNG, or a JPEG lying on its side, in turn: what decoders disagree about."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3 + (seed % 4 == 2)), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(
        file, "PNG" if seed % 4 in (1, 2) else "JPEG", **({"exif": exif} if seed % 4 == 3 else {})
    )


def coco(place):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (5, 3, 9, 4, 8, 7, 2)]
    for record in images:
        picture(place / "images" / record["file_name"], record["id"])
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f"a dög {i} runs {k}"}
        for k in range(2)
        for i in (3, 5, 9, 8, 4, 2, 7)
    ]
    (place / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    test = {"images": images[:3], "annotations": [c for c in captions if c["image_id"] in (5, 3, 9)]}
    (place / "test.json").write_text(json.dumps(test))
    return Data(
        annotations=str(place / "captions.json"),
        images=str(place / "images"),
        eval_annotations=str(place / "test.json"),
    )


def scienceqa(place):
    problems = {}
    for i in range(1, 12):
        problems[str(i)] = {
            "question": f"Which {i}?", "choices": ["x", "y", "z"][: 2 + i % 2], "answer": 1, "hint": "h" * (i % 3),
            "image": "image.png" if i % 3 else None, "grade": "grade2", "lecture": "L.", "solution": "S.",
            "split": "train" if i < 9 else "test",
        }  # fmt: skip
        if i % 3:
            picture(place / "images" / problems[str(i)]["split"] / str(i) / "image.png", i)
    ids = {split: [i for i in problems if problems[i]["split"] == split][::-1] for split in ("train", "test")}
    (place / "problems.json").write_text(json.dumps(problems))
    (place / "pid_splits.json").write_text(json.dumps(ids))
    (place / "captions.json").write_text(json.dumps({"captions": {"2": "two", "5": "five"}}))
    return Data(kind="scienceqa", folder=str(place))


def instruct(place):
    rows = []
    for i in range(9):
        image = f"{i % 4}.jpg" if i % 3 else None
        if image:
            picture(place / "images" / image, i % 4)
        turns = [("human", f"what {i}?"), ("gpt", f"a {i}"), ("human", "and then?"), ("gpt", "nothing")]
        rows.append(
            {
                "id": str(i),
                **({"image": image} if image else {}),
                "conversations": [{"from": a, "value": b} for a, b in turns],
            }
        )
    (place / "llava.json").write_text(json.dumps(rows))
    alpaca = [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(6)]
    (place / "alpaca.json").write_text(json.dumps(alpaca))
    sources = (str(place / "llava.json"), (str(place / "alpaca.json"), 0.5))
    return Data(kind="instruct", sources=sources, images=str(place / "images"), multi_turn=True)


@pytest.fixture
def made(tmp_path):
    """Returns a function: kind -> (its config on files, the same on the prepared folder, that folder)."""

    def make(kind, **changes):
        place = tmp_path / kind
        place.mkdir()
        data = dataclasses.replace({"coco": coco, "scienceqa": scienceqa, "instruct": instruct}[kind](place), **changes)
        config, folder = Config(data=data, arm={"eim": Arm()}), tmp_path / f"{kind}-prepared"
        writing.prepare(config, folder, SMALL)
        return config, reading(config, folder), folder

    return make


def reading(config, folder, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(folder), **changes))


def shards(folder):
    return sorted(folder.glob("*/1.0.0/*.array_record-*"))


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


def emptied(file):
    file.write_bytes(b"")


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

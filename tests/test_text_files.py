"""Claims about texts where they enter: byte-order marks, half characters, NUL and ids, in every kind of file."""

import codecs
import copy
import json
import random
import shutil

import pytest
from test_coco import caption, photo, write

from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.coco import load_coco
from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.datasets.scienceqa_files import read_problems
from eim_jax.data.text_files import read_json, read_text
from eim_jax.evaluation.metrics import caption_scores, mme
from eim_jax.evaluation.tasks import TASKS
from eim_jax.reporting.page import write_report

HALF = "a red cube \ud83d"  # the first half of an emoji, as a program that cuts texts leaves it
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKS)
def test_a_byte_order_mark_says_how_a_file_is_read(tmp_path, encoding):
    file = tmp_path / "a.json"
    file.write_bytes(MARKS[encoding] + '{"a": "é\\r"}\r\n'.encode(encoding))
    assert read_json(file) == {"a": "é\r"} and read_text(file).endswith("}\n")


@pytest.mark.parametrize("encoding", MARKS)
def test_every_reader_accepts_marks(tmp_path, encoding):
    def marked(file):
        file.write_bytes(MARKS[encoding] + file.read_text(encoding="utf-8").encode(encoding))
        return file

    photo(tmp_path / "images" / "1.jpg")
    captions = marked(write(tmp_path, [{"id": 1, "file_name": "1.jpg"}], [caption(1, 1, "é")]))
    assert load_coco(captions, tmp_path / "images").split.samples[0].response == "é"
    assert caption_scores.load_references([captions]) == {1: ["é"]}
    results = tmp_path / "results.json"
    results.write_text('[{"image_id": 1, "caption": "é"}]', encoding="utf-8")
    assert caption_scores.load_results(marked(results)) == {1: "é"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "é"}\n{"instruction": "b", "output": "c"}\n', encoding="utf-8")
    assert len(load_instruct(marked(rows), None).split) == 2
    (tmp_path / "color.txt").write_text("1.jpg\tIs it?\tYes\tyes\n1.jpg\tNot?\tNo\tno\n", encoding="utf-8")
    marked(tmp_path / "color.txt")
    assert mme.read(tmp_path)["color"][0].image == "1.jpg"
    (tmp_path / "problems.json").write_text('{"5": {"question": "é", "choices": ["a", "b"], "answer": 1}}', "utf-8")
    (tmp_path / "pid_splits.json").write_text('{"test": [5.0]}')
    marked(tmp_path / "problems.json"), marked(tmp_path / "pid_splits.json")
    assert list(read_problems(tmp_path, "test")) == ["5"]


def test_a_file_that_is_no_text_or_nested_without_end_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match=r"a\.json is not UTF-16 text"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"b\.json is not a JSON file: it is nested too deeply"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("split", ["train", "test"])
def test_half_an_emoji_in_a_caption_is_a_bad_item_by_id(shared_case, shared_data, split):
    file, images = shared_case("caption_half_emoji") / "captions.json", shared_data("coco_ccby") / "images"
    with pytest.raises(BadDataError, match=r"caption 666775 .* holds half a character, '\\ud83d'"):
        load_coco(file, images, split)
    kept, report = load_coco(file, images, split, on_bad="drop")
    assert len(kept) == 19 and [item.id for item in report.bad] == ["666775"]


@pytest.mark.parametrize("text", [HALF, "a\0b"], ids=["half", "NUL"])
@pytest.mark.parametrize("place", ["caption", "caption id", "image id", "file name"])
def test_a_text_that_no_program_takes_is_a_bad_item_wherever_it_stands(tmp_path, text, place):
    photo(tmp_path / "images" / "1.jpg")
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "1.jpg"}]
    annotations = [caption(1, 1), caption(2, 2)]
    if place == "caption":
        annotations[1]["caption"] = text
    elif place == "caption id":
        annotations[1]["id"] = text
    elif place == "image id":
        images[1]["id"] = annotations[1]["image_id"] = text
    else:
        images[1]["file_name"] = text
    file = write(tmp_path, images, annotations)
    with pytest.raises(BadDataError, match=r"holds half a character|holds a NUL") as caught:
        load_coco(file, tmp_path / "images")
    str(caught.value).encode()  # the message itself can be printed
    split, report = load_coco(file, tmp_path / "images", on_bad="drop")
    assert [sample.id for sample in split.samples] == ["1"] and len(report.bad) == 1


@pytest.mark.parametrize("row", [{"id": HALF}, {"instruction": "a\0"}, {"output": HALF}, {"input": "\0"}])
def test_instruction_rows_are_held_to_it_too(tmp_path, row):
    good = {"id": "a", "instruction": "b", "output": "c"}
    (tmp_path / "rows.json").write_text(json.dumps([good, {**good, **row}]))
    with pytest.raises(BadDataError, match=r"rows\.json row 1\).* holds"):
        load_instruct(tmp_path / "rows.json", None)
    assert len(load_instruct(tmp_path / "rows.json", None, on_bad="drop").split) == 1


def test_whole_numbers_written_as_fractions_are_the_same_ids(tmp_path):
    photo(tmp_path / "images" / "1.jpg")
    file = write(tmp_path, [{"id": 7, "file_name": "1.jpg"}], [caption(30.0, 7.0)])
    split, _ = load_coco(file, tmp_path / "images")
    assert (split.images.ids, split.samples[0].id) == (["7"], "30")
    assert caption_scores.load_references([file]) == {7: ["a dog runs"]}


def test_a_report_of_a_run_with_half_characters_is_written(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"arms": ["a"], "note": HALF}, "command": HALF + "\0"}))
    path = write_report(tmp_path, TASKS["captions"], lambda image: None, {})
    assert "a red cube ?" in (text := path.read_text(encoding="utf-8")) and "\0" not in text


RESULTS = [{"image_id": 5, "caption": "a dog"}, {"image_id": 6, "caption": "a cat"}]
TRUTH = {
    "images": [{"id": 5}, {"id": 6}],
    "annotations": [{"image_id": 5, "id": 1, "caption": "a dog"}, {"image_id": 6, "id": 2, "caption": "the cat"}],
}


def places_in(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places_in(child, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


ODD = [None, True, 0, -1, 1.5, 1e400, float("nan"), "", "x", HALF, "a\0", [], {}, [[]], [{}], {"id": 1}, 10**400]


@pytest.mark.parametrize("file", ["results", "annotations"])
def test_the_caption_scorer_answers_every_changed_value_by_scores_or_one_error(tmp_path, file, capsys):
    """Each value of both files replaced by each odd one: a JSON object, or exit 2 and one line that begins `error:`."""
    whole = RESULTS if file == "results" else TRUTH
    paths = {"results": tmp_path / "results.json", "annotations": tmp_path / "captions.json"}
    paths["results"].write_text(json.dumps(RESULTS)), paths["annotations"].write_text(json.dumps(TRUTH))
    arguments = ["--no-java", "--results", str(paths["results"]), "--annotations", str(paths["annotations"])]
    tried = [(path, new) for path in places_in(whole) for new in ODD]
    errors = 0
    for path, new in random.Random(0).sample(tried, min(len(tried), 150)):
        paths[file].write_text(json.dumps(changed(whole, path, new)))
        try:
            caption_scores.main(arguments)
            assert "CIDEr" in json.loads(capsys.readouterr().out)
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code == 2 and said.startswith("error: ") and said.count("\n") <= 2, (path, new, said)
            errors += 1
    assert errors > 50


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[1]", b'{"annotations": {"a": 1}}'])
def test_the_caption_scorer_answers_files_that_are_no_such_json(tmp_path, content, capsys):
    (tmp_path / "bad.json").write_bytes(content)
    (tmp_path / "good.json").write_text(json.dumps(TRUTH))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    for results, truth in (("bad", "good"), ("results", "bad"), ("none", "good"), ("results", "none")):
        with pytest.raises(SystemExit) as stop:
            names = str(tmp_path / f"{results}.json"), "--annotations", str(tmp_path / f"{truth}.json")
            caption_scores.main(["--no-java", "--results", *names])
        assert stop.value.code == 2 and ".json" in capsys.readouterr().err
    shutil.rmtree(tmp_path)

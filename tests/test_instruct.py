"""Claims about instruction data: every form becomes the published text, and every bad row is found and named."""

import json

import numpy as np
import pytest
from PIL import Image

from eim_jax.data import image_checks
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.instruct import load_instruct, prompt


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(path)


def write(path, rows, lines=False):
    text = "\n".join(json.dumps(row) for row in rows) + "\n" if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def alpaca(number, **changes):
    return {"instruction": f"Do {number}.", "input": "", "output": f"Done {number}.", **changes}


def llava(identifier, image, *values):
    turns = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]
    return {"id": identifier, "image": image, "conversations": turns}


@pytest.fixture
def photos(tmp_path):
    for seed, name in enumerate(("1.jpg", "2.jpg", "3.jpg")):
        photo(tmp_path / "photos" / name, seed)
    return tmp_path / "photos"


DIALOGUE = llava("7", "2.jpg", "<image>\nWhat is it?", "A cat.", "Which colour?", " Black. ", "Why?\n<image>", "Genes.")


@pytest.mark.parametrize("lines", [False, True])
def test_alpaca_rows_become_the_published_text_with_no_double_space(tmp_path, lines):
    rows = [
        alpaca(0),
        alpaca(1, input=" 3, 4 ", output=" 7\n"),
        {"instruction": "Say hi.", "output": "Hi"},
        alpaca(3, input=None, id="own"),
    ]
    split, report = load_instruct([write(tmp_path / "a.json", rows, lines)], None)
    assert [(s.id, s.image, s.instruction, s.response) for s in split.samples] == [
        ("a/0/0", None, "Instruction: Do 0.\nResponse:", "Done 0."),
        ("a/1/0", None, "Instruction: Do 1. 3, 4\nResponse:", " 7\n"),
        ("a/2/0", None, "Instruction: Say hi.\nResponse:", "Hi"),
        ("a/own/0", None, "Instruction: Do 3.\nResponse:", "Done 3."),
    ]
    assert report.bad == () and report.samples == {"a": 4} and len(split.images) == 0


def test_every_pair_of_a_conversation_is_a_sample_of_its_own(tmp_path, photos):
    split, _ = load_instruct([write(tmp_path / "conversation_58k.json", [DIALOGUE])], photos, name="chat")
    assert split.name == "chat"
    assert [(s.id, s.image, s.instruction, s.response) for s in split.samples] == [
        ("conversation_58k/7/0", 0, "Instruction: What is it?\nResponse:", "A cat."),
        ("conversation_58k/7/1", 0, "Instruction: Which colour?\nResponse:", " Black. "),
        ("conversation_58k/7/2", 0, "Instruction: Why?\nResponse:", "Genes."),
    ]


def test_multi_turn_puts_the_earlier_turns_in_front(tmp_path, photos):
    split, _ = load_instruct([write(tmp_path / "x.json", [DIALOGUE])], photos, multi_turn=True)
    first = "Instruction: What is it?\nResponse:"
    second = first + "A cat.\nInstruction: Which colour?\nResponse:"
    third = second + " Black. \nInstruction: Why?\nResponse:"
    assert [s.instruction for s in split.samples] == [first, second, third]
    assert [s.response for s in split.samples] == ["A cat.", " Black. ", "Genes."]
    assert prompt("Which colour?", [("What is it?", "A cat.")]) == second


def test_instances_share_an_instruction_and_are_no_dialogue(tmp_path):
    row = {"id": "t", "name": "sum", "instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}] * 2}
    split, _ = load_instruct(write(tmp_path / "s.jsonl", [row], lines=True), None, multi_turn=True)
    assert [s.id for s in split.samples] == ["s/t/0", "s/t/1"]
    assert {s.instruction for s in split.samples} == {"Instruction: Add. 1 1\nResponse:"}


def test_samples_of_one_image_share_its_row_across_files(tmp_path, photos):
    one = write(tmp_path / "one.json", [DIALOGUE, llava("a", "1.jpg", "Q", "A"), alpaca(0)])
    two = write(tmp_path / "two.jsonl", [llava("b", "2.jpg", "Q", "A"), llava("c", None, "Q", "A")], lines=True)
    split, report = load_instruct([one, two], photos)
    assert split.images.ids == ["2.jpg", "1.jpg"]
    assert [s.image for s in split.samples] == [0, 0, 0, 1, None, 0, None]
    assert report.samples == {"one": 5, "two": 2}
    with Image.open(photos / "2.jpg") as expected:
        np.testing.assert_array_equal(np.asarray(split.images[0]), np.asarray(expected))


def test_ids_stay_unique_where_files_repeat_them(tmp_path, photos):
    rows = [llava("000", "1.jpg", "Q1", "A"), llava("000", "1.jpg", "Q2", "A"), alpaca(2, id=5), alpaca(3, id="")]
    first, second = write(tmp_path / "x.json", rows), tmp_path / "other" / "x.json"
    second.parent.mkdir()
    write(second, [alpaca(0)])
    split, report = load_instruct([first, second], photos)
    assert [s.id for s in split.samples] == ["x/000/0", "x/000#1/0", "x/5/0", "x/3/0", "x#2/0/0"]
    assert report.samples == {"x": 4, "x#2": 1}


@pytest.mark.parametrize("prefix", ["COCO_train2014_", "COCO_val2014_"])
def test_coco_2014_files_are_found_under_llavas_names(tmp_path, prefix):
    photo(tmp_path / "coco" / f"{prefix}000000000009.jpg")
    for name in ("000000000009.jpg", f"{prefix}000000000009.jpg"):
        split, _ = load_instruct([write(tmp_path / "x.json", [llava("9", name, "Q", "A")])], tmp_path / "coco")
        assert split.images.ids == [f"{prefix}000000000009.jpg"]
    split, _ = load_instruct([write(tmp_path / "x.json", [llava("9", "coco/000000000009.jpg", "Q", "A")])], tmp_path)
    assert split.images.names == [f"coco/{prefix}000000000009.jpg"]


def test_a_share_is_drawn_by_seed_in_the_files_order_and_nests(tmp_path):
    file = write(tmp_path / "a.json", [alpaca(number) for number in range(200)])

    def taken(share, seed=0):
        return [int(s.id.split("/")[1]) for s in load_instruct([(file, share)], None, seed=seed).split.samples]

    assert taken(1) == list(range(200))
    half, tenth = taken(0.5), taken(0.1)
    assert (len(half), len(tenth), len(taken(0.001))) == (100, 20, 1)
    assert half == sorted(set(half)) and set(tenth) < set(half)
    assert taken(0.5) == half and taken(0.5, seed=1) != half
    other = load_instruct([(file, 1.0), [str(file), 0.1]], None).split  # a list, as from a config file
    assert len(other) == 220


def test_a_share_keeps_the_turns_of_a_conversation_together(tmp_path, photos):
    rows = [llava(str(number), "1.jpg", "Q", "A", "R", "B") for number in range(20)]
    split, _ = load_instruct([(write(tmp_path / "x.json", rows), 0.25)], photos)
    assert len(split) == 10
    assert [s.id.rpartition("/")[0] for s in split.samples[::2]] == [
        s.id.rpartition("/")[0] for s in split.samples[1::2]
    ]


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


BAD_ROWS = {
    "list": (["x"], "is not an object but list"),
    "form": ({"prompt": "x", "answer": "y"}, 'has neither "conversations" (LLaVA)', "its keys are 'prompt', 'answer'"),
    "no_output": (without(alpaca(0), "output"), "has neither"),
    "empty_output": (alpaca(0, output=" \n"), '"output" is empty'),
    "null_output": (alpaca(0, output=None), '"output" is not a text but NoneType'),
    "empty_instruction": (alpaca(0, instruction=""), '"instruction" is empty'),
    "input": (alpaca(0, input=3), '"input" is not a text but int'),
    "surrogate": (alpaca(0, output="ab\ud83d"), "\"output\" holds half a character, '\\ud83d', at 2"),
    "instances": ({"instruction": "x", "instances": []}, '"instances" must be a list'),
    "instance": ({"instruction": "x", "instances": [{"input": "", "output": ""}]}, '"instances"[0] "output" is empty'),
    "no_turns": (llava("1", "1.jpg"), '"conversations" must be a list of {"from", "value"}'),
    "starts_gpt": (
        {"image": "1.jpg", "conversations": [{"from": "gpt", "value": "x"}]},
        "\"conversations\"[0] is from 'gpt': turns must alternate",
    ),
    "twice_human": (
        {"image": "1.jpg", "conversations": [{"from": "human", "value": "x"}] * 2},
        "\"conversations\"[1] is from 'human'",
    ),
    "unanswered": (llava("1", "1.jpg", "Q", "A", "R"), '"conversations"[2] has no answer from "gpt"'),
    "empty_answer": (llava("1", "1.jpg", "Q", " "), '"conversations"[1] "value" is empty'),
    "marker_only": (llava("1", "1.jpg", "<image>\n", "A"), '"conversations"[0] has nothing but the marker <image>'),
    "marker_alone": (llava("1", None, "<image>\nQ", "A"), 'has the marker <image>, but the row has no "image"'),
    "two_images": (llava("1", ["1.jpg", "2.jpg"], "Q", "A"), '"image" must be the name of one file'),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_every_bad_row_is_named_or_dropped_whole(tmp_path, photos, kind):
    row, *messages = BAD_ROWS[kind]
    rows = [alpaca(0), row, DIALOGUE]
    for lines, where in ((False, "row 1"), (True, "line 2")):
        file = write(tmp_path / "x.json", rows, lines)
        with pytest.raises(BadDataError) as caught:
            load_instruct([file], photos)
        (item,) = caught.value.bad
        assert item.id == "x/1" and item.file == f"x.json {where}"
        assert all(message in str(caught.value) for message in messages), str(caught.value)
        split, report = load_instruct([file], photos, on_bad="drop")
        assert [s.id for s in split.samples] == ["x/0/0", "x/7/0", "x/7/1", "x/7/2"]
        assert report.bad == (item,) and (report.dropped_rows, report.dropped_images) == (1, 0)
        assert "left out 1 rows" in str(report) and str(item) in str(report)


def damage_missing(file):
    file.unlink()
    return "no such file"


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:300])
    return "truncated"


def damage_text(file):
    file.write_text("<html>")
    return "not a picture"


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_text])
def test_a_bad_image_is_listed_once_and_drops_all_its_rows(tmp_path, photos, damage):
    rows = [llava("a", "1.jpg", "Q", "A"), DIALOGUE, llava("b", "3.jpg", "Q", "A"), llava("c", "2.jpg", "Q", "A")]
    message = damage(photos / "2.jpg")
    file = write(tmp_path / "x.json", rows)
    with pytest.raises(BadDataError) as caught:
        load_instruct([file], photos)
    (item,) = caught.value.bad
    assert str(item).startswith("image 2.jpg (x.json row 1, x/7): ") and message in item.problem.lower()
    split, report = load_instruct([file], photos, on_bad="drop")
    assert [s.id for s in split.samples] == ["x/a/0", "x/b/0"] and split.images.ids == ["1.jpg", "3.jpg"]
    assert [s.image for s in split.samples] == [0, 1]
    assert (report.dropped_rows, report.dropped_images, report.samples) == (2, 1, {"x": 2})


def test_a_second_start_decodes_nothing(tmp_path, photos, monkeypatch):
    file = write(tmp_path / "x.json", [DIALOGUE])
    load_instruct([file], photos, cache=tmp_path / "cache")
    monkeypatch.setattr(image_checks, "file_problem", lambda path: "opened again")
    assert load_instruct([file], photos, cache=tmp_path / "cache").report.bad == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.json is empty"),
        (b'[{"instruction": "\xff"}]', r"x.json is not UTF-8 text \(byte 18\)"),
        (b'[{"instruction": ', "x.json is not a JSON file"),
        (b'{"a": 1}\n\n{"b": \n', "x.json line 3 is not JSON.*one row a line"),
        (b'{\n  "a": 1\n}', "x.json line 1 is not JSON.*JSON list of rows"),
        (b"[]", "no rows are left; 0 bad items"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_instruct([tmp_path / "x.json"], None, on_bad="drop")


def test_wrong_paths_shares_and_options_are_named(tmp_path, photos):
    file = write(tmp_path / "x.json", [DIALOGUE])
    with pytest.raises(FileNotFoundError, match=r"no instruction file .*none\.json"):
        load_instruct([tmp_path / "none.json"], None)
    with pytest.raises(FileNotFoundError, match="no image folder"):
        load_instruct([file], tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"x\.json row 0: the row has the image '2\.jpg'; give the folder"):
        load_instruct([file], None)
    with pytest.raises(ValueError, match="on_bad is 'skip'"):
        load_instruct([file], photos, on_bad="skip")
    for share in (0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"x\.json: its share is"):
            load_instruct([(file, share)], photos)
    for source in (0.5, (file, "half"), (file, True), (file, 0.5, 1)):
        with pytest.raises(ValueError, match="give a file, or"):
            load_instruct([source], photos)
    with pytest.raises(ValueError, match="no sources"):
        load_instruct([], photos)
    with pytest.raises(ValueError, match="no rows are left; 1 bad items"):
        load_instruct([write(tmp_path / "y.json", [alpaca(0, output="")])], None, on_bad="drop")


def test_line_separators_inside_a_text_and_a_byte_order_mark_do_no_harm(tmp_path):
    row = json.dumps(alpaca(0, output="a\u2028b\u0085c"), ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}".encode())
    split, _ = load_instruct([tmp_path / "x.jsonl"], None)
    assert [s.response for s in split.samples] == ["a\u2028b\u0085c"] * 2


def test_the_human_written_instructions_load_whole(shared_data):
    folder = shared_data("instruct")
    files = [folder / "seed_tasks.jsonl", folder / "user_oriented_instructions.jsonl"]
    split, report = load_instruct(files, None)
    assert report.bad == () and report.samples == {"seed_tasks": 175, "user_oriented_instructions": 252}
    assert len(split) == 427 and all(s.image is None for s in split.samples)
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert (
        sum(not row["instances"][0]["input"] for row in rows) == 94
    )  # rows without an input, which have one space less
    for sample, row in zip(split.samples, rows, strict=True):
        (instance,) = row["instances"]
        said = f"{row['instruction'].strip()} {instance['input'].strip()}".strip()
        assert sample.instruction == f"Instruction: {said}\nResponse:" and sample.response == instance["output"]
        assert sample.id.split("/")[1] == row["id"]
    mixed, report = load_instruct([(files[0], 0.2), files[1]], None)
    assert report.samples == {"seed_tasks": 35, "user_oriented_instructions": 252} and len(mixed) == 287

"""One's own questions as a test: forms of a row, a share held out, VQA's rule, choices, intervals."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from eim_jax.config import Config, ConfigError, Data
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets import load_split
from eim_jax.data.datasets.coco import COCO
from eim_jax.data.datasets.instruct import INSTRUCT, load_instruct
from eim_jax.evaluation.metrics import intervals, metric_of, vqa
from eim_jax.evaluation.scoring import is_other_split
from eim_jax.evaluation.tasks import TASKS, task_of
from eim_jax.evaluation.tasks.open_answers import read_choice, score_choices
from eim_jax.evaluation.tasks.task import Predictions, Scored, measured, with_intervals


def write(folder, rows, name="rows.jsonl"):
    for picture in {row["image"] for row in rows if row.get("image")}:
        Image.new("RGB", (8, 8)).save(folder / picture)
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def loaded(tmp_path, name="test", **fields):
    return INSTRUCT.load(
        Data(kind="instruct"), INSTRUCT.settings(Data(images=str(tmp_path), **fields)), name, tmp_path
    )[0]


# Each answer, what it is compared as by the challenge's description of its processing, and why.
PROCESSED = [
    ("Red", "red", "lower case"),
    ("at 3.30.", "at 3.30", "a full stop goes, except before a digit"),
    ("two dogs", "2 dogs", "number words become digits"),
    ("none", "0", "and so does none"),
    ("a cat on the mat", "cat on mat", "articles go"),
    ("dont know", "don't know", "a missing apostrophe comes back"),
    ("couldnt've", "couldn't've", "also where one of two is there"),
    ("well", "well", "a bare form that is a word of its own stays"),
    ("black-and-white", "black and white", "punctuation becomes a space"),
    ("yes , sir", "yes sir", "and nothing where a space stands beside it"),
    ("1,000", "1000", "no space is put for a comma between digits"),
    ("the dog's", "dog's", "apostrophes stay: possessives are no plurals"),
    ("10:30", "10:30", "colons stay: they often stand in times"),
    (" on\n the\ttable ", "on table", "white space is one space"),
]


@pytest.mark.parametrize(("said", "compared", "why"), PROCESSED, ids=[case[2] for case in PROCESSED])
def test_an_answer_is_processed_as_the_challenge_describes(said, compared, why):
    assert vqa.normalised(said) == compared
    assert vqa.normalised(compared) == compared


def test_vqa_accuracy_is_the_mean_over_the_ten_sets_of_nine_people():
    rng = np.random.default_rng(0)
    for _ in range(50):
        people = rng.choice(["red", "blue", "dark blue", "2"], 10).tolist()
        sets = [people[:i] + people[i + 1 :] for i in range(10)]
        want = np.mean([min(collections.Counter(nine)["red"] / 3, 1) for nine in sets])
        assert vqa.accuracy("Red.", people) == pytest.approx(want)
    known = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1, 10: 1}  # the challenge's own table
    for number, worth in known.items():
        assert vqa.accuracy("yes", ["yes"] * number + ["no"] * (10 - number)) == pytest.approx(worth)
    with pytest.raises(ValueError, match="10 people, not 3"):
        vqa.accuracy("yes", ["yes"] * 3)


def test_the_plain_form_gives_question_answer_references_and_choices(tmp_path):
    people = ["red"] * 4 + ["dark red"] * 6
    rows = [
        {"image": "a.png", "question": "Which colour?", "answer": "red"},
        {"id": 7, "image": "a.png", "question": "Which colour?", "answers": [{"answer": one} for one in people]},
        {"question": "Which is a fruit?", "choices": ["stone", "Apple"], "answer": 1},
        {"question": "Which is a stone?", "choices": ["marble", "apple"], "answer": "Marble"},
    ]
    split = load_instruct(write(tmp_path, rows), tmp_path).split
    assert [sample.id for sample in split.samples] == ["rows/0/0", "rows/7/0", "rows/2/0", "rows/3/0"]
    assert [sample.response for sample in split.samples] == ["red", "dark red", "Apple", "marble"]
    assert split.references["rows/7/0"] == tuple(people) and split.references["rows/0/0"] == ("red",)
    assert split.choices == {"rows/2/0": ("stone", "Apple"), "rows/3/0": ("marble", "apple")}
    assert split.samples[2].instruction == ("Instruction: Which is a fruit? Options: (A) stone (B) Apple\nResponse:")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answer": 3}, '"answer" is not a text but int'),
        ({"question": " ", "answer": "b"}, '"question" is empty'),
        ({"question": "a", "answers": []}, '"answers" must be a list of texts'),
        ({"question": "a", "answers": ["b", ""]}, r'"answers"\[1\] is empty'),
        ({"question": "a", "choices": ["b"], "answer": "b"}, '"choices" must be 2 to 26 texts, not 1'),
        ({"question": "a", "choices": ["b", "B "], "answer": "b"}, '"choices" has one text twice'),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, 'the places of "choices" are 0 to 1'),
        ({"question": "a", "choices": ["b", "c"], "answer": "d"}, '"answer" is \'d\', none of "choices"'),
    ],
)
def test_a_bad_row_of_the_plain_form_is_named_by_its_field(tmp_path, row, says):
    with pytest.raises(BadDataError, match=says):
        load_instruct(write(tmp_path, [{"question": "a", "answer": "b"}, row]), None)


def test_a_share_held_out_is_whole_pictures_never_trained_on_and_stays_when_rows_are_added(tmp_path):
    rows = [{"image": f"{i % 40}.png", "question": f"What is {i}?", "answer": str(i)} for i in range(120)] + [
        {"question": f"And {i}?", "answer": "no"} for i in range(40)
    ]
    fields = {"sources": (write(tmp_path, rows),), "eval_share": 0.25}
    train, test = (loaded(tmp_path, name, **fields) for name in ("train", "test"))
    ids = [{sample.id for sample in split.samples} for split in (train, test)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 160
    assert not set(train.images.ids) & set(test.images.ids)
    assert 20 < len(test) < 60 and (train.task, test.task) == ("answers", "answers")
    assert train.images.contents() != test.images.contents() != ""
    more = loaded(tmp_path, sources=(write(tmp_path, [*rows, {"question": "New?", "answer": "yes"}]),), eval_share=0.25)
    assert ids[1] <= {sample.id for sample in more.samples}
    wider = loaded(tmp_path, sources=fields["sources"], eval_share=0.5)
    assert ids[1] < {sample.id for sample in wider.samples}
    other = loaded(tmp_path, sources=fields["sources"], eval_share=0.25, eval_seed=1)
    assert {sample.id for sample in other.samples} != ids[1]
    with pytest.raises(ValueError, match=r"eval_share=0\.001 with eval_seed=0 leaves nothing on one side"):
        loaded(tmp_path, sources=fields["sources"], eval_share=0.001)


def test_a_share_of_ones_own_photos_is_held_out_with_all_captions_of_each(tmp_path):
    pictures = [{"id": i, "file_name": f"{i}.png"} for i in range(40)]
    captions = [{"id": i, "image_id": i // 3, "caption": f"picture {i}"} for i in range(120)]
    for picture in pictures:
        Image.new("RGB", (8, 8)).save(tmp_path / picture["file_name"])
    (tmp_path / "captions.json").write_text(json.dumps({"images": pictures, "annotations": captions}))

    def split(name, **fields):
        data = Data(kind="coco", annotations=str(tmp_path / "captions.json"), images=str(tmp_path), **fields)
        return COCO.load(data, COCO.settings(data), name, tmp_path)

    (train, none), (test, _), (whole, _) = split("train", eval_share=0.2), split("test", eval_share=0.2), split("test")
    assert (train.name, test.name, len(whole), none) == ("train", "test", 120, ())
    assert not set(train.images.ids) & set(test.images.ids) and len(train.images) + len(test.images) == 40
    assert all(len(test.references[image]) == 3 for image in test.images.ids) and 0 < len(test.images) < 20
    assert split("test", eval_share=0.2, eval_annotations=str(tmp_path / "captions.json"))[0].samples == whole.samples
    with pytest.raises(ConfigError, match=r"eval_share is 1\.5"):
        split("train", eval_share=1.5)


def test_eval_sources_are_scored_and_not_trained_on_and_each_task_asks_for_what_it_needs(tmp_path):
    train = write(tmp_path, [{"question": "a", "answer": "b"}])
    test = write(tmp_path, [{"question": "c", "answer": "d"}], "test.jsonl")
    fields = {"sources": (train,), "eval_sources": (test,)}
    assert [s.id for s in loaded(tmp_path, "train", **fields).samples] == ["rows/0/0"]
    assert [s.id for s in loaded(tmp_path, "val", **fields).samples] == ["test/0/0"]
    for task, says in (("vqa", "test/0/0: has 1 answers, .*10 people"), ("choices", 'test/0/0: has no "choices"')):
        with pytest.raises(ValueError, match=says):
            loaded(tmp_path, **fields, eval_task=task)
    for changed, says in (
        ({"eval_task": "vga"}, "'vga', none of answers, vqa, choices, descriptions"),
        ({"eval_share": 1.0}, "eval_share is 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            loaded(tmp_path, **fields, **changed)
    assert loaded(tmp_path, sources=(train,)) is None
    # A run that held out a share may be scored on a file: what it trained on stays.
    more = write(tmp_path, [{"question": f"q{i}", "answer": "b"} for i in range(40)])
    held = {"sources": (more,), "eval_share": 0.5}
    on_file = held | {"eval_sources": (test,)}
    assert [s.id for s in loaded(tmp_path, **on_file).samples] == ["test/0/0"]
    assert loaded(tmp_path, "train", **on_file).fingerprint() == loaded(tmp_path, "train", **held).fingerprint()


def test_each_task_scores_its_texts_with_an_interval_and_the_page_marks_them(tmp_path):
    people = [["red"] * 3 + ["blue"] * 7, ["two"] * 10, ["a"] * 10]
    rows = [{"question": f"q{i}", "answers": list(said)} for i, said in enumerate(people)]
    split = loaded(tmp_path, sources=(write(tmp_path, rows),), eval_sources=(str(tmp_path / "rows.jsonl"),))
    said = dict(zip([s.id for s in split.samples], ["Red", "2", "b"], strict=True))
    for name, key, value in (("answers", "exact_match", 1 / 3), ("vqa", "vqa_accuracy", 1.9 / 3)):
        task = TASKS[name]
        found = measured(task, task.ask(split), said)
        assert found.scores == {key: pytest.approx(value, abs=1e-6)}
        scores = with_intervals(task, found)
        assert 0 <= scores[f"{key}_low"] < scores[key] < scores[f"{key}_high"] <= 1
        marks = [task.read(item, Predictions(said)).right for item in task.items(split)]
        assert marks == ([True, False, False] if name == "answers" else [True, True, False])


def test_scores_of_another_split_are_told_from_the_arms_own(tmp_path):
    one, other = (
        loaded(tmp_path, eval_sources=(write(tmp_path, [{"question": q, "answer": "b"}], f"{q}.jsonl"),)) for q in "ac"
    )
    assert not is_other_split(tmp_path, one)  # nothing is scored yet
    notes = {"decoding": f"greedy, at most 6 tokens; 1 questions {one.fingerprint()[:8]}"}
    (tmp_path / "scores_test.json").write_text(json.dumps({"greedy": {"exact_match": 1.0, "notes": notes}}))
    assert not is_other_split(tmp_path, one) and is_other_split(tmp_path, other)


def test_a_choice_is_read_by_its_text_or_letter_and_the_page_marks_it(tmp_path):
    for text, place in (("(B) red", 1), ("B", 1), ("b", None), ("Blue", 0), ("red.", 1), ("C", None), ("Both", None)):
        assert read_choice(text, ("blue", "red")) == place, text
    rows = [{"question": f"q{i}", "choices": ["blue", "red"], "answer": i % 2} for i in range(4)]
    split = loaded(tmp_path, eval_sources=(write(tmp_path, rows),), eval_task="choices")
    task = task_of(split)
    outputs = dict(zip([s.id for s in split.samples], ["blue", "B", "what", "(A)"], strict=True))
    chosen = {key: read_choice(text, split.choices[key]) for key, text in outputs.items()}
    assert score_choices(task.ask(split), chosen).scores == {"choice_accuracy": 0.5, "unparsed": 0.25}
    read = Predictions(outputs, {"rows/0/0": 0, "rows/1/0": 1, "rows/2/0": -1, "rows/3/0": 0})
    assert [task.read(item, read) for item in task.items(split)] == [
        ("(A)", True),
        ("(B)", True),
        (None, False),
        ("(A)", False),
    ]


def test_the_interval_of_a_share_is_the_binomials():
    right = np.random.default_rng(0).random(400) < 0.7
    low, high = intervals.bounds(metric_of("exact_match"), [[int(one), 1] for one in right])
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low == pytest.approx(right.mean() - half, abs=0.006) and high == pytest.approx(
        right.mean() + half, abs=0.006
    )
    assert intervals.bounds(metric_of("exact_match"), [[0, 0]]) is None


def test_a_split_of_a_run_is_what_the_config_names(tmp_path):
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(3)]
    data = Data(kind="instruct", sources=(write(tmp_path, rows),), scored="train", cache=str(tmp_path))
    config = Config(data=data)
    assert len(load_split(config, "test", tmp_path)) == 3  # what was trained on, as a test of memory
    assert with_intervals(TASKS["captions"], Scored({"nll": 1.0}, {"nll": [[1.0, 1]]})) == {"nll": 1.0}

"""Claims about reading ScienceQA: the official layout, one sample a problem, and every bad item named or dropped."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.scienceqa import Problem, load_scienceqa, prompt, qa_split
from eim_jax.data.datasets.scienceqa_files import read_object, read_problems
from eim_jax.data.samples import DrawnImages

FIRE = Problem(id="7", question="Is it warm?", choices=("no", "yes"), answer=1, caption="a fire")


def images(*ids):
    return DrawnImages(ids, lambda row: Image.new("RGB", (2, 2), (row, 0, 0)), ids)


def test_a_samples_row_is_its_problems_image_and_its_caption_the_machines_or_the_question():
    shown = dataclasses.replace(FIRE, id="8", image="pic")
    silent = dataclasses.replace(shown, id="9", caption="")
    split = qa_split("val", [FIRE, silent, shown], images("other", "pic"), "CQM-A", use_caption=True)
    assert [s.image for s in split.samples] == [None, 1, 1] and list(split.problems) == ["7", "9", "8"]
    assert [s.caption for s in split.samples] == ["a fire", "Is it warm?", "a fire"]
    for sample in split.samples:
        assert (sample.instruction, sample.response) == prompt(split.problems[sample.id], "CQM-A", True)
    with pytest.raises(ValueError, match="problem 8: image: 'pic' is not among the images"):
        qa_split("val", [shown], images("other"))
    with pytest.raises(ValueError, match="sample id '7' occurs more than once"):
        qa_split("val", [FIRE, FIRE], images())


def record(split, image=None, **fields):
    full = {"question": "Which?", "choices": ["x", "y", "z"], "answer": 2, "hint": "", "image": image, "task": "closed"}
    full |= {"grade": "grade2", "subject": "social science", "topic": "maps", "category": "c", "skill": "s"}
    return full | {"lecture": "L.", "solution": "S.", "split": split} | fields


class Root:
    """A small ScienceQA folder: ids 1-3 train, 4-5 val; 1, 3 and 5 have images."""

    def __init__(self, path, images="images"):
        self.path, self.images = path, path / images
        self.problems = {
            str(i): record("train" if i < 4 else "val", "image.png" if i % 2 else None) for i in range(1, 6)
        }
        self.splits = {"train": ["3", "1", "2"], "val": ["4", "5"], "minitrain": ["1"]}
        self.splits["trainval"] = self.splits["train"] + self.splits["val"]
        self.captions = {"1": "one", "3": " three ", "5": "five"}
        for i in (1, 3, 5):
            file = self.picture(i)
            file.parent.mkdir(parents=True)
            Image.new("RGB", (4, 3), (i, 0, 0)).save(file)

    def picture(self, i):
        return self.images / self.problems[str(i)]["split"] / str(i) / "image.png"

    def write(self):
        for name, content in (("problems", self.problems), ("pid_splits", self.splits)):
            (self.path / f"{name}.json").write_text(json.dumps(content))
        if self.captions is not None:
            (self.path / "captions.json").write_text(json.dumps({"model": "m", "captions": self.captions}))
        return self.path


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


@pytest.mark.parametrize("place", ["images", "."])
def test_problems_come_in_the_splits_order_with_their_own_pictures(tmp_path, place):
    split, report = load_scienceqa(Root(tmp_path, place).write(), "train")
    assert report.bad == () and str(report) == "no bad items" and split.name == "train"
    assert [s.id for s in split.samples] == ["3", "1", "2"]
    assert [s.caption for s in split.samples] == ["three", "one", "Which?"]
    assert split.images.ids == ["train/3/image.png", "train/1/image.png"]
    assert [s.image for s in split.samples] == [0, 1, None]
    for row, red in enumerate((3, 1)):
        assert np.asarray(split.images[row])[0, 0].tolist() == [red, 0, 0]
    known = record("train", "image.png") | {"image": "train/1/image.png", "choices": ("x", "y", "z"), "caption": "one"}
    del known["task"], known["split"]
    assert dataclasses.asdict(split.problems["1"]) == known | {"id": "1"}


def test_both_places_of_the_images_give_one_fingerprint(tmp_path):
    found = []
    for name, place in (("a", "images"), ("b", ".")):
        (tmp_path / name).mkdir()
        found.append(load_scienceqa(Root(tmp_path / name, place).write(), "train").split.fingerprint())
    assert found[0] == found[1]


def test_a_mixed_split_finds_each_picture_in_its_own_splits_folder(root):
    expected = ["train/3/image.png", "train/1/image.png", "val/5/image.png"]
    assert load_scienceqa(root.write(), "trainval").split.images.ids == expected
    for problem in root.problems.values():
        del problem["split"]  # then pid_splits.json tells
    assert load_scienceqa(root.write(), "trainval").split.images.ids == expected
    assert load_scienceqa(root.write(), "minitrain").split.images.ids == expected[1:2]


def test_optional_fields_may_be_missing_or_null(root):
    optional = ["hint", "image", "subject", "grade", "topic", "category", "skill", "lecture", "solution"]
    root.problems["2"] = {"question": "Which?", "choices": ["x", "y"], "answer": 0}
    root.problems["4"] = root.problems["2"] | dict.fromkeys(optional)
    train, val = (load_scienceqa(root.write(), name).split.problems for name in ("train", "val"))
    for problem in (train["2"], val["4"]):
        assert (problem.hint, problem.lecture, problem.solution, problem.caption) == ("", "", "", "")
        assert {getattr(problem, name) for name in optional[1:7]} == {None}


def test_captions_are_optional_until_they_are_asked_for_and_their_lack_is_said(root):
    del root.captions["3"]
    split, report = load_scienceqa(root.write(), "train", use_caption=True)
    assert "1 of 2 images without a machine caption (captions.json has none)" in str(report)
    assert [s.caption for s in split.samples] == ["Which?", "one", "Which?"]
    assert [s.instruction.split("\n")[1] for s in split.samples] == ["Context: N/A", "Context: one", "Context: N/A"]
    (root.path / "captions.json").unlink()
    split, report = load_scienceqa(root.path, "train")
    assert "2 of 2 images without a machine caption (there is no captions.json)" in str(report)
    assert {s.caption for s in split.samples} == {"Which?"}
    with pytest.raises(FileNotFoundError, match=r"captions\.json, which use_caption needs"):
        load_scienceqa(root.path, "train", use_caption=True)


def damage_no_question(root):
    del root.problems["1"]["question"]
    return "problem 1 (problems.json): question: missing", {"1"}


def damage_no_choices_nor_answer(root):
    root.problems["1"]["choices"] = None
    del root.problems["1"]["answer"]
    return "problem 1 (problems.json): choices, answer: missing", {"1"}


def damage_empty_question(root):
    root.problems["1"]["question"] = " \n"
    return "problem 1 (problems.json): question: the text is empty", {"1"}


def damage_question_type(root):
    root.problems["1"]["question"] = 5
    return "problem 1 (problems.json): question: needs a text, not 5", {"1"}


def damage_half_a_character(root):
    root.problems["1"]["lecture"] = "ab\ud83d"
    return "problem 1 (problems.json): lecture: holds half a character, '\\ud83d', at 2", {"1"}


def damage_one_choice(root):
    root.problems["1"] |= {"choices": ["x"], "answer": 0}
    return "problem 1 (problems.json): choices: 1, needs 2 to 26", {"1"}


def damage_choices_type(root):
    root.problems["1"]["choices"] = "xyz"
    return 'problem 1 (problems.json): choices: needs a list of texts, not "xyz"', {"1"}


def damage_choice_type(root):
    root.problems["1"]["choices"][1] = None
    return "problem 1 (problems.json): choices[1]: needs a text, not null", {"1"}


def damage_answer_above(root):
    root.problems["2"]["answer"] = 3
    return "problem 2 (problems.json): answer: 3 is the index of no choice, needs 0 to 2", {"2"}


def damage_answer_below(root):
    root.problems["2"]["answer"] = -1
    return "problem 2 (problems.json): answer: -1 is the index of no choice", {"2"}


def damage_answer_letter(root):
    root.problems["2"]["answer"] = "C"
    return 'problem 2 (problems.json): answer: needs the index of a choice, not "C"', {"2"}


def damage_answer_bool(root):
    root.problems["2"]["answer"] = True
    return "problem 2 (problems.json): answer: needs the index of a choice, not true", {"2"}


def damage_grade_type(root):
    root.problems["2"]["grade"] = 3
    return "problem 2 (problems.json): grade: needs a text, not 3", {"2"}


def damage_record_type(root):
    root.problems["2"] = ["x"]
    return 'problem 2 (problems.json): needs an object of fields, not ["x"]', {"2"}


def damage_caption_type(root):
    root.captions["3"] = ["three"]
    return 'problem 3 (captions.json): captions: needs a text, not ["three"]', {"3"}


def damage_unknown_id(root):
    root.splits["train"].append("77")
    return "problem 77 (pid_splits.json train[3]): problems.json has no such id", set()


def damage_id_twice(root):
    root.splits["train"].append("3")
    return "problem 3 (pid_splits.json train[3]): the id is listed twice", set()


def damage_id_type(root):
    root.splits["train"].append(None)
    return "problem None (pid_splits.json train[3]): an id is a text", set()


def damage_no_picture(root):
    root.picture(3).unlink()
    return f"image 3 (train/3/image.png): no such file: {root.picture(3)}", {"3"}


def damage_picture(root):
    root.picture(3).write_bytes(root.picture(3).read_bytes()[:40])
    return "image 3 (train/3/image.png): ", {"3"}


def damage_picture_is_a_page(root):
    root.picture(3).write_text("<html>404</html>")
    return "image 3 (train/3/image.png): not a picture in a known format", {"3"}


def damage_image_type(root):
    root.problems["3"]["image"] = True
    return "problem 3 (problems.json): image: needs a text, not true", {"3"}


def damage_homeless(root):
    del root.problems["3"]["split"]
    root.splits["mine"] = root.splits.pop("train")
    return "problem 3 (problems.json): split: missing, and no pid_splits.json list of train, val, test has it", {"3"}


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_every_kind_of_bad_item_is_named_or_dropped(root, damage):
    expected, lost = damage(root)
    name = "mine" if "mine" in root.splits else "train"
    with pytest.raises(BadDataError) as caught:
        load_scienceqa(root.write(), name)
    assert expected in str(caught.value) and str(root.path) in str(caught.value) and "'drop'" in str(caught.value)
    assert len(caught.value.bad) == 1

    split, report = load_scienceqa(root.path, name, on_bad="drop")
    kept = [i for i in ("3", "1", "2") if i not in lost]
    assert [s.id for s in split.samples] == list(split.problems) == kept
    assert split.images.ids == [f"train/{i}/image.png" for i in kept if i != "2"]
    assert expected in str(report) and report.dropped_problems == len(root.splits[name]) - len(kept)
    assert report.dropped_images == ("image 3 (" in expected)


def test_several_faults_are_all_listed_and_nothing_left_is_an_error(root):
    for damage in (damage_no_question, damage_answer_above, damage_no_picture):
        damage(root)
    with pytest.raises(BadDataError) as caught:
        load_scienceqa(root.write(), "train")
    assert [(item.kind, item.id) for item in caught.value.bad] == [("problem", "1"), ("problem", "2"), ("image", "3")]
    with pytest.raises(ValueError, match="no problems of split 'train' are left; 3 bad items"):
        load_scienceqa(root.path, "train", on_bad="drop")


def test_problems_alone_need_neither_pictures_nor_captions(root):
    root.picture(3).unlink()
    root.captions["3"] = 5
    assert list(read_problems(root.write(), "train")) == ["3", "1", "2"]
    damage_answer_above(root)
    with pytest.raises(BadDataError, match=r"problem 2 \(problems.json\): answer"):
        read_problems(root.write(), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", r"is not UTF-8 text \(byte 0\)"),
        (b"{", "cannot be read as JSON"),
        (b"[]", "holds a JSON list, not an object"),
        (b'{"1": {"a": 1, "a": 2}}', "cannot be read as JSON: the key 'a' stands twice"),
    ],
)
@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "captions.json"])
def test_a_file_that_cannot_be_read_is_named(root, name, content, message):
    (root.write() / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} {message}"):
        load_scienceqa(root.path, "train")


def test_files_of_another_form_are_refused(root):
    root.splits |= {"empty": [], "text": "1"}
    for name in ("empty", "text"):
        with pytest.raises(ValueError, match=rf"pid_splits\.json: '{name}' needs a list of at least one"):
            load_scienceqa(root.write(), name)
    (root.path / "captions.json").write_text('{"1": "one"}')
    with pytest.raises(ValueError, match=r'captions\.json: needs an object "captions"'):
        load_scienceqa(root.path, "train")


def test_wrong_names_and_options_are_named(root):
    with pytest.raises(ValueError, match=r"split 'dev': .*pid_splits\.json has train, val, minitrain, trainval"):
        load_scienceqa(root.write(), "dev")
    with pytest.raises(ValueError, match="form 'QCM': a form is written input-output"):
        load_scienceqa(root.path, "train", form="QCM")
    with pytest.raises(ValueError, match="on_bad is 'skip'"):
        load_scienceqa(root.path, "train", on_bad="skip")
    for name in ("pid_splits.json", "problems.json"):
        (root.path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"no file .*{name}: ScienceQA's"):
            load_scienceqa(root.path, "train")


def test_ids_may_be_numbers_and_files_may_start_with_a_byte_order_mark(root):
    root.splits["train"] = [3, 1, 2]
    (root.write() / "problems.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(root.problems).encode())
    assert [s.id for s in load_scienceqa(root.path, "train").split.samples] == ["3", "1", "2"]
    assert read_object(root.path / "problems.json", "problems") == root.problems


def test_a_second_start_remembers_the_good_pictures(root, tmp_path, monkeypatch):
    load_scienceqa(root.write(), "train", cache=tmp_path / "cache")
    opened = []
    monkeypatch.setattr("eim_jax.data.image_checks.file_problem", lambda path: opened.append(path.parent.name))
    Image.new("RGB", (9, 9)).save(root.picture(1))
    load_scienceqa(root.path, "train", cache=tmp_path / "cache")
    assert opened == ["1"]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_real_problems_read_as_their_folder_says(shared_data, name):
    folder = shared_data("scienceqa_mini")
    problems = json.loads((folder / "problems.json").read_text())
    captions = json.loads((folder / "captions.json").read_text())["captions"]
    ids = json.loads((folder / "pid_splits.json").read_text())[name]
    split, report = load_scienceqa(folder, name)
    assert report.bad == () and report.notes == () and [s.id for s in split.samples] == ids
    for sample in split.samples:
        row = problems[sample.id]
        options = "".join(f" ({letter}) {choice}" for letter, choice in zip("ABCDE", row["choices"], strict=False))
        text = f"Question: {row['question']}\nContext: {row['hint'] or 'N/A'}\nOptions:{options}\nResponse:"
        why = (row["lecture"] + " " + row["solution"]).strip().replace("\n", "\\n")
        said = f"The answer is {'ABCDE'[row['answer']]}." + (f" BECAUSE: {why}" if why else "")
        assert sample.instruction == re.sub(" +", " ", text) and sample.response == re.sub(" +", " ", said)
        assert "\n" not in sample.response and "  " not in sample.instruction + sample.response
        assert sample.caption == captions.get(sample.id, row["question"])
        assert (sample.image is None) == (row["image"] is None)
        if sample.image is not None:
            with Image.open(folder / name / sample.id / "image.png") as picture:
                assert picture.size == split.images[sample.image].size
    assert len(split.images) == sum(problems[i]["image"] is not None for i in ids)

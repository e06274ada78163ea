"""Claims about MME: the official layout is read whole, and scores are those of the published rules."""

import json
import random
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.mme import COGNITION, PERCEPTION, TASKS, Question, YesNoSplit, load_mme, yes_no_split
from eim_jax.data.samples import DrawnImages
from eim_jax.evaluation.metrics import mme
from eim_jax.evaluation.metrics.mme import Result, read, read_answer, score, write_results

PAIR = "Is it  red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(path)


def add(root, task, image, text=PAIR, apart=False):
    """An image and its txt in the release's layout: side by side, or in two folders."""
    stem = image.rpartition(".")[0]
    photo(root / task / ("images" if apart else "") / image, seed=len(stem))
    texts = root / task / ("questions_answers_YN" if apart else "")
    texts.mkdir(exist_ok=True)
    (texts / f"{stem}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def release(tmp_path):
    root = tmp_path / "MME"
    add(root, "OCR", "0002.jpg")
    add(root, "OCR", "0001.PNG", "Q1\tNo\r\n\r\n Q2 \t yes \n\n")
    add(root, "celebrity", "tt01.jpg", apart=True)
    add(root, "code_reasoning", "0001.png")
    return root


def test_both_layouts_are_read_in_the_official_order(release):
    (release / "eval_tool").mkdir()
    (release / ".cache").mkdir()
    (release / "README.md").write_text("x")
    split, report = load_mme(release)
    assert [(s.id, split.images.ids[s.image], s.instruction, s.response) for s in split.samples] == [
        ("celebrity/tt01.jpg/0", "celebrity/tt01.jpg", f"Instruction: {PAIR[:36]}\nResponse:", "Yes"),
        ("celebrity/tt01.jpg/1", "celebrity/tt01.jpg", f"Instruction: {PAIR[41:77]}\nResponse:", "No"),
        ("OCR/0001.PNG/0", "OCR/0001.PNG", "Instruction: Q1\nResponse:", "No"),
        ("OCR/0001.PNG/1", "OCR/0001.PNG", "Instruction: Q2\nResponse:", "Yes"),
        ("OCR/0002.jpg/0", "OCR/0002.jpg", f"Instruction: {PAIR[:36]}\nResponse:", "Yes"),
        ("OCR/0002.jpg/1", "OCR/0002.jpg", f"Instruction: {PAIR[41:77]}\nResponse:", "No"),
        ("code_reasoning/0001.png/0", "code_reasoning/0001.png", f"Instruction: {PAIR[:36]}\nResponse:", "Yes"),
        ("code_reasoning/0001.png/1", "code_reasoning/0001.png", f"Instruction: {PAIR[41:77]}\nResponse:", "No"),
    ]
    assert split.questions["OCR/0001.PNG/1"] == Question("OCR", "0001.PNG", "Q2", "Yes")
    assert list(split.questions) == [s.id for s in split.samples]
    assert split.images.names[0] == "celebrity/images/tt01.jpg"
    assert np.asarray(split.images[0]).shape == (12, 16, 3)
    assert report.bad == () and report.notes[0] == "celebrity: 1 images, the release has 170"
    assert report.notes[-1].startswith("missing subtasks: existence, count, ") and "OCR" not in report.notes[-1]


def test_images_without_questions_are_noted(release):
    photo(release / "OCR" / "0003.jpg")
    assert "OCR: 1 images have no questions and are not used: 0003.jpg" in load_mme(release).report.notes


BAD_TEXTS = {
    "one": ("Q\tYes\n", "line 2: the file ends after 1 of two questions"),
    "none": ("\n", "line 2: the file ends after 0 of two questions"),
    "three": (f"{PAIR}\nQ\tYes", "line 4: a third question"),
    "both_yes": ("Q\tYes\nR\tYes\n", "line 2: both answers are Yes"),
    "no_tab": ("Q Yes\nR\tNo\n", "line 1: needs"),
    "two_tabs": ("Q\tYes\nR\tNo\tx\n", "line 2: needs"),
    "other_answer": ("Q\tYes\nR\tMaybe\n", "line 2: needs"),
    "no_question": ("\tYes\nR\tNo\n", "line 1: needs"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_malformed_txt_is_named_with_its_line_or_dropped(release, kind):
    text, message = BAD_TEXTS[kind]
    (release / "celebrity/questions_answers_YN/tt01.txt").write_text(text)
    with pytest.raises(BadDataError) as caught:
        load_mme(release)
    assert f"questions celebrity/tt01 (celebrity/questions_answers_YN/tt01.txt): {message}" in str(caught.value)
    split, report = load_mme(release, on_bad="drop")
    assert len(split) == 6 and len(split.images) == 3 and report.dropped_images == 1
    assert report.bad == caught.value.bad and message in str(report)


def test_a_txt_in_another_encoding_is_named(release):
    (release / "OCR/0002.txt").write_bytes("Café?\tYes\n".encode("latin-1"))
    with pytest.raises(BadDataError, match=r"OCR/0002\.txt\): is not UTF-8 text \(byte 3\)"):
        load_mme(release)


def test_bad_images_are_all_named_and_dropped_with_both_questions(release):
    (release / "OCR/0002.jpg").write_bytes(b"")
    (release / "code_reasoning/0001.png").unlink()
    photo(release / "celebrity/images/tt01.png")
    with pytest.raises(BadDataError) as caught:
        load_mme(release)
    for message in (
        "image OCR/0002.jpg (OCR/0002.jpg): the file is empty",
        "image code_reasoning/0001 (code_reasoning/0001.txt): no such file",
        "image celebrity/tt01 (celebrity/questions_answers_YN/tt01.txt): more than one image",
    ):
        assert message in str(caught.value)
    split, report = load_mme(release, on_bad="drop")
    assert [s.id for s in split.samples] == ["OCR/0001.PNG/0", "OCR/0001.PNG/1"] and split.images.ids == [
        "OCR/0001.PNG"
    ]
    assert report.dropped_images == 3


def test_wrong_folders_are_refused_by_name(release, tmp_path):
    with pytest.raises(FileNotFoundError, match="no MME folder"):
        load_mme(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'MME' is no subtask of MME.*existence, count"):
        load_mme(tmp_path)
    with pytest.raises(ValueError, match="on_bad is 'skip'"):
        load_mme(release, on_bad="skip")
    (release / "colour").mkdir()
    with pytest.raises(ValueError, match="'colour' is no subtask of MME"):
        load_mme(release)
    (release / "colour").rename(release / "color")
    with pytest.raises(ValueError, match=r"color has no \.txt"):
        load_mme(release)
    (release / "color/images").mkdir()
    with pytest.raises(ValueError, match="color has images/ alone"):
        load_mme(release)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no subtask of MME is there"):
        load_mme(tmp_path / "empty")


def test_a_release_of_bad_items_alone_is_refused(tmp_path):
    add(tmp_path, "OCR", "1.png", "Q\tYes\n")
    with pytest.raises(ValueError, match="no questions are left; 1 bad items"):
        load_mme(tmp_path, on_bad="drop")


def synthetic(images_of, seed=0):
    """A YesNoSplit without picture files: {subtask: images}."""
    dice = random.Random(seed)
    questions = []
    for task, count in images_of.items():
        for number in range(count):
            pair = [
                Question(task, f"{number:04}.jpg", f"Q{task}{k}?", answer) for k, answer in enumerate(("Yes", "No"))
            ]
            dice.shuffle(pair)
            questions += pair
    ids = list(dict.fromkeys(f"{q.task}/{q.image}" for q in questions))
    return yes_no_split("test", questions, DrawnImages(ids, lambda row: Image.new("RGB", (4, 4)), ids))


def test_a_split_needs_one_yes_and_one_no_for_each_image():
    images = DrawnImages(["OCR/1"], lambda row: Image.new("RGB", (4, 4)), ["1"])
    yes, no = Question("OCR", "1", "Q", "Yes"), Question("OCR", "1", "R", "No")
    assert isinstance(yes_no_split("x", [yes, no], images), YesNoSplit)
    for questions in ([yes], [yes, yes], [yes, no, no], [yes, Question("OCR", "1", "R", "no")]):
        with pytest.raises(ValueError, match=r"OCR/1 are .*each image needs one Yes, one No"):
            yes_no_split("x", questions, images)
    with pytest.raises(ValueError, match="the image OCR/2, which is not there"):
        yes_no_split("x", [Question("OCR", "2", "Q", "Yes")], images)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("Yes.", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("  no", "no"),
        ("   no", "other"),
        ("not sure", "no"),
        ("Unknown", "other"),
        ("know", "no"),
        ("nyes", "yes"),
        ("no yes", "no"),
        ("the answer is yes", "other"),
        ("YES, no", "yes"),
        ("", "other"),
        ("\n\nno", "no"),
        ("\r\n\tno", "other"),
        ("ye s", "other"),
        ("n o", "other"),
        ("İno", "no"),
        ("İ yes", "other"),
    ],
)
def test_a_response_is_read_to_the_character_as_the_official_tool_reads_it(response, expected):
    assert read_answer(response) == expected


def published(folder):
    """The published rules in exact fractions, from the files' lines: {subtask: (acc, acc+, others)}."""
    found = {}
    for file in folder.iterdir():
        with open(file, encoding="utf-8") as stream:
            lines = stream.readlines()
        questions = right = both = others = 0
        for first, second in zip(lines[0::2], lines[1::2], strict=True):
            good = 0
            for line in (first, second):
                _, _, truth, said = line.split("\t")
                said = said.lower()
                label = "other"
                for end in range(5):  # a word inside the first four characters; "yes" goes before "no"
                    if said[:end].endswith("no"):
                        label = "no"
                for end in range(5):
                    if said[:end].endswith("yes"):
                        label = "yes"
                questions += 1
                others += label == "other"
                good += label == truth.lower()
            right += good
            both += good == 2
        found[file.stem] = Fraction(right, questions), Fraction(both, questions // 2), others
    return found


# The line feed at the end of a file's line is one more character, which can complete no word.
PIECES = [
    "yes",
    "no",
    "Yes",
    "NO",
    "y",
    "n",
    "o",
    "e",
    "s",
    " ",
    "\t",
    "\n",
    "\r",
    ".",
    "\u2028",
    "\x0b",
    "\x85",
    "İ",
    "é",
]


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_written_files_are_the_published_ones_for_any_response(tmp_path, seed):
    dice = random.Random(seed)
    split = synthetic({task: dice.randint(1, 12) for task in TASKS}, seed)
    answers = {}
    for identifier, question in split.questions.items():
        noise = "".join(dice.choices(PIECES, k=dice.randint(0, 4)))
        answers[identifier] = dice.choice([question.answer, noise, noise, f"{question.answer}, I think.\nSure."])
    write_results(tmp_path, split, answers)
    scores = score(read(tmp_path))
    expected = published(tmp_path)
    assert set(expected) == set(TASKS) == set(scores["tasks"])
    for task, (acc, plus, others) in expected.items():
        got = scores["tasks"][task]
        assert (got["acc"], got["acc_plus"], got["other"]) == (float(acc), float(plus), others)
        assert got["score"] == pytest.approx(float(100 * acc + 100 * plus), abs=1e-9)
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION), ("total", TASKS)):
        assert scores[name] == pytest.approx(float(sum(100 * sum(expected[task][:2]) for task in group)), abs=1e-9)
        assert scores["partial"][name] == pytest.approx(scores[name])
    raw = {task: [] for task in TASKS}  # as generated, without a file between
    for identifier, question in split.questions.items():
        raw[question.task].append(Result(question.image, question.question, question.answer, answers[identifier]))
    assert score(raw) == scores


def test_two_images_scored_by_hand():
    lines = [Result("a", "Q", "yes", "Yes."), Result("a", "R", "no", "no way")]
    lines += [Result("b", "Q", "yes", "not sure"), Result("b", "R", "no", "not sure")]
    scores = score({"count": lines, "text_translation": [Result("a", "Q", "yes", "I say yes")] * 2})
    assert scores["tasks"]["count"] == {
        "acc": 0.75,
        "acc_plus": 0.5,
        "score": 125.0,
        "images": 2,
        "questions": 4,
        "other": 0,
    }
    assert scores["tasks"]["text_translation"]["score"] == 0.0 and scores["other"] == 2
    assert scores["partial"] == {"perception": 125.0, "cognition": 0.0, "total": 125.0}
    assert scores["perception"] is scores["cognition"] is scores["total"] is None
    assert len(scores["missing"]) == 12 and "existence" in scores["notes"]["missing"]
    assert scores["notes"]["count"] == "2 images, the release has 30"


def test_a_perfect_run_of_the_whole_release_scores_2800(tmp_path):
    split = synthetic(TASKS)
    assert len(split) == 2374  # the published number of questions
    write_results(tmp_path, split, {identifier: q.answer for identifier, q in split.questions.items()})
    scores = score(read(tmp_path))
    assert (scores["perception"], scores["cognition"], scores["total"]) == (2000.0, 800.0, 2800.0)
    assert scores["notes"] == {} and scores["missing"] == [] and (scores["images"], scores["questions"]) == (1187, 2374)


def test_the_file_is_the_official_one_to_the_byte_and_the_questions_of_an_image_stand_together(tmp_path):
    questions = [Question("OCR", image, f"Is {image}?", "Yes") for image in "ab"]
    questions += [Question("OCR", image, f"Is not {image}?", "No") for image in "ab"]
    images = DrawnImages(["OCR/a", "OCR/b"], lambda row: Image.new("RGB", (4, 4)), ["a", "b"])
    split = yes_no_split("x", questions, images)
    answers = {"OCR/a/0": "Yes", "OCR/a/1": "no\tno\r\nyés", "OCR/b/0": "", "OCR/b/1": "\nno"}
    write_results(tmp_path / "new" / "folder", split, answers)
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name == "OCR.txt"
    expected = "a\tIs a?\tYes\tYes\na\tIs not a?\tNo\tno no  yés\nb\tIs b?\tYes\t\nb\tIs not b?\tNo\t no\n"
    assert file.read_bytes() == expected.encode()


def test_responses_must_match_the_questions(tmp_path):
    split = synthetic({"OCR": 1})
    answers = {identifier: "yes" for identifier in split.questions}
    with pytest.raises(ValueError, match=r"no response for 1 of 2 questions: \['OCR/0000.jpg/1'\]"):
        write_results(tmp_path, split, {"OCR/0000.jpg/0": "yes"})
    with pytest.raises(ValueError, match=r"1 responses to questions that are not in split 'test': \['OCR/x/0'\]"):
        write_results(tmp_path, split, {**answers, "OCR/x/0": "yes"})
    with pytest.raises(ValueError, match=r"the response is not a string for 1 questions: \['OCR/0000.jpg/1'\]"):
        write_results(tmp_path, split, {**answers, "OCR/0000.jpg/1": None})
    assert list(tmp_path.iterdir()) == []


GOOD = "a\tQ\tYes\tyes\na\tR\tNo\tno\n"
BAD_RESULTS = {
    "three_fields": ("a\tQ\tYes\n", "line 1: 3 tab-separated fields, not 4"),
    "tab": (f"{GOOD}b\tQ\tYes\tyes\tor\n", "line 3: 5 tab-separated fields"),
    "newline": ("a\tQ\tYes\tyes\nor\na\tR\tNo\tno\n", "line 2: 1 tab-separated fields"),
    "blank_line": (f"{GOOD}\n{GOOD}", "line 3: 1 tab-separated fields"),
    "answer": ("a\tQ\tYes\tyes\na\tR\tMaybe\tno\n", "line 2: the third field is 'Maybe', not Yes or No"),
    "padded_answer": ("a\tQ\tYes \tyes\na\tR\tNo\tno\n", "line 1: the third field is 'Yes ', not Yes or No"),
    "other_image": ("a\tQ\tYes\tyes\nb\tR\tNo\tno\n", "line 2: image 'b' after 'a'"),
    "again": (GOOD * 2, "line 3: image 'a' stands in the file before"),
    "odd": (f"{GOOD}b\tQ\tYes\tyes\n", "line 3: the file ends after 3 lines"),
    "empty": ("", "line 0: the file ends after 0 lines"),
}


@pytest.mark.parametrize("kind", BAD_RESULTS)
def test_a_malformed_result_is_named_by_file_and_line(tmp_path, kind):
    text, message = BAD_RESULTS[kind]
    (tmp_path / "color.txt").write_text(text)
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert str(tmp_path / "color.txt") in str(caught.value) and message in str(caught.value)


def test_folders_without_results_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no result file: it needs existence"):
        read(tmp_path)
    (tmp_path / "colour.txt").write_text(GOOD)
    with pytest.raises(ValueError, match=r"colour\.txt is no subtask of MME"):
        read(tmp_path)
    (tmp_path / "colour.txt").rename(tmp_path / "color.txt")
    (tmp_path / "color.txt").write_bytes(b"a\tQ\tYes\t\xff\n")
    with pytest.raises(ValueError, match=r"color\.txt is not UTF-8 text \(byte 8\)"):
        read(tmp_path)
    for results, message in (
        ({}, "no results to score"),
        ({"colour": [Result("a", "Q", "yes", "yes")] * 2}, "'colour' is no subtask"),
        ({"color": [Result("a", "Q", "yes", "yes")]}, "color: 1 lines, but every image has two"),
        ({"color": []}, "color: 0 lines"),
    ):
        with pytest.raises(ValueError, match=message):
            score(results)


def test_the_command_prints_one_json_object_or_one_error(tmp_path, capsys):
    (tmp_path / "color.txt").write_text(GOOD)
    mme.main(["--results", str(tmp_path)])
    scores = json.loads(capsys.readouterr().out)
    assert scores["tasks"]["color"]["score"] == 200.0 and scores["total"] is None
    assert scores == score(read(tmp_path))
    (tmp_path / "color.txt").write_text("a\n")
    with pytest.raises(SystemExit) as stopped:
        mme.main(["--results", str(tmp_path)])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "color.txt line 1" in err

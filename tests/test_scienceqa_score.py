"""Claims about ScienceQA's accuracies: the official rules by an independent count, and every wrong input named."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from eim_jax.data.datasets.scienceqa import Problem
from eim_jax.data.datasets.scienceqa_files import read_problems
from eim_jax.evaluation.metrics.scienceqa import COLUMNS, as_fractions, load_predictions, read_answer, score
from eim_jax.reporting.scores import interval, notes

SUBJECTS = ("natural science", "social science", "language science")


def problem(identifier, answer=0, choices=3, **fields):
    return Problem(id=identifier, question="Which?", choices=tuple("vwxyz"[:choices]), answer=answer, **fields)


def by_id(*problems):
    return {found.id: found for found in problems}


# Each column by one problem or two; b is in TXT and IMG at once.
SMALL = by_id(
    problem("a", 0, subject=SUBJECTS[0], grade="grade1"),
    problem("b", 1, subject=SUBJECTS[1], grade="grade6", hint="h", image="b.png"),
    problem("c", 2, subject=SUBJECTS[2], grade="grade7", hint="h"),
    problem("d", 0, subject=SUBJECTS[0], grade="grade12", image="d.png"),
)


def official(predictions, problems):
    """The published definition, counted problem by problem."""
    hits, totals = dict.fromkeys(COLUMNS, 0), dict.fromkeys(COLUMNS, 0)
    for name, found in problems.items():
        columns = ["Avg", ("NAT", "SOC", "LAN")[SUBJECTS.index(found.subject)]]
        columns.append("G1-6" if int(found.grade.removeprefix("grade")) <= 6 else "G7-12")
        if found.hint != "":
            columns.append("TXT")
        if found.image is not None:
            columns.append("IMG")
        if found.hint == "" and found.image is None:
            columns.append("NO")
        for column in columns:
            totals[column] += 1
            hits[column] += predictions[name] == found.answer
    return {column: hits[column] / totals[column] * 100 for column in COLUMNS}, totals


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("The answer is B. BECAUSE: x", 2, 1),
        ("The answer is A.", 2, 0),
        ("So it flows. The answer is C.", 3, 2),
        ("The answer is C.", 2, None),  # no such option
        ("The answer is C. The answer is A.", 2, None),  # the first match decides
        ("The answer is A. The answer is B.", 2, 0),
        ("The answer is B, for it is warm", 2, 1),  # the official dot is any character
        ("The answer is B", 2, None),  # and must be there
        ("The answer is B\n", 2, None),  # a line break is none
        ("the answer is B.", 2, None),
        ("The answer is b.", 2, None),
        ("The answer is (B).", 2, None),
        ("B", 2, None),
        ("", 2, None),
        ("The answer is Z.", 26, 25),
    ],
)
def test_an_answer_is_read_by_the_official_pattern(text, choices, expected):
    assert read_answer(text, choices) == expected


def test_every_column_of_a_hand_made_split():
    scores = score({"a": 0, "b": 1, "c": 0, "d": 1}, SMALL)
    expected = {"NAT": 50, "SOC": 100, "LAN": 0, "TXT": 50, "IMG": 50, "NO": 100, "G1-6": 100, "G7-12": 0, "Avg": 50}
    assert {column: scores[column] for column in COLUMNS} == expected and list(scores)[:9] == list(COLUMNS)
    assert scores["counts"] == {
        "NAT": 2,
        "SOC": 1,
        "LAN": 1,
        "TXT": 2,
        "IMG": 2,
        "NO": 1,
        "G1-6": 2,
        "G7-12": 2,
        "Avg": 4,
    }
    assert scores["unparsed"] == 0 and scores["notes"] == {}


def test_scores_equal_an_independent_count_of_the_official_definition():
    rng = np.random.default_rng(0)
    problems = by_id(
        *(
            problem(
                str(i),
                int(rng.integers(2)),
                int(rng.integers(2, 6)),
                subject=SUBJECTS[rng.integers(3)],
                grade=f"grade{rng.integers(1, 13)}",
                hint="h" * int(rng.integers(2)),
                image=("i", None)[rng.integers(2)],
            )
            for i in range(500)
        )
    )
    predictions = {name: int(rng.integers(len(found.choices))) for name, found in reversed(problems.items())}
    expected, totals = official(predictions, problems)
    scores = score(predictions, problems)
    assert scores["counts"] == totals
    for column in COLUMNS:
        assert scores[column] == pytest.approx(expected[column], abs=1e-12)
        low, high = scores["intervals"][column]
        assert low < scores[column] < high
    right = np.array([predictions[name] == found.answer for name, found in problems.items()])
    resampled = right[rng.integers(500, size=(4000, 500))].mean(1) * 100
    np.testing.assert_allclose(scores["intervals"]["Avg"], np.percentile(resampled, (2.5, 97.5)), atol=0.5)


def test_the_interval_is_the_same_every_time_and_no_interval_where_all_is_right():
    predictions = {"a": 0, "b": 1, "c": 0, "d": 1}
    assert score(predictions, SMALL) == score(predictions, SMALL, seed=5)
    assert score({name: found.answer for name, found in SMALL.items()}, SMALL)["intervals"]["Avg"] == [100, 100]


def test_unread_answers_count_as_wrong_and_are_counted():
    scores = score({"a": None, "b": 1, "c": None, "d": 0}, SMALL)
    assert scores["Avg"] == 50 and scores["NAT"] == 50 and scores["unparsed"] == 2 and scores["unparsed_as"] == "wrong"


def test_random_options_are_uniform_seeded_and_each_problems_own():
    problems = by_id(*(problem(str(i), i % 4, 4, subject=SUBJECTS[0], grade="grade1") for i in range(4000)))
    nothing = dict.fromkeys(problems)
    scores = score(nothing, problems, unparsed="random", seed=3)
    assert (
        scores["Avg"] == pytest.approx(25, abs=4 * 100 * math.sqrt(0.25 * 0.75 / 4000)) and scores["unparsed"] == 4000
    )
    assert score(nothing, problems, unparsed="random", seed=3) == scores
    assert score(nothing, problems, unparsed="random", seed=4)["Avg"] != scores["Avg"]
    halves = [{name: found for name, found in problems.items() if int(name) % 2 == part} for part in (0, 1)]
    parts = [score(dict.fromkeys(half), half, unparsed="random", seed=3)["Avg"] for half in halves]
    assert sum(parts) / 2 == pytest.approx(scores["Avg"], abs=1e-9)
    read = {name: found.answer for name, found in problems.items()}
    assert score(read, problems, unparsed="random")["Avg"] == 100


def test_columns_whose_field_is_missing_anywhere_are_null_with_the_reason():
    problems = {**SMALL, "e": problem("e", subject=SUBJECTS[2])}
    scores = score(dict.fromkeys(problems, 0), problems)
    assert scores["G1-6"] is scores["G7-12"] is scores["intervals"]["G1-6"] is scores["counts"]["G7-12"] is None
    assert scores["notes"] == dict.fromkeys(("G1-6", "G7-12"), "1 of 5 problems have no grade: e")
    assert scores["LAN"] == 50 and scores["Avg"] == 60
    bare = by_id(problem("1"), problem("2", 1))
    scores = score({"1": 0, "2": 0}, bare)
    assert {column for column in COLUMNS if scores[column] is not None} == {"NO", "Avg"}
    assert scores["notes"]["NAT"] == "2 of 2 problems have no subject: 1, 2"
    assert scores["notes"]["TXT"] == "the split has no such problem" and scores["counts"]["TXT"] == 0


def test_other_subjects_and_grades_count_in_avg_alone_and_are_noted():
    problems = {**SMALL, "e": problem("e", subject="art", grade="kindergarten")}
    scores = score(dict.fromkeys(problems, 0), problems)
    assert scores["Avg"] == 60 and scores["NAT"] == 100 and scores["G1-6"] == 50
    assert scores["notes"]["NAT"] == "1 of 5 problems have another subject, in no column: e"
    assert scores["notes"]["G7-12"] == "1 of 5 problems have another grade, in no column: e"


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"a": 0, "c": 0}, "2 of 4 problems have no prediction: b, d"),
        ({}, "4 of 4 problems have no prediction: a, b, c, d"),
        ({**dict.fromkeys("abcd", 0), "x": 0, "y": 1}, "2 predictions are of no problem of this split: x, y"),
        ({1: 0, 2: 0}, "4 of 4 problems have no prediction: .*; 2 predictions are of no problem of this split: 1, 2"),
        (dict.fromkeys("abcd", 0) | {"c": 3}, "the prediction of problem c is 3: needs 0 to 2, or None"),
        (dict.fromkeys("abcd", 0) | {"c": -1}, "the prediction of problem c is -1"),
        (dict.fromkeys("abcd", 0) | {"c": "B"}, "the prediction of problem c is 'B'"),
        (dict.fromkeys("abcd", 0) | {"c": True}, "the prediction of problem c is True"),
        (dict.fromkeys("abcd", 0) | {"c": 1.0}, r"the prediction of problem c is 1\.0"),
    ],
)
def test_predictions_that_do_not_fit_the_split_are_named(predictions, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, SMALL)


def test_wrong_options_and_an_empty_split_are_named():
    with pytest.raises(ValueError, match="unparsed is 'skip'"):
        score({}, SMALL, unparsed="skip")
    with pytest.raises(ValueError, match="no problems to score"):
        score({}, {})
    many = by_id(*(problem(str(i)) for i in range(9)))
    with pytest.raises(ValueError, match=r"0, 1, 2, 3, 4, \.\.\. \(ids are texts such as '0'"):
        score({}, many)


def test_array_indices_are_predictions_too():
    assert score({name: np.int32(0) for name in SMALL}, SMALL)["Avg"] == 50


def test_fractions_carry_intervals_and_notes_as_the_report_reads_them():
    problems = {name: problem(name, found.answer, subject=found.subject) for name, found in SMALL.items()}
    scores = score({"a": None, "b": 1, "c": 0, "d": 0}, problems)
    found = as_fractions(scores)
    assert found["accuracy/Avg"] == 0.5 and found["unparsed"] == 0.25 and found["accuracy/G1-6"] is None
    low, high = scores["intervals"]["Avg"]
    assert interval(found, "accuracy/Avg") == (low / 100, high / 100) and interval(found, "accuracy/G1-6") is None
    assert notes(found)["accuracy/G1-6"].startswith("4 of 4 problems have no grade")


def test_both_forms_of_a_predictions_file_and_what_is_unread(tmp_path):
    file = tmp_path / "predictions.json"
    for content in ({"1": 0, "2": -1, "3": None}, {"acc": 3, "results": {"1": 0, "2": -1, "3": None}, "outputs": {}}):
        file.write_text(json.dumps(content))
        assert load_predictions(file) == {"1": 0, "2": None, "3": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": "B"}', "the prediction of problem 1 is 'B': give the option's index"),
        ('{"1": 1.5}', r"the prediction of problem 1 is 1\.5"),
        ('{"1": true}', "the prediction of problem 1 is True"),
        ('{"results": {"1": [0]}}', r"the prediction of problem 1 is \[0\]"),
        ('{"results": [0]}', '"results" needs an object'),
        ('{"1": 0, "1": 1}', "the key '1' stands twice"),
        ("[0]", "holds a JSON list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_predictions_file_is_named(tmp_path, content, message):
    file = tmp_path / "predictions.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"predictions\.json.* {message}"):
        load_predictions(file)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json: the option index of each problem id"):
        load_predictions(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_real_problems_score_as_the_official_definition(shared_data, name):
    problems = read_problems(shared_data("scienceqa_mini"), name)
    predictions = dict.fromkeys(problems, 0)
    expected, totals = official(predictions, problems)
    scores = score(predictions, problems)
    assert scores["counts"] == totals and scores["notes"] == {}
    assert {column: scores[column] for column in COLUMNS} == pytest.approx(expected, abs=1e-12)
    assert score({name: found.answer for name, found in problems.items()}, problems)["Avg"] == 100


def run(*arguments):
    command = [sys.executable, "-m", "eim_jax.evaluation.metrics.scienceqa", *map(str, arguments)]
    root = pathlib.Path(__file__).resolve().parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)


def test_command_line_prints_exactly_one_json_object_or_an_error(tmp_path):
    problems = {str(i): {"question": "Which?", "choices": ["x", "y"], "answer": i % 2} for i in range(4)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["0", "1", "2"], "val": ["3"]}))
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps({"results": {"0": 0, "1": 0, "2": -1}}))
    done = run("--predictions", file, "--data", tmp_path, "--split", "test")
    scores = json.loads(done.stdout)
    assert done.returncode == 0 and scores["Avg"] == pytest.approx(100 / 3) and scores["unparsed"] == 1
    assert list(scores)[:9] == list(COLUMNS) and scores["NAT"] is None and scores["notes"]["NAT"]
    wrong = run("--predictions", file, "--data", tmp_path, "--split", "val")
    assert wrong.returncode == 2 and wrong.stdout == "" and "problems have no prediction: 3" in wrong.stderr

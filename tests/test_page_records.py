"""What the page asks of a run's records: each wrong field is named with its file, whatever it holds."""

import json
from pathlib import Path

import pytest

from eim_jax.evaluation.tasks import TASKS
from eim_jax.reporting.arm_files import read_arm
from eim_jax.reporting.records import arms_of, check_arm, check_scores, check_steps
from eim_jax.utils.files import Damaged

FILE = Path("runs/x/run.json")
STAGE = {"name": "st", "losses": {"st": 1.0}, "trained_params": 3, "total_params": 9, "steps": 4, "epochs": 1.5}
STEP = {"stage": "st", "stage_index": 0, "step": 4, "loss": 1.0, "loss/st": None}


@pytest.mark.parametrize(
    ("run", "match"),
    [
        ({"config": 7}, "field 'config' is not an object, but 7"),
        ({"seconds": "long"}, "field 'seconds' is not a number or null, but 'long'"),
        ({"config": {"arms": "eim"}}, "'config.arms' is not a list of names of folders, but 'eim'"),
        ({"config": {"arms": [7.5]}}, "'config.arms' is not"),
        ({"config": {"arms": ["../eim"]}}, "'config.arms' is not"),
        ({"config": {"arms": ["a\0b"]}}, "'config.arms' is not"),
        ({"config": {"arms": ["eim", "eim"]}}, "'config.arms' is not"),
    ],
)
def test_a_wrong_field_of_run_json_is_named(run, match):
    with pytest.raises(Damaged, match=rf"runs/x/run\.json is damaged \(.*{match}"):
        arms_of(FILE, run)


def test_arms_are_names_or_objects_with_a_name():
    assert arms_of(FILE, {"config": {"arms": ["baseline", {"name": "eim"}]}, "seconds": None}) == ["baseline", "eim"]
    with pytest.raises(ValueError, match="config names no arms"):
        arms_of(FILE, {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": None}, r"field 'stages\[0\]\.name' is not a text, but None"),
        ({"losses": {"st": "1"}}, r"field 'stages\[0\]\.losses' is not an object of numbers"),
        ({"trained_params": -3}, r"'stages\[0\]\.trained_params' is not a whole number, but -3"),
        ({"total_params": True}, r"'stages\[0\]\.total_params' is not a whole number"),
        ({"seconds": [1]}, r"'stages\[0\]\.seconds' is not a number"),
        ({"data_wait": 10**400}, r"'stages\[0\]\.data_wait' is not a number, but 1000"),
        ({"trained": [{"pattern": "a", "leaves": 1}]}, r"no field 'stages\[0\]\.trained\[0\]\.params'"),
    ],
)
def test_a_wrong_field_of_a_stage_is_named(change, match):
    check_arm(FILE, {"stages": [STAGE]})
    with pytest.raises(Damaged, match=match):
        check_arm(FILE, {"stages": [{**STAGE, **change}]})


@pytest.mark.parametrize(
    "change",
    [{"step": "4"}, {"step": None}, {"stage_index": 0.5}, {"loss/st": []}, {"loss": 1e301}],
)
def test_a_wrong_field_of_a_step_is_named_by_its_line(change):
    check_steps(FILE, [STEP, {**STEP, "note": "any"}])
    field = next(iter(change))
    with pytest.raises(ValueError, match=rf"run\.json:2: not a record of a step \(field '{field}' .*delete this"):
        check_steps(FILE, [STEP, {**STEP, **change}])


def test_scores_beyond_any_chart_are_named_and_nan_stays_a_dash():
    check_scores(FILE, {"greedy": {"CIDEr": float("nan"), "notes": {"SPICE": "no Java"}, "mme": {"count": 3}}})
    with pytest.raises(Damaged, match="field 'greedy/mme/count' is a number above 1e\\+300"):
        check_scores(FILE, {"greedy": {"mme": {"count": 10**400}}})


@pytest.mark.parametrize(
    ("task", "content", "match"),
    [
        ("captions", [{"image_id": 1, "caption": "a"}, 7], r'\[1\]: needs an "image_id" and a text "caption", not 7'),
        ("captions", [{"image_id": None, "caption": "a"}], r"\[0\]: needs an"),
        ("captions", [{"image_id": 1, "caption": ["a"]}], r"\[0\]: needs an"),
        ("options", {"outputs": {"1": None}, "results": {"1": 0}}, r"outputs\.'1' is not a text, but None"),
        ("options", {"outputs": {"1": "a"}, "results": [0]}, r'"results" is not an object of choices'),
        ("options", {"outputs": {"1": "a"}, "results": {"1": 0.5}}, r"results\.'1' is not the index of an option"),
    ],
)
def test_wrong_predictions_are_named_by_place_or_id(tmp_path, task, content, match):
    (tmp_path / "predictions_test.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"predictions_test\.json.*{match}"):
        read_arm(TASKS[task], tmp_path)

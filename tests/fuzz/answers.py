"""What a continued run and the page's cards read again: metrics.jsonl, and an arm's answers to questions."""

import contextlib
import functools
import json
import pathlib

from eim_jax.evaluation.tasks import TASKS
from eim_jax.evaluation.tasks.options import question
from eim_jax.reporting.arm_files import read_arm
from eim_jax.reporting.questions import questions
from eim_jax.training.log import RunLog, StageInfo, read_metrics

from .engine import Format
from .plain import as_json, json_of

ITEMS = [question(str(i), None, f"Which {i}?", "", ("x", "y", "z"), 1) for i in range(4)]
STAGES = [StageInfo("a", {"st": 1.0}, (), 9, 8, 1, 4), StageInfo("b", {"base": 1.0}, (), 9, 8, 1, 4)]
RESUME = (1, 4)  # the first stage and step that will be written again


def _answers():
    outputs = {item.id: f"The answer is {'ABC'[int(item.id) % 3]}." for item in ITEMS}
    results = {name: int(name) % 3 for name in outputs}
    decoding = {"methods": ["greedy"], "max_tokens": 9, "answers": "generated"}
    found = {
        "prompt": {"form": "QCM-A", "sha256": "0" * 64},
        "decoding": decoding,
        "results": results,
        "outputs": outputs,
    }
    return {"predictions_test.json": as_json(found)}


def _read_answers(folder: pathlib.Path):
    arm = read_arm(TASKS["options"], folder)
    return questions(TASKS["options"], {"eim": arm.predictions}, ITEMS)


def _check_answers(folder: pathlib.Path, found):
    file = folder / "predictions_test.json"
    if not file.is_file():
        assert not found["cards"] and found["missing"], "cards of nothing"
        return
    said = json_of(file)
    shown = {card["id"]: card["questions"][0]["answers"][0] for card in found["cards"]}
    assert set(shown) == {item.id for item in ITEMS} & set(said["outputs"]), "other questions are shown"
    for name, line in shown.items():
        index = said["results"][name]
        assert line["raw"] == said["outputs"][name], "another text"
        assert line["choice"] == ("names no option" if index == -1 else f"({'ABC'[index]})"), f"{line} for {index}"
        assert line["mark"] == ("right" if index == 1 else "wrong"), f"{line} for {index}"


def _records():
    rows = [
        {"stage": "ab"[i], "stage_index": i, "step": step, "loss": 3.0, "loss/st": None, "lr/default": 1e-3}
        for i in (0, 1)
        for step in (0, 4, 8)
    ]
    return {"arm/metrics.jsonl": b"\n".join(map(as_json, rows)) + b"\n"}


def _continue(folder: pathlib.Path):
    """The records before and after a run goes on."""
    file, before = folder / "arm" / "metrics.jsonl", []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            before.append(json.loads(line))
    with RunLog.open(folder / "arm", STAGES, RESUME):
        pass
    return before, read_metrics(file)


def _check_records(folder: pathlib.Path, found):
    before, after = found
    kept = [row for row in before if (row.get("stage_index", 0), row.get("step", 0)) < RESUME]
    assert [json.dumps(row) for row in after] == [json.dumps(row) for row in kept], "other records"


FORMATS = (
    Format("answers", functools.cache(_answers), _read_answers, _check_answers, quick=40, words=("question ",)),
    Format("metrics.jsonl", functools.cache(_records), _continue, _check_records, quick=40),
)

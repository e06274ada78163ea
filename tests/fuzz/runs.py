"""A run's own records, read again: run.json as the saved config, and everything that becomes the page."""

import functools
import html
import json
import pathlib
import re

import numpy as np
from PIL import Image

from eim_jax.config import as_dict, flatten, read_saved
from eim_jax.evaluation.tasks import TASKS
from eim_jax.reporting.page import write_report
from eim_jax.training import kinds

from .engine import Format
from .plain import as_json, json_of

ARMS = ("baseline", "eim")


@functools.cache
def _saved():
    from configs import miniature
    from eim_jax.config import from_config_dict

    config = as_dict(from_config_dict(miniature.get_config()))
    return {"run.json": as_json({"command": "c", "config": config, "seam": "one_string"})}


def _read_saved(folder: pathlib.Path):
    found = read_saved(folder)
    if found is not None:
        kinds.check(found)
        kinds.to_config_dict(found)
    return found


def _check_saved(folder: pathlib.Path, found):
    if found is None:
        assert not (folder / "run.json").exists(), "a run.json was passed over"
        return
    run = json_of(folder / "run.json")
    wanted = run["config"]
    if (data := wanted.get("data", {})).get("seam", "auto") == "auto":  # settled when it was trained; before: apart
        data["seam"] = run.get("seam", "apart")

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, child in value.items():
                yield from visit(f"{prefix}.{key}" if prefix else key, child)
        else:
            yield prefix, value

    ours = flatten(found)
    for name, value in visit("", wanted):
        if ".losses." not in name:
            assert name in ours, f"{name} is lost"
            kept = json.loads(json.dumps(ours[name]))
            # A field of real numbers takes a whole one to the nearest float64, as every reader of JSON does.
            wanted_value = float(value) if isinstance(kept, float) and type(value) is int else value
            assert kept == wanted_value, f"{name}: {ours[name]!r} for {value!r}"


@functools.cache
def _page():
    files = {}
    run = {
        "command": "python -m eim_jax.main", "config": {"arms": list(ARMS), "seed": 3}, "versions": {"jax": "0.10.2"},
        "machine": {"device": "cpu", "cpu_cores": 2}, "seconds": 12.5, "started": "2026-11-20", "finished": "2026",
    }  # fmt: skip
    files["run.json"] = as_json(run)
    for n, arm in enumerate(ARMS):
        stage = {
            "name": "ie", "losses": {"base": 1.0, "ie": 0.5},
            "trained": [{"pattern": "st/.*", "leaves": 4, "params": 90}],
            "trained_params": 90, "total_params": 1000, "steps": 8, "epochs": 2, "batch": 4, "seconds": 92.4,
            "examples_per_second": 812.3, "peak_memory_bytes": None, "data_wait": 0.012, "frozen_unchanged": True,
        }  # fmt: skip
        files[f"{arm}/run.json"] = as_json({"arm": arm, "description": "d", "total_params": 1000, "stages": [stage]})
        rows = [
            {"stage": "ie", "stage_index": 0, "step": s, "epoch": s / 4, "loss/base": 3.0 - s / 8, "lr/default": 1e-3,
             "queue/ie/recall1": 0.5, "queue/ie/rank": 4.0, "loss": 3.0}
            for s in (0, 4, 8)
        ]  # fmt: skip
        files[f"{arm}/metrics.jsonl"] = b"\n".join(map(as_json, rows)) + b"\n"
        files[f"{arm}/predictions_test.json"] = as_json([{"image_id": i, "caption": f"a dog {i}"} for i in (1, 2)])
        scores = {"Bleu_4": 0.3 + n / 10, "CIDEr": 1.0, "SPICE": None, "nll": 1.1, "notes": {"SPICE": "needs Java"}}
        files[f"{arm}/scores_test.json"] = as_json({"greedy": scores})
    return files


def _picture(image_id: str) -> Image.Image | None:
    return Image.fromarray(np.zeros((8, 8, 3), np.uint8)) if image_id == "1" else None


def _read_page(folder: pathlib.Path):
    return write_report(folder, TASKS["captions"], _picture, {"1": ["a dog"], "2": ["two dogs"]})


def _check_page(folder: pathlib.Path, found):
    page = found.read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    assert page.rstrip().endswith("</html>"), "the page is cut off"
    run = json_of(folder / "run.json")
    for arm in run["config"]["arms"]:
        name = arm if isinstance(arm, str) else arm["name"]
        assert " ".join(name.split()) in " ".join(text.split()) or not name.isprintable(), (
            f"arm {name!r} is not on the page"
        )
        scores = folder / name / "scores_test.json"
        for method in json_of(scores).values() if scores.is_file() else ():
            value = method.get("CIDEr")
            if isinstance(value, float) and 0 < value < 10:
                assert f"{100 * value:.1f}" in text, f"CIDEr {value} is not on the page"
        predictions = folder / name / "predictions_test.json"
        for row in json_of(predictions) if predictions.is_file() else ():
            words = row["caption"].split()
            shown = [word for word in words if word.isascii() and word.isprintable()]
            assert all(word in text for word in shown), f"caption {row} is not on the page"
    assert "<script>alert" not in page, "a text became code"


FORMATS = (
    Format("run.json", _saved, _read_saved, _check_saved, quick=50, words=("config.",)),
    Format("page", _page, _read_page, _check_page, quick=5),
)

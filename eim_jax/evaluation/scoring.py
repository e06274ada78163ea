"""Scores of a trained arm on its test split, by the task that the split names."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eim_jax.data.samples import Split
from eim_jax.evaluation.tasks import task_of
from eim_jax.evaluation.tasks.task import Scored, measured, with_intervals
from eim_jax.generation.batched_inference import generate_text
from eim_jax.models.vlm import VLM
from eim_jax.parallel.processes import barrier, is_first
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.files import read_json, write_json, write_text

SCORES = "scores_test.json"  # in an arm's folder
EVALS = "evals"  # in an arm's folder: a folder for each other settings that --mode=eval scored it by


def evaluate(inputs: Inputs, vlm: VLM, params: Flat, split: Split, directory: Path) -> dict[str, dict]:
    """Scores one arm by every decoding method of the config.

    Writes predictions_test*.json, items_test.json and scores_test.json.

    Args:
      inputs: the run's.
      vlm: the arm's model.
      params: its parameters.
      split: the test split.
      directory: to write to; see `place`.

    Returns:
      {method: scores}; with several processes only the first has the scores of the texts.
    """
    task = task_of(split)
    asked = task.ask(split, inputs.config.data.eval_limit)
    predicted = task.predict(inputs, vlm, params, asked)
    scores, items = {}, {}
    for i, method in enumerate(inputs.config.decode.methods):
        label = f"{task.texts} by {method}"
        texts = generate_text(inputs, vlm, params, predicted.visual, asked.images, asked.prompts, method, label)
        scores[method] = dict(predicted.scores)
        if not is_first():  # what is computed from texts alone is process 0's to compute and write
            continue
        outputs = dict(zip(asked.ids, texts, strict=True))
        record = task.record(inputs, asked, predicted, outputs, method)
        write_json(directory / f"predictions_test_{method}.json", record)
        if i == 0:
            write_json(directory / "predictions_test.json", record)
        found, added = task.score(inputs, asked, predicted, outputs, directory, method), measured(task, asked, outputs)
        whole = Scored({**found.scores, **added.scores}, {**found.rows, **added.rows})
        scores[method] = with_intervals(task, whole)
        items[method] = {"ids": list(asked.items), **whole.rows}
    for method, found in scores.items():
        found["notes"] = {**found.get("notes", {}), "decoding": settings_of(inputs, method, split)}
    if is_first():
        write_items(directory / "items_test.json", items)
    write_json(directory / SCORES, scores)
    barrier("scores")
    return scores


def settings_of(inputs: Inputs, method: str, test: Split) -> str:
    """Returns what a score depends on besides the parameters, in words; it is stored with the score.

    Args:
      inputs: the run's.
      method: of decoding.
      test: the test split.
    """
    decode, limit, task = inputs.config.decode, inputs.config.data.eval_limit, task_of(test)
    words = {
        "greedy": "greedy",
        "beam": f"{decode.beams} beams ranked by mean log-probability",
        "nucleus": f"nucleus sampling, top_p {decode.top_p:g}, temperature {decode.temperature:g}",
    }[method]
    stop = ", stops at a period" if decode.stop_at_period else ""
    stop += ", gates without tanh" if decode.raw_gates else ""
    stop += ", positions as LaVIN's generator" if decode.rope == "lavin" else ""
    stop += task.settings(inputs)
    number = task.count(test)
    number = min(limit or number, number)
    return f"{words}, at most {decode.max_tokens} tokens{stop}; {number:,} {task.counted} {test.fingerprint()[:8]}"


def read_scores(inputs: Inputs, directory: Path, test: Split) -> dict[str, dict] | None:
    """Returns an arm's scores if they were computed with these settings on this test split, else None.

    Args:
      inputs: the run's.
      directory: the arm's.
      test: the test split.
    """
    path = directory / SCORES
    if not path.exists() or not (directory / "predictions_test.json").exists():
        return None
    scores = read_json(path, values=dict)
    return scores if _wanted(inputs, test) == _found(scores) else None


def place(inputs: Inputs, directory: Path, test: Split) -> Path:
    """Returns where an arm's scores with these settings belong: the arm's folder, or one beside what it was scored by.

    Args:
      inputs: the run's.
      directory: the arm's.
      test: the test split.
    """
    path, wanted = directory / SCORES, _wanted(inputs, test)
    if not path.exists() or _found(read_json(path, values=dict)) == wanted:
        return directory
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]
    return directory / EVALS / "-".join([*inputs.config.decode.methods, digest])


def is_other_split(directory: Path, test: Split) -> bool:
    """Returns whether an arm's own scores are of another split than this one.

    Args:
      directory: the arm's.
      test: what is scored now.
    """
    path = directory / SCORES
    own = _found(read_json(path, values=dict)) if path.exists() else []
    return any(said is not None and not said.endswith(f" {test.fingerprint()[:8]}") for _, said in own)


def _wanted(inputs: Inputs, test: Split) -> list[tuple[str, str | None]]:
    return [(method, settings_of(inputs, method, test)) for method in inputs.config.decode.methods]


def _found(scores: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    return [(method, _decoding(found)) for method, found in scores.items()]


def _decoding(scores: Mapping[str, Any]) -> str | None:
    notes = scores.get("notes", {})
    return notes.get("decoding") if isinstance(notes, dict) else None


def write_items(path: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes {decoding: {"ids": [...], metric key: rows}}, one metric a line.

    Args:
      path: of the file.
      parts: what it holds.
    """
    lines = [
        f"{json.dumps(method)}: {{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(rows, separators=(',', ':'))}" for key, rows in found.items())
        + "\n}"
        for method, found in parts.items()
    ]
    write_text(path, "{" + ",\n".join(lines) + "}\n")

"""What an arm's folder holds, as the page reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eim_jax.evaluation.tasks.task import Predictions, Task
from eim_jax.training.log import read_metrics


@dataclass(frozen=True)
class Arm:
    """One arm's artifacts; what an interrupted run has not written is empty."""

    name: str
    run: dict
    metrics: list[dict]
    scores: dict[str, dict]
    predictions: Predictions | None


def read_arm(task: Task, directory: Path) -> Arm:
    """Reads run.json, metrics.jsonl, scores_test.json and predictions_test.json of an arm, each if it is there."""
    path = directory / "predictions_test.json"
    return Arm(
        name=directory.name,
        run=read_json(directory / "run.json", {}),
        metrics=read_metrics(directory / "metrics.jsonl"),
        scores=read_json(directory / "scores_test.json", {}),
        predictions=task.read_predictions(path, read_json(path, None)) if path.exists() else None,
    )


def read_json(path: Path, default: Any) -> Any:
    """Returns a JSON file's content, `default` where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default

"""What an arm's folder holds, as the page reads it."""

from dataclasses import dataclass, field
from pathlib import Path

from eim_jax.evaluation.scoring import EVALS
from eim_jax.evaluation.tasks.task import Predictions, Task
from eim_jax.reporting.records import check_arm, check_items, check_scores, check_steps
from eim_jax.training.log import read_metrics
from eim_jax.utils.files import read_json


@dataclass(frozen=True)
class Arm:
    """One arm's artifacts; what an interrupted run has not written is empty."""

    name: str
    run: dict
    metrics: list[dict]
    scores: dict[str, dict]
    predictions: Predictions | None
    items: dict[str, dict] = field(default_factory=dict)  # items_test.json: each item's share in the scores
    evals: dict[str, dict[str, dict]] = field(default_factory=dict)  # by other settings: {name: {method: scores}}


def read_arm(task: Task, directory: Path) -> Arm:
    """Reads run.json, metrics.jsonl, all scores_test.json and predictions_test.json of an arm, each if it is there.

    Raises:
      Damaged, ValueError: one is not what a run writes; the message names the file and the field or the line.
    """
    names = ("run", "scores_test", "predictions_test", "items_test")
    run, scores, path, items = (directory / f"{name}.json" for name in names)
    found = Arm(
        name=directory.name,
        run=read_json(run) if run.exists() else {},
        metrics=read_metrics(directory / "metrics.jsonl"),
        scores=_scores(scores) if scores.exists() else {},
        predictions=task.read_predictions(path, read_json(path, form=(dict, list))) if path.exists() else None,
        items=_items(items) if items.exists() else {},
        evals={file.parent.name: _scores(file) for file in sorted(directory.glob(f"{EVALS}/*/{scores.name}"))},
    )
    check_arm(run, found.run)
    check_steps(directory / "metrics.jsonl", found.metrics)
    return found


def _items(file: Path) -> dict[str, dict]:
    """Each item's share in the scores, by decoding method and metric."""
    found = read_json(file, values=dict)
    check_items(file, found)
    return found


def _scores(file: Path) -> dict[str, dict]:
    """Scores by decoding method."""
    found = read_json(file, values=dict)
    check_scores(file, found)
    return found

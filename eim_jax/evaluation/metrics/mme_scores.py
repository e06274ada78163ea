"""MME's scores: 0 to 200 a task, 100 x accuracy over questions + 100 x share of pictures with both answers right."""

from collections.abc import Mapping

import numpy as np

from eim_jax.data.datasets.mme import COGNITION, PERCEPTION, TASKS, Question
from eim_jax.evaluation.metrics.metric import Family, Metric, Panel, Rows, Value

SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "total": TASKS}
_WORDS = "A task's score: 100 × accuracy over its questions + 100 × share of pictures with both answers right."


def task_sum(sums: np.ndarray) -> Value:
    """Returns the sum of the tasks' scores.

    Args:
      sums: for each task right answers, questions, pictures with both answers right and pictures, in the last axis.
    """
    right, questions, both, pictures = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 4), -1, 0)
    task = 100 * right / np.maximum(questions, 1) + 100 * both / np.maximum(pictures, 1)
    return np.where(pictures > 0, task, 0).sum(axis=-1)


def yes_no_rows(questions: Mapping[str, Question], right: Mapping[str, bool]) -> dict[str, Rows]:
    """Returns the rows of every task's score and of the sums; an item is a task's picture, in the questions' order.

    Args:
      questions: by id.
      right: whether each one's answer is.

    Returns:
      rows of four numbers for each task that a score sums up: right answers, questions, both answers right, pictures.
    """
    answers: dict[str, list[bool]] = {}
    for key, question in questions.items():
        answers.setdefault(f"{question.task}/{question.image}", []).append(right[key])
    there = list(dict.fromkeys(question.task for question in questions.values()))
    halves = {"mme/perception": PERCEPTION, "mme/cognition": COGNITION}
    tables = {name: [task for task in tasks if task in there] for name, tasks in halves.items()}
    tables |= {"mme/sum": [t for tasks in tables.values() for t in tasks], **{f"mme/{task}": [task] for task in there}}
    rows: dict[str, Rows] = {}
    for name, tasks in tables.items():
        for item, given in answers.items() if tasks else ():
            row, task = np.zeros((len(tasks), 4), int), item.split("/")[0]
            if task in tasks:
                row[tasks.index(task)] = sum(given), len(given), all(given), 1
            rows.setdefault(name, []).append(row.ravel().tolist())
    return rows


def _of(part: str) -> Metric:
    """The metric of a task, of one of SUMS, of "sum" (the tasks that are there) or "other" (neither yes nor no)."""
    if part == "other":
        words = "answers neither yes nor no"
        return Metric("mme/other", "other", 100, 1, -1, "points", long=words, terminal=None, seeds=None)
    words = part.replace("_", " ")
    shown = {"factor": 1, "decimals": 1, "sense": 1, "terminal": part, "value": task_sum, "reason": "missing"}
    if part == "sum":
        long = "MME, sum of the tasks that are there"
        return Metric("mme/sum", "sum of these tasks", **shown, long=long, seeds="sum, of 1,200", same_as="mme/total")
    shown |= {"unit": f"of {200 * len(SUMS.get(part, 'x')):,}", "long": f"MME {words}"}
    if part in SUMS:
        parts = (frozenset({"mme/perception", "mme/cognition"}),) if part == "total" else ()
        return Metric(f"mme/{part}", words, **shown, seeds=None, summed_up_by=parts)
    half = "perception" if part in PERCEPTION else "cognition"
    title = f"{half} tasks" if part in TASKS else "other tasks"
    summed = tuple(frozenset({f"mme/{whole}"}) for whole in (half, "total", "sum"))
    panel = Panel(title, "By task", _WORDS, 200)
    return Metric(f"mme/{part}", words, **shown, seeds=f"{words}, of 200", panel=panel, summed_up_by=summed)


MME = Family("mme/", _of, (*SUMS, "sum", *TASKS, "other"))

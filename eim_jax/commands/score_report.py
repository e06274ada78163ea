"""The scores of a run as the modes train and eval end with them: the terminal's table, and report.html."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from eim_jax.data.samples import Split
from eim_jax.evaluation.tasks import task_of
from eim_jax.parallel import processes
from eim_jax.parallel.signals import doing
from eim_jax.reporting.page import write_report
from eim_jax.reporting.scores import columns, flatten
from eim_jax.utils.console import console, print_table


def report_scores(
    workdir: Path, test: Split, limit: int, arms: Mapping[str, Mapping[str, dict]], *, renew: bool = True
) -> None:
    """Prints the scores of a run's arms and renews its page, from the first process alone.

    Args:
      workdir: the run's.
      test: the test split.
      limit: config.data.eval_limit.
      arms: arm -> decoding method -> scores.
      renew: whether the page is written; not where its own test items are others.
    """
    if not processes.is_first():
        return
    doing("writing the report")
    notes = [scores.get("notes", {}).get("decoding", "") for methods in arms.values() for scores in methods.values()]
    what = " ".join(notes[0].rpartition("; ")[2].split()[:2])
    name = test.name if test.name in ("train", "val") else "test"
    print_table(f"scores on the {name} split ({what})", *score_table(arms))
    if not renew:
        console.print("report.html shows the run's own test items and stays as it is", soft_wrap=True)
        return
    where = {id_: row for row, id_ in enumerate(test.images.ids)}
    task = task_of(test)

    def picture(image_id: str) -> Image.Image:
        return test.images[where[str(image_id)]]

    path = write_report(workdir, task, picture, test.references, task.items(test, limit))
    console.print(f"report: {path}", soft_wrap=True)


def score_table(arms: Mapping[str, Mapping[str, dict]]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the terminal's table: one row an arm and decoding method.

    Args:
      arms: arm -> decoding method -> scores.
    """
    values = {(arm, method): flatten(scores) for arm, methods in arms.items() for method, scores in methods.items()}
    shown = [
        metric
        for metric in columns(list(arms.values()))
        if metric.terminal is not None and any(found.get(metric.key) is not None for found in values.values())
    ]
    rows = []
    for (arm, method), found in values.items():
        cells = [(metric, found.get(metric.key)) for metric in shown]
        rows.append([arm, method, *("-" if v is None else metric.text_in_file(v) for metric, v in cells)])
    return ["arm", "decoding", *(metric.terminal or metric.title for metric in shown)], rows

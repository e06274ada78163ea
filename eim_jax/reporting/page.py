"""A run as one self-contained page: scores, stages, curves, and test pictures with their captions.

Everything is read from the work directory's artifacts; the page needs no network and no scripts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from eim_jax.evaluation.scoring import EVALS
from eim_jax.evaluation.tasks.task import Item, Task
from eim_jax.losses.table import LOSSES, symbol_of, title_of, unit_of
from eim_jax.reporting.arm_files import Arm, read_arm
from eim_jax.reporting.blind import ignored_pictures
from eim_jax.reporting.categories import by_category
from eim_jax.reporting.charts import Line, panel
from eim_jax.reporting.environment import environment
from eim_jax.reporting.gallery import gallery
from eim_jax.reporting.questions import questions
from eim_jax.reporting.records import arms_of
from eim_jax.reporting.scores import BASELINE, METHODS, table, verdict
from eim_jax.reporting.while_training import scored_curves
from eim_jax.utils.files import read_json, write_text

DIAGNOSTICS = {  # key in metrics.jsonl -> title, unit, logarithmic axis, axis fixed to 0...1
    "recall1": ("recall@1 in {}", "share of queries", False, True),
    "rank": ("right key's rank in {}", "mean rank, 1 = first", True, False),
    "similarity": ("right key's similarity, {}", "mean similarity", False, False),
    "effective": ("effective negatives, {}", "keys, 1 / Σp²", True, False),
}


def write_report(
    workdir: Path,
    task: Task,
    images: Callable[[str], Image.Image | None],
    references: Mapping[str, Sequence[str]],
    items: Sequence[Item] | None = None,
) -> Path:
    """Writes workdir/report.html from the run's artifacts and returns its path; arguments and errors as `render`."""
    path = workdir / "report.html"
    write_text(path, render(workdir, task, images, references, items))
    return path


def render(
    workdir: Path,
    task: Task,
    images: Callable[[str], Image.Image | None],
    references: Mapping[str, Sequence[str]],
    items: Sequence[Item] | None = None,
) -> str:
    """Returns the page of a run's artifacts, finished or not; writes nothing.

    Args:
      workdir: the run's.
      task: of the test split; it reads the arms' predictions.
      images: gives the test picture of an image id, or None.
      references: its captions by people.
      items: the test questions in the split's order, as the task gives them; None shows texts beside the references.

    Raises:
      FileNotFoundError: the directory holds no run.json.
      ValueError: it names no arm, an arm's predictions are another task's, or a record has a field of another type.
    """
    if not (workdir / "run.json").exists():
        raise FileNotFoundError(f"{workdir}: no run.json, so nothing has been run here")
    run = read_json(workdir / "run.json")
    names = arms_of(workdir / "run.json", run)
    arms = [read_arm(task, workdir / name) for name in names]
    texts = {arm.name: arm.predictions.outputs if arm.predictions else {} for arm in arms}
    scores = {arm.name: arm.scores for arm in arms}
    others = [name for name in names if name != BASELINE] or [BASELINE]
    named = ", ".join(others) if len(others) < 3 else f"{len(others)} arms"
    compared = BASELINE in names and others != [BASELINE]
    # Fields that an interrupted run lacks are undefined in the template, which is false there.
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=f"{named} against the baseline" if compared else f"Run of {named}",
            summary=_summary(task, arms),
            noise=_noise(run),
            run={key: run.get(key) for key in ("command", "started", "finished", "seconds", "machine", "versions")},
            arms=[{"name": arm.name, "run": arm.run, "stages": stages(arm), "curves": curves(arm)} for arm in arms],
            unfinished=[text for arm in arms if (text := _unfinished(arm))],
            finished=bool(run.get("finished") or run.get("seconds")),
            verdicts=verdict(scores),
            blind=[line for arm in arms for line in _blind(task, arm)],
            has_baseline=compared,
            scores=table({arm.name: {**arm.scores, **_named(arm)} for arm in arms}),
            together=together(arms),
            queues=_queues(arms),
            categories=by_category(scores),
            gallery=gallery(texts if items is None else {}, images, references),
            questions=None if items is None else questions(task, {arm.name: arm.predictions for arm in arms}, items),
            config=json.dumps(run.get("config", {}), indent=2, ensure_ascii=False),
        )
    )
    # Predictions of other programs may hold half characters, which no file takes, and NULs, which no browser shows.
    return page.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _summary(task: Task, arms: Sequence[Arm]) -> str:
    parts = []
    for arm in arms:
        names = [stage["name"] for stage in arm.run.get("stages", ())]
        count = f"{len(names)} stage{'' if len(names) == 1 else 's'}"
        parts.append(f"{arm.name}: {count} ({' → '.join(names)})" if names else f"{arm.name}: no finished stage")
    number = max((len(arm.predictions.outputs) for arm in arms if arm.predictions), default=0)
    return "; ".join(parts) + "." + (f" {task.told.format(number)}" if number else "")


def _blind(task: Task, arm: Arm) -> list[str]:
    """Signs that an arm ignores its pictures; texts that are equal are one only where the task describes pictures."""
    describes = task.texts != "answers" and arm.predictions is not None
    return ignored_pictures(arm.name, arm.items, arm.predictions.outputs if describes else None)


def _named(arm: Arm) -> dict[str, dict]:
    """The scores by other settings than the arm's own, each under a name that the table shows."""
    return {
        f"{METHODS.get(method, method)} by other settings ({EVALS}/{name})": found
        for name, scores in arm.evals.items()
        for method, found in scores.items()
    }


def _noise(run: Mapping) -> str:
    seed = run.get("config", {}).get("seed")
    once = "Each arm was run once" + (f" (seed {seed})" if seed is not None else "")
    return f"{once}: the noise between seeds is unknown here, so a small difference may mean nothing."


def stages(arm: Arm) -> list[dict]:
    """Returns the stage table's rows, from the arm's run.json."""
    rows = []
    for stage in arm.run.get("stages", ()):
        trained, total = stage["trained_params"], stage["total_params"]
        losses = [(title_of(name), weight) for name, weight in stage["losses"].items()]
        rows.append(stage | {"losses": losses, "share": trained / max(total, 1), "frozen": total - trained})
    return rows


def curves(arm: Arm) -> list[dict]:
    """Returns one arm's charts, stage by stage: every loss term, the diagnostics of every queue, the scores."""
    groups = []
    for index, stage in dict.fromkeys((row["stage_index"], row["stage"]) for row in arm.metrics):
        rows = [row for row in arm.metrics if row["stage_index"] == index]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        terms = [key for key in keys if key.startswith("loss/")]
        charts = []
        # The sum says nothing new beside a single term.
        for key in (["loss"] if "loss" in keys and len(terms) != 1 else []) + terms:
            name = key.removeprefix("loss/")
            title = "all losses, weighted" if key == "loss" else title_of(name)
            unit = unit_of(name)
            charts.append(_chart(arm.name, index, rows, key, title, unit, _colour(name), levels=_levels(rows, name)))
        queues = dict.fromkeys(key.split("/")[1] for key in keys if key.startswith("queue/"))
        for queue in queues:
            for key, (title, unit, log, unit_range) in DIAGNOSTICS.items():
                if f"queue/{queue}/{key}" in keys:
                    title = title.format(symbol_of(queue))
                    place = (arm.name, index, rows, f"queue/{queue}/{key}")
                    charts.append(_chart(*place, title, unit, _colour(queue), log, unit_range))
        charts += scored_curves(f"{arm.name}-{index}", rows)
        groups.append({"stage": stage, "number": index + 1, "charts": charts})
    return groups


def together(arms: Sequence[Arm]) -> list[dict]:
    """Returns charts with all arms in one panel: each loss term that the last stages of two or more arms share."""
    last: dict[str, list[Line]] = {}
    for arm in arms:
        rows = [row for row in arm.metrics if row["stage_index"] == arm.metrics[-1]["stage_index"]]
        for key in dict.fromkeys(key for row in rows for key in row if key.startswith("loss/")):
            look = {"colour": len(LOSSES) if arm.name == BASELINE else arms.index(arm), "dashed": arm.name == BASELINE}
            label = f"{arm.name}, stage {rows[-1]['stage']}"
            last.setdefault(key.removeprefix("loss/"), []).append(_line(rows, key, label, **look))
    return [
        {"title": title_of(name), "range": "", "svg": panel(lines, unit=unit_of(name), name=f"together-{name}")}
        for name, lines in last.items()
        if len(lines) > 1
    ]


def _queues(arms: Sequence[Arm]) -> str:
    """Which queue is whose, of the losses that these arms name."""
    named = {name for arm in arms for stage in arm.run.get("stages", ()) for name in stage["losses"]}
    known = [loss for name, loss in LOSSES.items() if name in named and loss.queue is not None]
    said = "; ".join(f"{loss.queue.symbol} is the queue of {loss.title}" for loss in known)
    return f"{said}. " if said else ""


def _colour(loss: str) -> int:
    return list(LOSSES).index(loss) if loss in LOSSES else len(LOSSES)


def _levels(rows: Sequence[dict], loss: str) -> list[tuple[str, float]]:
    """Between what a queue loss lies, as its stage found at step 0: chance, and its own key as query."""
    start = rows[0] if rows[0]["step"] == 0 else {}
    named = (("chance", f"queue/{loss}/chance"), ("own key as query", f"queue/{loss}/floor"))
    return [(label, start[key]) for label, key in named if start.get(key) is not None]


def _line(rows: Sequence[dict], key: str, label: str, colour: int, dashed: bool = False) -> Line:
    have = [row for row in rows if key in row]
    return Line(label, [row["step"] for row in have], [row[key] for row in have], colour, dashed)


def _chart(
    arm: str,
    index: int,
    rows: Sequence[dict],
    key: str,
    title: str,
    unit: str,
    colour: int,
    log: bool = False,
    unit_range: bool = False,
    levels: Sequence[tuple[str, float]] = (),
) -> dict:
    line = _line(rows, key, title, colour)
    finite = [value for value in line.values if value is not None]
    bad = len(line.values) - len(finite)
    told = f"{_short(finite[0])} → {_short(finite[-1])}" if finite else "no finite value"
    told += f" · {bad} not finite" if bad else ""
    told += "".join(f" · {label} {_short(value)}" for label, value in levels)
    svg = panel([line], unit=unit, name=f"{arm}-{index}-{key}", log=log, unit_range=unit_range, levels=levels)
    return {"title": title, "range": told, "svg": svg}


def _short(value: int | float) -> str:
    return (
        f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:.3g}"
        if abs(value) >= 0.001 or value == 0
        else f"{value:.0e}"
    )


def _unfinished(arm: Arm) -> str:
    if not arm.metrics:
        return "" if arm.run.get("stages") else f"{arm.name}: not started"
    last = arm.metrics[-1]
    stages = arm.run.get("stages", ())
    if last["stage_index"] < len(stages) and arm.scores:
        return ""
    where = f"stage {last['stage']}, step {last['step']}"
    return f"{arm.name}: last record in {where}" + ("" if arm.scores else "; no test scores")

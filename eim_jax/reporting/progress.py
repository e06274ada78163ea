"""How far a run is, from the files in its work directory alone: nothing is locked, nothing written."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eim_jax.evaluation.scoring import SCORES
from eim_jax.parallel.lock import Holder, holder_of
from eim_jax.reporting.records import arms_of, check_arm, check_steps, plan_of
from eim_jax.training.log import read_metrics
from eim_jax.utils.console import duration
from eim_jax.utils.files import read_json

_RECENT = 9  # records whose speed the time left is reckoned by
_SILENT = 120.0  # seconds without a record that are said of a run in the middle of a stage


@dataclass(frozen=True)
class StageProgress:
    """A stage: "done", "now" or "ahead"; `step` steps of `steps` (None: not recorded) are logged."""

    name: str
    state: str
    step: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class ArmProgress:
    """An arm's stages, and whether it was scored."""

    name: str
    stages: tuple[StageProgress, ...]
    scored: bool


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      state: "running", "finished", "stopped" (it left with a word) or "died".
      words: the same for a reader, with where it is.
      arms: in the order of training.
    """

    state: str
    words: str
    arms: tuple[ArmProgress, ...]

    @property
    def over(self) -> bool:
        """Whether nothing works on it any more."""
        return self.state != "running"


def read_progress(workdir: Path) -> Progress:
    """Reads how far a run is.

    Args:
      workdir: the run's, with its run.json.

    Raises:
      Damaged, ValueError: a file is not what a run writes; the message names it.
    """
    file = workdir / "run.json"
    run, holder = read_json(file), holder_of(workdir)
    names = arms_of(file, run)
    logs = {name: _steps(workdir / name) for name in names}
    arms = tuple(_arm(workdir / name, plan_of(file, run, name) or _configured(run, name), logs[name]) for name in names)
    complete = all(stage.state == "done" for arm in arms for stage in arm.stages)
    held = holder is not None and holder.alive is not False
    if complete and run.get("finished") and (not held or all(arm.scored for arm in arms)):
        state = "finished"  # whoever holds it trains nothing: --mode=eval, or the same command once more
    elif held:
        state = "running"
    else:
        state = "stopped" if holder is None else "died"
    number = _current(arms, logs)
    where, again = _where(arms[number]), "The same command continues it"
    words = {
        "running": lambda: _running(workdir, arms[number], logs[names[number]], holder),
        "finished": lambda: f"finished {run.get('finished')}" + (f"; in use ({_said(holder)})" if held else ""),
        "stopped": lambda: f"stopped: {where}. {again}",
        "died": lambda: f"ended without a word ({_said(holder)}): {where}. {again}",
    }[state]()
    return Progress(state, words, arms)


def _steps(directory: Path) -> list[dict[str, Any]]:
    rows = read_metrics(directory / "metrics.jsonl")
    check_steps(directory / "metrics.jsonl", rows)
    return rows


def _configured(run: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The stages of an arm by name, from the config of a run that recorded no plan."""
    arm = run.get("config", {}).get("arm", {}).get(name, {})
    return [{"name": stage, "steps": None} for stage in (arm.get("sequence", ()) if isinstance(arm, dict) else ())]


def _arm(directory: Path, plan: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> ArmProgress:
    path = directory / "run.json"
    record = read_json(path) if path.exists() else {}
    check_arm(path, record)
    done = record.get("stages", [])
    stages = []
    for number, planned in enumerate(plan):
        logged = [row["step"] for row in rows if row["stage_index"] == number]
        if number < len(done):
            steps = done[number]["steps"]
            stages.append(StageProgress(planned["name"], "done", steps, steps))
        else:
            state = "now" if logged else "ahead"
            stages.append(StageProgress(planned["name"], state, max(logged, default=0), planned["steps"]))
    return ArmProgress(directory.name, tuple(stages), (directory / SCORES).exists())


def _current(arms: Sequence[ArmProgress], logs: dict[str, list[dict[str, Any]]]) -> int:
    """The arm that is worked on: the first that lacks something, unless a later one has begun."""
    for number, arm in enumerate(arms):
        begun = any(logs[later.name] for later in arms[number + 1 :])
        if any(stage.state != "done" for stage in arm.stages) or not (arm.scored or begun):
            return number
    return len(arms) - 1


def _where(arm: ArmProgress) -> str:
    for number, stage in enumerate(arm.stages, start=1):
        if stage.state != "done":
            of = "" if stage.steps is None else f" of {stage.steps:,}"
            at = f", step {stage.step:,}{of}" if stage.state == "now" else ", not begun"
            return f"arm {arm.name}, stage {stage.name} ({number} of {len(arm.stages)}){at}"
    return f"arm {arm.name}, all {len(arm.stages)} stages trained" + ("" if arm.scored else ", not scored")


def _running(workdir: Path, arm: ArmProgress, rows: Sequence[dict[str, Any]], holder: Holder | None) -> str:
    stage = next((stage for stage in arm.stages if stage.state != "done"), None)
    elsewhere = "" if holder is None or holder.alive else f" ({holder.described}: seen from here by its records alone)"
    if stage is None:
        doing = "scored" if arm.scored else "not scored yet"
        return f"running: arm {arm.name}, all {len(arm.stages)} stages trained, {doing}{elsewhere}"
    where = _where(arm)
    if stage.state == "ahead":
        return f"running: {where.removesuffix(', not begun')}, being prepared{elsewhere}"
    last = (workdir / arm.name / "metrics.jsonl").stat().st_mtime
    if holder is not None and holder.since is not None and holder.since > last:  # stopped before, and continued
        return f"running: {where}, being prepared{elsewhere}"
    silent = max(time.time() - last, 0.0)
    left = _left(stage, [row for row in rows if row["stage_index"] == rows[-1]["stage_index"]], silent)
    late = f", no record for {duration(silent)}" if silent > _SILENT else ""
    return f"running: {where}{left}{late}{elsewhere}"


def _left(stage: StageProgress, rows: Sequence[dict[str, Any]], silent: float) -> str:
    """The time that the stage will take by its last records' speed; "" where nothing is known, or it is late."""
    paces = [row["seconds_per_step"] for row in rows[-_RECENT:] if row.get("seconds_per_step")]
    if not paces or stage.steps is None:
        return ""
    if stage.step >= stage.steps:
        return ", its result is being saved"
    # The median: one record beside a checkpoint or another program is far slower, and says nothing of the next.
    left = (stage.steps - stage.step) * statistics.median(paces) - silent
    return f", {_rough(left)} left in this stage" if left > 0 else ""


def _rough(seconds: float) -> str:
    """A time as exact as an estimate is."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _said(holder: Holder | None) -> str:
    return "" if holder is None else holder.described

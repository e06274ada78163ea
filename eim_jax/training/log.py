"""What a run says while it trains: metrics.jsonl, scalars for trackers, and one bar or plain line a stage."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from eim_jax.training.trackers import TRACKERS, Arm
from eim_jax.utils.console import console, duration, print_table, progress
from eim_jax.utils.files import write_text

SCORED = ("eval/", "train/")  # keys of scores while training

__all__ = ["RunLog", "StageInfo", "Trained", "console", "print_stage", "print_table", "progress", "read_metrics"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """One path pattern of a stage: how many leaves and parameters it selects."""

    pattern: str
    leaves: int
    params: int


@dataclasses.dataclass(frozen=True)
class StageInfo:
    """What a stage trains and for how long; the field names are those of the arm's run.json."""

    name: str
    losses: Mapping[str, int | float]
    trained: tuple[Trained, ...]
    total_params: int
    steps: int
    epochs: int | float
    batch: int

    @property
    def trained_params(self) -> int:
        """Parameters that this stage changes."""
        return sum(row.params for row in self.trained)


def print_stage(stage: StageInfo, number: int = 1, of: int = 1, arm: str = "") -> None:
    """Prints what a stage trains: each pattern's leaves, parameters and share of the whole, and what stays frozen."""
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in stage.losses.items())
    title = f"{arm} · " if arm else ""
    title += f"stage {number}/{of}: {stage.name} · loss = {losses} · "
    title += f"{stage.steps:,} steps of batch {stage.batch} ({stage.epochs:g} epochs)"
    patterns = [(row.pattern, f"{row.leaves:,}", row.params) for row in stage.trained]
    summed = (
        ("trained", f"{sum(row.leaves for row in stage.trained):,}", stage.trained_params),
        ("frozen", "", stage.total_params - stage.trained_params),
    )
    total = max(stage.total_params, 1)
    console.print(title, style="bold", soft_wrap=True)  # as the table's own title it would wrap at the table's width
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("trains", overflow="fold")
    for name in ("leaves", "parameters", "share"):
        table.add_column(name, justify="right")
    for rows in (patterns, summed):
        for name, leaves, params in rows:
            table.add_row(name, leaves, f"{params:,}", f"{100 * params / total:.2f} %")
        table.add_section()
    console.print(table)


def read_metrics(path: Path) -> list[dict]:
    """Reads metrics.jsonl; a last line cut off by a kill is left out, a broken line elsewhere is a ValueError."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON record: delete this line") from error
            continue
        if not isinstance(records[-1], dict):
            raise ValueError(f"{path}:{number}: not a JSON record: delete this line")
        for field in ("stage_index", "step"):  # by which a run that goes on finds its place
            if type(records[-1].get(field, 0)) is not int:
                found = records[-1][field]
                raise ValueError(f"{path}:{number}: {field} is {found!a:.60}, not a whole number: delete this line")
    return records


def format_record(record: Mapping[str, object]) -> str:
    """One record as the terminal shows it: losses, recall@1 of the queues, learning rates, speed, shares."""
    parts = []
    for key, value in record.items():
        if key == "loss" or key.startswith("loss/"):
            parts.append(f"{key.removeprefix('loss/')} {_number(value)}")
    for key, value in record.items():
        if key.startswith("queue/") and key.endswith("/recall1"):
            parts.append(f"r@1 {key.split('/')[1]} {_number(value, '.3f')}")
    parts += [f"{key} {_number(value)}" for key, value in record.items() if _is_shown_score(key)]
    rates = {key[3:]: value for key, value in record.items() if key.startswith("lr/")}
    if len(set(rates.values())) == 1:
        rates = {"": next(iter(rates.values()))}
    parts += [f"lr {group} {_number(value, '.2e')}".replace("  ", " ") for group, value in rates.items()]
    if "examples_per_second" in record:
        rate = record["examples_per_second"]
        slow = isinstance(rate, int | float) and rate < 10
        parts.append(f"{_number(rate, '7.2f' if slow else '7,.0f')} ex/s")
    seconds = record.get("seconds_per_step")
    if isinstance(seconds, int | float) and seconds >= 1:
        parts.append(f"{seconds:.3g} s/step")
    if "mfu" in record:
        parts.append(f"mfu {_number(record['mfu'], '.1%')}")
    if "data_wait" in record:
        parts.append(f"wait {_number(record['data_wait'], '.0%')}")
    parts += [f"{kind} {_number(record[kind], '.0%')}" for kind in ("host", "device") if kind in record]
    if "padding" in record:
        parts.append(f"pad {_number(record['padding'], '.0%')}")
    return "  ".join(parts)


def _is_shown_score(key: str) -> bool:
    """Whether a score has room on a line: no part of another one, no likelihood with other pictures."""
    whole = key.count("/") == 1 or key.endswith(("/Avg", "/total"))
    return key.startswith(SCORED) and whole and "/nll_" not in key


def _number(value: object, form: str = ".4f") -> str:
    return "nan" if value is None else value if isinstance(value, str) else format(value, form)


class _StageBar(Progress):
    """A bar with the latest record below it."""

    line = Text()

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then the record (called by rich at every refresh)."""
        yield self.make_tasks_table(self.tasks)
        yield self.line


class RunLog:
    """Writes one arm's records to metrics.jsonl, the trackers and the terminal.

    A record holds at least "stage_index" and "step" (in its stage). Open with `RunLog.open`, use as a context manager.
    """

    def __init__(
        self,
        directory: Path,
        stages: Sequence[StageInfo],
        resume_at: tuple[int, int],
        enabled: bool,
        trackers: Sequence[str],
        config: Mapping[str, Any] | None,
    ):
        self.arm, self._stages, self._enabled, self._resume_at = directory.name, tuple(stages), enabled, resume_at
        self._offsets = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages))]
        self._stage: int | None = None
        self._bar: _StageBar | None = None
        self._record: dict = {}
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        _truncate(path, resume_at)
        self._file = path.open("a")
        arm = Arm(directory, self._cumulative(*resume_at), config or {})
        self._trackers = [TRACKERS[name].open(arm) for name in trackers]

    @classmethod
    def open(
        cls,
        directory: Path,
        stages: Sequence[StageInfo],
        resume_at: tuple[int, int] | None = None,
        *,
        enabled: bool = True,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> "RunLog":
        """Opens an arm's log; `resume_at` is the first (stage_index, step) that will be written again, None a new run.

        Lines at or after `resume_at` are removed first, so that no step appears twice. With several processes only one
        may write: pass `enabled=False` on the others, where every call then does nothing.
        `trackers` are names of TRACKERS, to which the scalars go too, with `config`, the run's as plain values.
        """
        return cls(directory, stages, resume_at or (0, 0), enabled, trackers, config)

    def __enter__(self) -> "RunLog":
        """The log itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes; an exception in flight is told as an early stop."""
        self.close(finished=kind is None)

    def start_stage(self, index: int) -> None:
        """Prints the stage's table and starts its bar; `write` does it where the caller has not."""
        if not self._enabled or index == self._stage:
            return
        self._end_stage(finished=True)
        stage = self._stages[index]
        print_stage(stage, index + 1, len(self._stages), self.arm)
        self._stage, self._record, self._start = index, {}, time.monotonic()
        # Time and step of the first record: what precedes it is mostly compilation, no guide to the time left.
        self._pace: tuple[float, int] | None = None
        self._first = self._resume_at[1] if index == self._resume_at[0] else 0
        if console.is_interactive:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("eta {task.fields[eta]}"),
            )
            self._bar = _StageBar(*columns, console=console, transient=True)
            self._task = self._bar.add_task(
                f"{self.arm} {stage.name}", total=stage.steps, completed=self._first, eta="-"
            )
            self._bar.start()

    def write(self, record: Mapping[str, Any], as_step: int | None = None) -> None:
        """Appends a record (flushed), its scalars at the cumulative step, and shows it; nan and inf become null.

        Args:
          record: what a step found.
          as_step: the step of the stage at which trackers get it; None: the record's.
        """
        if not self._enabled:
            return
        record = {key: _plain(value) for key, value in record.items()}
        index, step = record["stage_index"], record["step"]
        self.start_stage(index)
        self._record = record
        stored = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(stored) + "\n")
        self._file.flush()
        scalars = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("stage_index", "step")
        }
        for tracker in self._trackers:
            tracker.write(scalars, self._cumulative(index, step if as_step is None else as_step))
        total, text = self._stages[index].steps, format_record(record)
        now = time.monotonic()
        since, first = self._pace = self._pace or (now, step)
        eta = duration((now - since) / (step - first) * max(total - step, 0)) if step > first else "-"
        if self._bar:
            self._bar.line = Text(f"  {text}", style="dim", overflow="ellipsis", no_wrap=True)
            self._bar.update(self._task, completed=step, eta=eta)
        else:
            counter = f"{step:>{len(str(total))}}/{total}"
            console.print(f"{self.arm} {self._stages[index].name} {counter}  eta {eta:>7}  {text}", soft_wrap=True)

    def close(self, finished: bool = True) -> None:
        """Ends the stage's bar and closes the files; `finished=False` says that the run stopped early."""
        if not self._enabled:
            return
        self._end_stage(finished)
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _end_stage(self, finished: bool) -> None:
        if self._stage is None:
            return
        stage, step = self._stages[self._stage], self._record.get("step", self._first)
        if self._bar:
            self._bar.update(self._task, completed=stage.steps if finished else step)
            self._bar.stop()
            self._bar = None
        how = f"done, {stage.steps} steps" if finished else f"stopped at step {step} of {stage.steps}"
        seconds = duration(time.monotonic() - self._start)
        console.print(
            f"{self.arm} {stage.name} {how} in {seconds}  {format_record(self._record)}".rstrip(), soft_wrap=True
        )
        self._stage = None

    def _cumulative(self, index: int, step: int) -> int:
        return self._offsets[index] + step if index < len(self._stages) else sum(s.steps for s in self._stages) + step


def _plain(value: Any) -> Any:
    """A Python number from a NumPy or JAX scalar."""
    return value.item() if hasattr(value, "item") else value


def _truncate(path: Path, resume_at: tuple[int, int]) -> None:
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if (r.get("stage_index", 0), r.get("step", 0)) < resume_at]
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

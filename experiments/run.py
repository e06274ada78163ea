"""Runs the cells of tables, each once, and continues what was begun.

python -m experiments.run --table=3 --scale=miniature --seeds=5 --jobs=2
"""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from eim_jax.training.log import read_metrics
from eim_jax.utils.console import console, duration
from experiments import design, results
from experiments.cells import BUDGETS, DEFAULT, SCALES, Cell, Row, cell
from experiments.pace import paces
from experiments.tables import TABLES, rows_of

SECOND = ", ".join(table.name for table in design.TABLES)
TABLE = f"all (but those of the second design: {SECOND}), or some of {', '.join(TABLES)}, separated by commas"
RUNS = Path("runs/experiments")
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # less time on the CPU (benchmarks/huge_pages.py)
SEEDS = 5  # of rows whose number nothing says
HEADS = ("Bleu_4", "accuracy/Avg", "mme/sum", "mme/total")  # the score that the terminal shows


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing of the tables asked for; exits with 1 if a cell failed."""
    options = parse(arguments)
    rows = chosen(options)
    wanted = cells(rows, options)
    missing = [one for one in wanted if results.read(options.out, one) is None]
    console.print(f"{len(wanted)} cells of {len(rows)} rows, {len(wanted) - len(missing)} finished", soft_wrap=True)
    if options.dry:
        for one in missing:
            console.print(f"{one.name}: {shlex.join(command(one, workdir_of(options.runs, one)))}", soft_wrap=True)
        return
    failed = Pool(options.jobs, options.out, options.runs).run(missing)
    if failed:
        sys.exit("failed:\n" + "\n".join(f"  {name}: {why}" for name, why in failed.items()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="all", help=TABLE)
    parser.add_argument("--scale", choices=SCALES, default="miniature")
    parser.add_argument(
        "--seeds", type=int, help="seeds 0 ... N-1; default: a row's own number, where it has one, or 5"
    )
    parser.add_argument("--rows", default="", help="only these rows, separated by commas")
    budget = (
        "steps (the miniature's default): every row the same number of steps; "
        "time: the baseline's seconds; paper (full's default): every stage its config's own epochs"
    )
    parser.add_argument("--budget", choices=BUDGETS, help=budget)
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells at a time, each on its share of the GPUs and CPU cores"
    )
    parser.add_argument("--out", type=Path, default=results.OUT)
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the runs keep their work directories")
    parser.add_argument("--dry", action="store_true", help="print the commands of what is missing, run nothing")
    options = parser.parse_args(arguments)
    options.budget = options.budget or DEFAULT[options.scale]
    unknown = [name for name in options.table.split(",") if name != "all" and name not in TABLES]
    if unknown:
        parser.error(f"--table={unknown[0]}: it is all or one of {', '.join(TABLES)}")
    known = {row.name for table in TABLES.values() for row in table.rows}
    if strange := [name for name in options.rows.split(",") if name and name not in known]:
        parser.error(f"--rows={strange[0]}: no such row; there are {', '.join(sorted(known))}")
    if (options.seeds is not None and options.seeds < 1) or options.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    return options


def chosen(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for."""
    first = [table for table in TABLES.values() if table not in design.TABLES]  # "all" is the first design's
    tables = first if options.table == "all" else [TABLES[name] for name in options.table.split(",")]
    rows = rows_of(tables, options.scale, options.budget)
    return [row for row in rows if row.name in options.rows.split(",")] if options.rows else rows


def cells(rows: list[Row], options: argparse.Namespace) -> list[Cell]:
    """The rows' cells, whole seeds first, each cell once."""
    pace = paces(options.out, rows, options.scale, keep=not options.dry) if options.budget == "time" else {}
    found, most = {}, {row.name: _seeds(row, options.seeds) for row in rows}
    for seed in range(max(most.values(), default=0)):
        for row in (row for row in rows if seed < most[row.name]):
            one = cell(row, options.scale, seed, options.budget, pace.get(row.name, 1.0))
            found.setdefault(one.hash, one)
    return list(found.values())


def _seeds(row: Row, asked: int | None) -> int:
    """A row's seeds: those asked for, of a row whose design gives it a number no more than that."""
    return min(asked or row.seeds, row.seeds) if row.seeds else asked or SEEDS


def command(one: Cell, workdir: Path) -> list[str]:
    """The run of a cell, as anybody can repeat it."""
    return ["python", "-m", "eim_jax.main", *one.flags(), f"--workdir={workdir}"]


def workdir_of(runs: Path, one: Cell) -> Path:
    """The work directory of a cell's run."""
    return runs / one.scale / one.name


@dataclass
class Job:
    """A cell that is being run."""

    cell: Cell
    workdir: Path
    process: subprocess.Popen
    locks: tuple[IO, ...]
    started: float


class Pool:
    """Runs cells as subprocesses, `jobs` at a time; a signal is handed on, so that each run saves its state.

    A run holds the lock of its work directory and of a cache folder as long as it lives, also when this process is
    killed: no second run enters them.
    """

    def __init__(self, jobs: int, out: Path, runs: Path):
        self._jobs, self._out, self._runs, self._gpus = jobs, out, runs, gpus()
        self._running: dict[int, Job] = {}
        self._failed: dict[str, str] = {}
        self._stopping = False

    def run(self, waiting: list[Cell]) -> dict[str, str]:
        """Runs all cells; {name: what went wrong} of those that failed. Raises SystemExit after a signal."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[on]}"))
        waiting, total = list(waiting), len(waiting)
        try:
            with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bar:
                task = bar.add_task("cells", total=total, on="")
                while self._running or (waiting and not self._stopping):
                    while waiting and len(self._running) < self._jobs and not self._stopping:
                        self._start(waiting.pop(0))
                    time.sleep(0.3)
                    self._reap(total - len(waiting), total)
                    done = total - len(waiting) - len(self._running)
                    bar.update(task, completed=done, on="  ".join(map(_where, self._running.values())))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopping:
            sys.exit("stopped: the same command continues")
        return self._failed

    def _start(self, one: Cell) -> None:
        workdir = workdir_of(self._runs, one)
        workdir.mkdir(parents=True, exist_ok=True)
        mine = _lock(workdir / "lock")
        if mine is None:
            self._failed[one.name] = f"another process is running it in {workdir}: call again when it has ended"
            return
        results.note_commit(workdir)
        slot, cache = self._cache()
        flags = [*command(one, workdir)[1:], f"--config.data.cache={self._runs / f'cache{slot}'}"]
        locks, env = (mine, cache), {"GLIBC_TUNABLES": HUGE_PAGES, **os.environ}
        if self._gpus:
            own = self._gpus[slot % self._jobs :: self._jobs] or [self._gpus[slot % len(self._gpus)]]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        with (workdir / "log.txt").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches a run through this process alone
                pass_fds=[lock.fileno() for lock in locks],
                env=env,
            )
        if hasattr(os, "sched_setaffinity"):  # before it has threads: they inherit it
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(process.pid, set(cores[slot % self._jobs :: self._jobs]) or set(cores))
        self._running[slot] = Job(one, workdir, process, locks, time.monotonic())
        if self._stopping:  # the signal came while the process was being started
            process.terminate()
        if not console.is_interactive:
            console.print(f"started {one.name}", soft_wrap=True)

    def _cache(self) -> tuple[int, IO]:
        """The first cache folder that no run uses: features and compiled programs are shared from run to run."""
        slot = 0
        while True:
            (self._runs / f"cache{slot}").mkdir(parents=True, exist_ok=True)
            lock = _lock(self._runs / f"cache{slot}" / "lock")
            if lock is not None:
                return slot, lock
            slot += 1

    def _reap(self, begun: int, total: int) -> None:
        for slot, job in list(self._running.items()):
            if job.process.poll() is None:
                continue
            del self._running[slot]
            for lock in job.locks:
                lock.close()
            if job.process.returncode:
                if not self._stopping:
                    tail = (job.workdir / "log.txt").read_text().strip().splitlines()[-3:]
                    self._failed[job.cell.name] = " | ".join(tail) or f"exit status {job.process.returncode}"
                    console.print(f"failed {job.cell.name}: {job.workdir / 'log.txt'}", soft_wrap=True)
                continue
            try:
                found = results.save(self._out, job.cell, job.workdir)
            except (OSError, ValueError, KeyError) as error:  # the other cells go on
                self._failed[job.cell.name] = f"its run ended, but its result cannot be read: {error!r}"
                console.print(f"failed {job.cell.name}: {error!r}", soft_wrap=True)
                continue
            name, value = next(((key, found["scores"][key]) for key in HEADS if key in found["scores"]), ("", 0.0))
            took = duration(time.monotonic() - job.started)
            count = f"{begun - len(self._running)}/{total}"
            console.print(f"finished {job.cell.name} in {took} ({count}): {name} {value:.3f}", soft_wrap=True)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        for job in self._running.values():
            job.process.terminate()


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(("nvidia-smi", "--list-gpus"), capture_output=True, text=True).stdout.splitlines()
    return [str(place) for place in range(len(listed))]


def _lock(file: Path) -> IO | None:
    """The open file while this process and its children hold it; None if another does."""
    handle = file.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def _where(job: Job) -> str:
    rows = read_metrics(job.workdir / job.cell.row.arm / "metrics.jsonl")
    at = f"{rows[-1]['stage']} {rows[-1]['step']}" if rows else "starting"
    return f"{job.cell.row.name}-s{job.cell.seed}: {at}"


if __name__ == "__main__":
    main()

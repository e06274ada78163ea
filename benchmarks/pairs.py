"""Interleaved timing of the same work in JAX and in PyTorch, and the table that reports it."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Pair(NamedTuple):
    """One row of the table: two functions that do the same work and return when it is done."""

    name: str
    jax: Callable[[], object]
    torch: Callable[[], object]
    per: int = 1  # divides the times, e.g. captions in a call


def cores() -> int:
    """Cores that this process may use (`taskset -c 0` pins both sides to one)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def machine(*packages: str) -> str:
    """The date, the machine and the packages' versions, for the head of a table."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    place = f"{platform.machine()}, {cores()} core(s), Python {platform.python_version()}"
    return f"{datetime.date.today()}, {place}, {versions}"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve(work: Callable[[], object]) -> None:
    """Answers each line of standard input with the seconds that one call takes, after one warm-up."""
    work()
    for _ in sys.stdin:
        print(_seconds(work), flush=True)


class Worker:
    """This script again, in a process of its own that holds one side alone and calls `serve`: with both in one
    process, each library's waiting threads take time from the other."""

    def __init__(self, side: str):
        command = [sys.executable, *sys.argv, f"--side={side}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self) -> float:
        """Of one call. Raises RuntimeError when the process has ended."""
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def report_apart(title: str, work: str, repeats: int) -> None:
    """As `report` for one pair whose sides, "jax" and "torch", run in processes of their own, one waiting for the
    other."""
    print(f"## {title}\n")
    print(machine("jax", "flax", "optax", "torch", "transformers"))
    print(f"Command: {' '.join(['python', *sys.argv])}; {repeats} interleaved pairs in two processes, medians.\n")
    print("| work | JAX ms | PyTorch ms | PyTorch / JAX |\n|---|---|---|---|", flush=True)
    workers = [Worker("jax"), Worker("torch")]
    times = [[worker.seconds() for worker in workers] for _ in range(1 + repeats)][1:]
    for worker in workers:
        worker.close()
    jax_ms, torch_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    print(f"| {work} | {jax_ms:.0f} | {torch_ms:.0f} | {statistics.median(t / j for j, t in times):.2f} |", flush=True)


def report(title: str, pairs: list[Pair], repeats: int) -> None:
    """Runs JAX and PyTorch in turn, `repeats` times after one warm-up each, and prints medians.

    The ratio is the median of the pairs' own ratios, which a machine that is busy at times disturbs least.
    """
    print(f"## {title}\n")
    print(machine("jax", "flax", "optax", "torch", "transformers"))
    print(f"Command: {' '.join(['python', *sys.argv])}; {repeats} interleaved pairs, medians.\n")
    print("| work | JAX ms | PyTorch ms | PyTorch / JAX |\n|---|---|---|---|", flush=True)
    for pair in pairs:
        pair.jax(), pair.torch()
        times = [(_seconds(pair.jax), _seconds(pair.torch)) for _ in range(repeats)]
        jax_ms, torch_ms = (1e3 * statistics.median(column) / pair.per for column in zip(*times, strict=True))
        ratio = statistics.median(t / j for j, t in times)
        print(f"| {pair.name} | {jax_ms:.0f} | {torch_ms:.0f} | {ratio:.2f} |", flush=True)

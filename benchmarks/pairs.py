"""Interleaved timing of the same work in JAX and in PyTorch, and the table that reports it."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from eim_jax.utils.cpu import cpu_model, vector_units


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
    place = f"{cpu_model()} ({', '.join(vector_units()) or platform.machine()}), {cores()} core(s)"
    place += f", Python {platform.python_version()}"
    return f"{datetime.date.today()}, {place}, {versions}"


def _seconds(work: Callable[[], object]) -> float:
    clock = timer()
    start = clock()
    work()
    return clock() - start


def timer() -> Callable[[], float]:
    """The clock to measure with: on one core that core's own time, which other work beside hardly changes."""
    return time.process_time if cores() == 1 else time.perf_counter


def report(title: str, pairs: Iterable[Pair], repeats: int) -> None:
    """Runs JAX and PyTorch in turn, `repeats` times after one warm-up each, and prints medians.

    The ratio is the median of the pairs' own ratios, which a machine that is busy at times disturbs least. On one core
    its own times are taken, which others' work can only lengthen: the fastest of each side, and their ratio.
    """
    alone = cores() == 1
    form = "the fastest by the core's own time" if alone else "medians"
    print(f"## {title}\n")
    print(machine("jax", "flax", "optax", "torch", "transformers"))
    print(f"Command: {' '.join(['python', *sys.argv])}; {repeats} interleaved pairs, {form}.\n")
    print("| work | JAX ms | PyTorch ms | PyTorch / JAX |\n|---|---|---|---|", flush=True)
    for pair in pairs:
        pair.jax(), pair.torch()
        times = [(_seconds(pair.jax), _seconds(pair.torch)) for _ in range(repeats)]
        middle = min if alone else statistics.median
        jax_ms, torch_ms = (1e3 * middle(column) / pair.per for column in zip(*times, strict=True))
        ratio = torch_ms / jax_ms if alone else statistics.median(t / j for j, t in times)
        print(f"| {pair.name} | {jax_ms:.0f} | {torch_ms:.0f} | {ratio:.2f} |", flush=True)

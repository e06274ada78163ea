"""Time and peak memory of a training step on the CPU, without and with huge pages for what malloc maps.

python benchmarks/huge_pages.py [--size miniature|full] [--stage base|st|lm|ie] [--batch 40] [--steps 30] [--rounds 3]
GLIBC_TUNABLES is read as a process starts, so each measurement is a process of its own, in turn: the median of its
steps after two. The ratio is the median of the rounds'.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
from clipcap_case import SIZES, STAGES, clipcap_case
from pairs import machine
from step_case import Updates

SIDES = {"as it comes": "", "huge pages": "glibc.malloc.hugetlb=1"}
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main() -> None:
    """Prints one table; with --measure, one process's figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="miniature")
    parser.add_argument("--stage", choices=STAGES, default="base")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    print(f"## A step of ClipCap's stage {options.stage}, {options.size}, batch {options.batch}, float32\n")
    print(machine("jax"))
    print(f"transparent_hugepage: {SYSTEM.read_text().strip() if SYSTEM.exists() else 'not there'}")
    print(f"Command: {' '.join(['python', *sys.argv])}\n")
    found = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, tunables in SIDES.items():
            command, env = [sys.executable, *sys.argv, "--measure"], {**os.environ, "GLIBC_TUNABLES": tunables}
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            found[side].append(json.loads(ended.stdout))
    print("| memory | ms a step | of these the kernel's | peak memory, MiB |\n|---|---|---|---|")
    for side, rounds in found.items():
        ms, kernel, mib = (statistics.median(one[key] for one in rounds) for key in ("ms", "kernel", "mib"))
        print(f"| {side} | {ms:.0f} | {kernel:.0f} | {mib:.0f} |")
    ratio = statistics.median(a["ms"] / b["ms"] for a, b in zip(*found.values(), strict=True))
    print(f"\nas it comes / huge pages: {ratio:.2f}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a step in this process, the kernel's CPU milliseconds a step, and the peak memory."""
    case = clipcap_case(SIZES[options.size], options.stage, batch=options.batch, dtype="float32", dropout=0.1)
    step = Updates(case).run
    for _ in range(2):
        jax.block_until_ready(step())
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_stime, []
    for _ in range(options.steps):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    kernel = 1000 * (usage.ru_stime - before) / options.steps
    return {"ms": 1000 * statistics.median(times), "kernel": kernel, "mib": usage.ru_maxrss / 1024}


if __name__ == "__main__":
    main()

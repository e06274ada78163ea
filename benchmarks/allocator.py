"""Time and peak memory of a training step on the CPU, with freed memory kept by the process and given back.

python benchmarks/allocator.py [--size miniature|full] [--stage base|st|lm|ie] [--batch 40] [--steps 30] [--rounds 3]
Each measurement is a process of its own, in turn; a row is the median of a process's steps after two, and the ratio is
the median of the rounds'.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
from clipcap_case import SIZES, STAGES, clipcap_case
from pairs import machine
from step_case import Updates

from eim_jax.allocator import keep_freed_memory


def main() -> None:
    """Prints one table; with --side, measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="miniature")
    parser.add_argument("--stage", choices=STAGES, default="base")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("kept", "returned"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    print(f"## A step of ClipCap's stage {options.stage}, {options.size}, batch {options.batch}, float32\n")
    print(machine("jax"))
    print(f"Command: {' '.join(['python', *sys.argv])}\n")
    sides = {"returned": [], "kept": []}
    for _ in range(options.rounds):
        for side, found in sides.items():
            command = [sys.executable, *sys.argv, f"--side={side}"]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("| freed memory is | ms a step | peak memory, MiB |\n|---|---|---|")
    for side, found in sides.items():
        ms, mib = (statistics.median(one[key] for one in found) for key in ("ms", "mib"))
        print(f"| {side} | {ms:.0f} | {mib:.0f} |")
    ratio = statistics.median(a["ms"] / b["ms"] for a, b in zip(*sides.values(), strict=True))
    print(f"\nreturned / kept: {ratio:.2f}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a step in this process, and its peak resident memory."""
    if options.side == "kept" and not keep_freed_memory():
        raise SystemExit("error: no glibc here, or JAX with a plugin for an accelerator: nothing to compare")
    step = Updates(
        clipcap_case(SIZES[options.size], options.stage, batch=options.batch, dtype="float32", dropout=0.1)
    ).run
    times = []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": 1000 * statistics.median(times[2:]), "mib": peak}


if __name__ == "__main__":
    main()

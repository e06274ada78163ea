"""What saving costs a training run: the seconds that a save blocks, and by how much the steps slow down behind it.

python benchmarks/checkpoint_cost.py [--size full|tiny] [--stage ie] [--batch 40] [--after 8] [--rounds 3]
The stage's own step and the package's own StageCheckpoints, on random weights. Each round times steps alone, then a
save (the finite check, the copy from the device, the iterator's state) and the steps while it is written behind them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from clipcap_case import SIZES, STAGES, clipcap_case
from step_case import arrays, nbytes

from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.monitor import check_finite


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--stage", choices=sorted(STAGES), default="ie")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--after", type=int, default=8, help="steps behind each save")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1000, help="config.checkpoint.every_steps")
    parser.add_argument("--folder", default=None, help="where to save; a temporary folder by default")
    options = parser.parse_args()

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    case = clipcap_case(SIZES[options.size], options.stage, batch=options.batch, dtype=dtype)
    trained, state, frozen, batch, queues, key = arrays(case)
    saved = nbytes(trained) + nbytes(state)
    iterator = iter(grain.MapDataset.range(1 << 20).to_iter_dataset())
    number = 0

    def steps(count: int) -> float:
        nonlocal trained, state, number
        begun = time.perf_counter()
        for _ in range(count):
            trained, state, metrics = case.step(trained, state, frozen, batch, queues, key, jnp.int32(number))
            next(iterator)
            number += 1
        jax.block_until_ready(metrics)
        return time.perf_counter() - begun

    steps(2)
    check_finite(trained, options.stage, number)  # compiled at a stage's first save
    alone, finite, blocked, slower, left = [], [], [], [], []
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, StageCheckpoints(Path(folder)) as store:
        store.save(number, trained, state, iterator, {"seconds": 0.0})  # makes the folders and starts the threads
        store.wait()
        for _ in range(options.rounds):
            alone.append(steps(options.after) / options.after)
            begun = time.perf_counter()
            check_finite(trained, options.stage, number)
            checked = time.perf_counter()
            store.save(number, trained, state, iterator, {"seconds": 0.0})
            finite.append(checked - begun)
            blocked.append(time.perf_counter() - checked)
            slower.append(steps(options.after) - options.after * alone[-1])
            begun = time.perf_counter()
            store.wait()
            left.append(time.perf_counter() - begun)
    step = statistics.median(alone)
    cost = [statistics.median(times) for times in (finite, blocked, slower, left)]
    share = (cost[0] + cost[1] + max(cost[2], 0.0)) / (options.every * step)
    device = jax.devices()[0].device_kind
    print(f"{options.size} {options.stage}, batch {options.batch}, {dtype}, {device}: saves {saved / 2**20:,.0f} MiB")
    print("| step | finite check | save blocks | steps behind it slower by | still writing after | share of the run |")
    print("|---|---|---|---|---|---|")
    cells = " | ".join(f"{seconds * 1000:,.0f} ms" for seconds in (step, *cost))
    print(f"| {cells} | {share:.2%} at a save every {options.every:,} steps |")


if __name__ == "__main__":
    main()

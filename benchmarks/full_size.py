"""A few steps of every stage at full size (ViT-B/32 + GPT-2 small shapes) on real photos: time and memory of a step.

python benchmarks/full_size.py --annotations=captions.json --images=photos/ --towers=towers [--steps 4] [--batch 40]
`towers` holds clip/ and lm/ (scripts/make_towers.py writes random ones). The ST stage alone then runs twice, with
CLIP's features cached and without. Runs `python -m eim_jax.main` and reads what it records.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs import machine


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--towers", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=40)
    options = parser.parse_args()
    # Without prompts in both ST rows, so that they differ in the cache alone.
    alone = ["--config.arm.eim.sequence=('st',)", "--config.arm.eim.prompts=0"]
    rows = [(*row, "computed" if row[0] == "ie" else "cached") for row in run(options, [])]
    for cached, word in (("True", "cached"), ("False", "computed")):
        rows += [
            (*row, f"{word}, no prompts") for row in run(options, [*alone, f"--config.data.cache_features={cached}"])
        ]
    print(machine("jax", "flax", "optax"))
    print(f"$ python benchmarks/full_size.py --steps {options.steps} --batch {options.batch} ...\n")
    print("| stage | CLIP's features | s a step (median) | step's memory, GiB | trained parameters |")
    print("|---|---|---|---|---|")
    for name, seconds, memory, trained, features in rows:
        features = "none read" if name == "lm" else features
        print(f"| {name} | {features} | {seconds:.2f} | {memory:.2f} | {trained:,} |")
    uncached, cached = rows[-1][1], rows[-2][1]
    print(f"\nThe ST stage without cached features takes {uncached / cached:.1f} times as long a step.")


def run(options: argparse.Namespace, more: list[str]) -> list[tuple[str, float, float, int]]:
    """Returns (stage, median seconds a step after the first, GiB, trained parameters) of each stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "eim_jax.main",
            "--config=configs/photos.py",
            f"--workdir={folder}/run",
            f"--config.data.annotations={options.annotations}",
            f"--config.data.images={options.images}",
            f"--config.towers.clip={options.towers / 'clip'}",
            f"--config.towers.lm={options.towers / 'lm'}",
            "--config.log_every=1",
            "--config.data.eval_limit=2",
            "--config.decode.methods=('greedy',)",
            "--config.decode.max_tokens=8",
            "--config.decode.batch=2",
            *more,
        ]
        for stage in ("st", "lm", "ie"):
            command += [f"--config.stages.{stage}.steps={options.steps}", f"--config.stages.{stage}.warmup_steps=1"]
            command.append(f"--config.stages.{stage}.batch={options.batch}")
        subprocess.run(command, check=True)
        lines = [json.loads(line) for line in (Path(folder) / "run/eim/metrics.jsonl").read_text().splitlines()]
        record = json.loads((Path(folder) / "run/eim/run.json").read_text())
    found = []
    for stage in record["stages"]:
        rates = [line["examples_per_second"] for line in lines if line["stage"] == stage["name"] and line["step"] > 1]
        seconds = statistics.median(options.batch / rate for rate in rates)
        found.append((stage["name"], seconds, stage["peak_memory_bytes"] / 2**30, stage["trained_params"]))
    return found


if __name__ == "__main__":
    main()

"""Mean and spread over seeds of finished runs of one config, and the paired difference of their first two arms.

python experiments/seeds.py runs/seed0 runs/seed1 runs/seed2
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from eim_jax.config import from_config_dict
from eim_jax.reporting.scores import columns, flatten
from eim_jax.training.kinds import differences


def main() -> None:
    """Prints one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    workdirs = parser.parse_args().workdirs
    records = [json.loads((folder / "run.json").read_text()) for folder in workdirs]
    configs = [replace(from_config_dict(record["config"]), seed=0) for record in records]
    for folder, config in zip(workdirs, configs, strict=True):
        if different := differences(configs[0], config):
            raise SystemExit(f"error: {folder} differs from {workdirs[0]} in more than its seed: {different}")
    seeds = [r["config"]["seed"] for r in records]
    if len(set(seeds)) != len(seeds):
        raise SystemExit(f"error: the same seed twice: {seeds}")
    arms = records[0]["config"]["arms"]
    scores = {arm: [json.loads((folder / arm / "scores_test.json").read_text()) for folder in workdirs] for arm in arms}
    method = next(iter(scores[arms[0]][0]))
    print(f"seeds {', '.join(map(str, seeds))}; {method} decoding; mean ± standard deviation over seeds\n")
    print("|  |", " | ".join([*arms, f"{arms[1]} - {arms[0]}"] if len(arms) > 1 else arms), "|")
    print("|---|" + "---|" * (len(arms) + (len(arms) > 1)))
    for metric in columns([run for runs in scores.values() for run in runs]):
        if metric.seeds is None:
            continue
        found = {arm: [flatten(run[method]).get(metric.key) for run in runs] for arm, runs in scores.items()}
        values = {arm: [metric.factor * x for x in column if x is not None] for arm, column in found.items()}
        if any(len(found) != len(workdirs) for found in values.values()):
            continue
        cells = [_cell(values[arm], metric.decimals) for arm in arms]
        if len(arms) > 1:
            paired = [b - a for a, b in zip(values[arms[0]], values[arms[1]], strict=True)]
            cells.append(_cell(paired, metric.decimals, sign="+"))
        print("|", " | ".join([metric.seeds or metric.title, *cells]), "|")


def _cell(values: list[float], decimals: int, sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()

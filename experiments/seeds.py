"""Mean and spread over seeds of finished runs of one config, and the paired difference of their first two arms.

python experiments/seeds.py runs/seed0 runs/seed1 runs/seed2
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from eim_jax.config import from_config_dict
from eim_jax.training.kinds import differences

SCORES = {  # key in scores_test.json: (title, factor, decimals)
    "Bleu_4": ("BLEU-4", 100, 1),
    "METEOR": ("METEOR", 100, 1),
    "ROUGE_L": ("ROUGE-L", 100, 1),
    "CIDEr": ("CIDEr", 100, 1),
    "accuracy/Avg": ("accuracy", 100, 1),
    "accuracy/IMG": ("accuracy, with a picture", 100, 1),
    "accuracy/TXT": ("accuracy, with a hint", 100, 1),
    "accuracy/NO": ("accuracy, neither", 100, 1),
    "unparsed": ("no option named, % of answers", 100, 1),
    "mme/existence": ("existence, of 200", 1, 1),
    "mme/count": ("count, of 200", 1, 1),
    "mme/position": ("position, of 200", 1, 1),
    "mme/color": ("color, of 200", 1, 1),
    "mme/commonsense_reasoning": ("commonsense reasoning, of 200", 1, 1),
    "mme/numerical_calculation": ("numerical calculation, of 200", 1, 1),
    "mme/sum": ("sum, of 1,200", 1, 1),
    "nll": ("NLL, nats a token", 1, 3),
    "nll_image": ("NLL about pictures", 1, 3),
    "nll_image_shuffled": ("NLL about pictures, another shown", 1, 3),
    "shape_colour_f1": ("object F1", 100, 1),
    "shape_colour_f1_held_out": ("object F1, held-out pairs", 100, 1),
}


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
    for key, (title, factor, decimals) in SCORES.items():
        values = {
            arm: [factor * run[method][key] for run in runs if run[method].get(key) is not None]
            for arm, runs in scores.items()
        }
        if any(len(found) != len(workdirs) for found in values.values()):
            continue
        cells = [_cell(values[arm], decimals) for arm in arms]
        if len(arms) > 1:
            paired = [b - a for a, b in zip(values[arms[0]], values[arms[1]], strict=True)]
            cells.append(_cell(paired, decimals, sign="+"))
        print("|", " | ".join([title, *cells]), "|")


def _cell(values: list[float], decimals: int, sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()

"""Reads a finished run: what it scored, how its losses went, and what it says of a picture.

python examples/read_run.py runs/miniature [picture.png ...]
"""

import json
import sys
from pathlib import Path

import eim_jax
from eim_jax.training.log import read_metrics


def main(workdir: str, pictures: list[str]) -> list[str]:
    """Prints scores, the ends of every loss and captions; returns the captions."""
    folder = Path(workdir)
    run = eim_jax.load(folder)
    scores = folder / run.arm / "scores_test.json"
    if scores.exists():
        for method, found in json.loads(scores.read_text()).items():
            print(method, {key: round(value, 3) for key, value in found.items() if isinstance(value, float)})
    rows = read_metrics(folder / run.arm / "metrics.jsonl")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        losses = [key for key in own[0] if key.startswith("loss/")]
        print(stage, {key: f"{own[0][key]:.3f} -> {own[-1][key]:.3f}" for key in losses})
    trainable = {name: sum(leaf.size for leaf in _leaves(tree)) for name, tree in run.params.items()}
    print(f"{run}: parameters {trainable}")
    captions = run.caption(pictures) if pictures else []
    for picture, caption in zip(pictures, captions, strict=True):
        print(f"{picture}: {caption}")
    return captions


def _leaves(tree) -> list:
    return [leaf for child in tree.values() for leaf in _leaves(child)] if isinstance(tree, dict) else [tree]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Time of a training step of ClipCap or of a stage of ClipCap-EIM: eim_jax's own step against PyTorch's.

python benchmarks/clipcap_step.py [--stage base|st|lm|ie] [--batch 8] [--dropout 0.1] [--repeats 5]
Stage "base" is ClipCap (10 visual + 40 text tokens, ST and GPT-2 small train), the others are EIM's (50 + 40; 566,747
keys). Both sides, each in a process of its own: float32, the same shapes, dropout, losses and AdamW; random weights.
"""

import argparse

import jax
import torch
from clipcap_case import SIZES, STAGES, clipcap_case
from pairs import report_apart, serve
from step_case import Updates
from torch_steps import clipcap_step


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, default="base")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=("jax", "torch"), help="what this script gives its two processes")
    options = parser.parse_args()
    title = (
        f"Training step of ClipCap's stage {options.stage}: batch {options.batch}, float32, dropout {options.dropout}"
    )
    if options.side is None:
        report_apart(title, "training step", options.repeats)
        return
    size = SIZES[options.size]
    case = clipcap_case(size, options.stage, batch=options.batch, dtype="float32", dropout=options.dropout)
    if options.side == "jax":
        ours = Updates(case).run
        serve(lambda: jax.block_until_ready(ours()))
    else:
        theirs = clipcap_step(case, size, torch.device("cpu"), torch.float32, compiled=False).run
        serve(lambda: float(theirs()))


if __name__ == "__main__":
    main()

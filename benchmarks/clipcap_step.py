"""Time of a training step of ClipCap or of a stage of ClipCap-EIM: eim_jax's own step against PyTorch's.

python benchmarks/clipcap_step.py [--stage base|st|lm|ie] [--batch 8] [--dtype float32] [--dropout 0.1] [--repeats 5]
Stage "base" is ClipCap (10 visual + 40 text tokens, ST and GPT-2 small train), the others are EIM's (50 + 40; 566,747
keys). Both sides: the same dtype, shapes, dropout rate, losses and AdamW; random weights.
"""

import argparse

import gemm_rates
import jax
import torch
from clipcap_case import SIZES, STAGES, clipcap_case
from pairs import Pair, report
from step_case import Updates
from torch_steps import clipcap_step


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, default="base")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    size = SIZES[options.size]
    case = clipcap_case(size, options.stage, batch=options.batch, dtype=options.dtype, dropout=options.dropout)
    ours = Updates(case).run
    theirs = clipcap_step(case, size, torch.device("cpu"), getattr(torch, options.dtype), compiled=False).run
    form = f"batch {options.batch}, {options.dtype}, dropout {options.dropout}"
    title = f"Training step of ClipCap's stage {options.stage}: {form}"
    pair = Pair("training step", lambda: jax.block_until_ready(ours()), lambda: float(theirs()))
    report(title, [pair], options.repeats)
    print(f"\n{gemm_rates.table()}")


if __name__ == "__main__":
    main()

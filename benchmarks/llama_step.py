"""Time of a LLaMA-like model's training step on loss_base: eim_jax's own step against PyTorch's with PEFT.

python benchmarks/llama_step.py [--kind full lora llama_adapter lavin] [--layers 6] [--batch 4] [--text 128]
The shapes are SmolLM2-135M's with --layers blocks. Both sides: the same dtype, shapes, losses and AdamW; random
weights; LoRA of rank 8 beside every linear layer, LLaMA-Adapter's ten prompts in every layer, LaVIN's routers.
"""

import argparse
import dataclasses

import gemm_rates
import jax
import torch
from llama_case import KINDS, SIZES, VISUAL, llama_case
from pairs import Pair, report
from step_case import Updates
from torch_lavin import lavin_step
from torch_llama import llama_step


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--size", choices=SIZES, default="smollm2")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lm = dataclasses.replace(SIZES[options.size], layers=options.layers)
    form = f"{options.layers} layers, batch {options.batch}, {options.text} text tokens, {options.dtype}"
    pairs = (_pair(lm, kind, options) for kind in options.kind)  # one at a time in memory
    report(f"Training step of a LLaMA of {options.size}'s shapes: {form}", pairs, options.repeats)
    layer = gemm_rates.Shape(options.batch, options.text + VISUAL, lm.width, lm.mlp)
    head = gemm_rates.Shape(options.batch, options.text, lm.width, lm.vocab)
    for name, shape in (("a layer's MLP", layer), ("the head", head)):
        print(f"\nProducts of {name}:\n\n{gemm_rates.table(shape, [options.dtype])}")


def _pair(lm, kind: str, options: argparse.Namespace) -> Pair:
    case = llama_case(lm, kind, batch=options.batch, text=options.text, dtype=options.dtype)
    dtype = getattr(torch, options.dtype)
    ours = Updates(case).run
    if kind == "lavin":
        theirs = lavin_step(case, "adapter", torch.device("cpu"), dtype, compiled=False)
    else:
        theirs = llama_step(case, kind, dtype)
    return Pair(kind, lambda: jax.block_until_ready(ours()), lambda: float(theirs.run()))


if __name__ == "__main__":
    main()

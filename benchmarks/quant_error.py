"""Relative error (RMS) that 4-bit storage makes in weights: NF4 with and without double quantisation, and int4.

python benchmarks/quant_error.py [--size 4096] [--seed 0] [--lm DIR]
All three store one scale a block of 64 weights along a layer's inputs. --lm reads the linear layers of the blocks of a
LLaMA or GPT-2 in Hugging Face form (a directory, a hub id or "miniature/gpt2") instead of Gaussian weights alone.
"""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Iterator

import numpy as np
from pairs import machine

from eim_jax.models.quant import BLOCK, NF4, dequantise, quantise, quantised_shapes
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.weight_files import Tensors, open_weights

LINEAR = r".*layers\.\d+\..*_proj\.weight"  # torch.nn.Linear, [out in]
CONV1D = r"h\.\d+\..*c_\w+\.weight"  # GPT-2's, [in out]
STORED = ("int4, float32 scales", "NF4, float32 scales", "NF4, double quantisation")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the Gaussian kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm", help="a checkpoint whose linear layers are measured too")
    options = parser.parse_args()
    if options.size % BLOCK:
        parser.error(f"--size {options.size} is not a multiple of {BLOCK}")
    print(machine("jax", "numpy"))
    print(f"Command: {' '.join(['python', *sys.argv])}\n")
    print(f"| weights | number | {' | '.join(STORED)} |\n|---|---|---|---|---|")
    rng = np.random.default_rng(options.seed)
    row("Gaussian", [rng.standard_normal((options.size, options.size), np.float32)])
    skipped = []
    if options.lm:
        with contextlib.ExitStack() as stack:
            row(options.lm, kernels(Tensors(open_weights(resolve(options.lm), stack)), skipped))
        print(f"\nMatrices not measured: {', '.join(skipped) or 'none'} (outside the blocks, or in % {BLOCK} > 0).")
    held = quantised_shapes(options.size, options.size).values()
    bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in held) / options.size**2
    print(f"\nBits a weight of the Gaussian kernel: {4 + 32 / BLOCK}, {4 + 32 / BLOCK}, {bits:.3f}.")


def kernels(tensors: Tensors, skipped: list[str]) -> Iterator[np.ndarray]:
    """Yields the kernels [in out] of a model's blocks, one at a time; its other matrices' keys go to `skipped`."""
    for key in tensors:
        if len(tensors.shape(key)) < 2:  # norms and biases
            continue
        linear, conv = re.fullmatch(LINEAR, key), re.fullmatch(CONV1D, key)
        if not (linear or conv) or tensors.shape(key)[1 if linear else 0] % BLOCK:
            skipped.append(key)
            continue
        yield (tensors.read(key).T if linear else tensors.read(key)).astype(np.float32)


def row(name: str, weights) -> None:
    """Prints the errors over all kernels together, relative to the RMS of the weights."""
    number, power, errors = 0, 0.0, np.zeros(len(STORED))
    for kernel in weights:
        number += kernel.size
        power += np.sum(kernel**2, dtype=np.float64)
        errors += [np.sum((back - kernel) ** 2, dtype=np.float64) for back in stored(kernel)]
    if not number:
        sys.exit(f"{name} has no linear layer in its blocks that could be measured")
    cells = " | ".join(f"{math.sqrt(error / power):.5f}" for error in errors)
    print(f"| {name} | {number:,} | {cells} |", flush=True)


def stored(kernel: np.ndarray) -> Iterator[np.ndarray]:
    """Yields what each of STORED gives back for a kernel [in out]."""
    blocks = kernel.reshape(-1, BLOCK, kernel.shape[1])
    absmax = np.abs(blocks).max(1, keepdims=True)
    step = np.where(absmax == 0, 1, absmax) / 7
    yield (np.round(blocks / step) * step).reshape(kernel.shape)
    leaves = quantise(kernel)
    codes = np.stack([leaves["codes"] & 15, leaves["codes"] >> 4], axis=1).reshape(blocks.shape)
    yield (NF4[codes] * absmax).reshape(kernel.shape)
    yield np.asarray(dequantise(leaves))


if __name__ == "__main__":
    main()

"""Rates of a training step's matrix products, in JAX and (where it is installed) in PyTorch: what bounds their ratio.

    python benchmarks/gemm_rates.py

A layer's products at 8 rows of 50 tokens and at one token, GPT-2 small's widths; the bfloat16 ones in the form of
eim_jax/models/products.py and, in brackets, in the plain form that it takes the place of.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from pairs import machine, timer

from eim_jax.models.products import product, sum_over_rows

B, T, D, M = 8, 50, 768, 3072
FLOPS = dict.fromkeys(("x W", "dy W^T", "x^T dy"), 2 * B * T * D * M) | {"one row: x W": 2 * D * M}
ROUNDS = 30


def main() -> None:
    """Prints one table."""
    print(machine("jax", "torch"))
    print("Command: python benchmarks/gemm_rates.py\n")
    print(table())


def table() -> str:
    """GFLOP/s of every product, the fastest of ROUNDS calls; a product that no library here makes is a dash."""
    sides = {"JAX float32": _ours("float32"), "JAX bfloat16": _ours("bfloat16"), "plain": _ours("bfloat16", plain=True)}
    sides |= {f"PyTorch {dtype}": _theirs(dtype) for dtype in ("float32", "bfloat16")}
    lines = [
        f"| GFLOP/s at {B} x {T} tokens, widths {D} and {M} | JAX float32 | JAX bfloat16 (plain) | PyTorch float32 "
        "| PyTorch bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for name, flops in FLOPS.items():
        found = {side: f"{flops / _fastest(calls[name]) / 1e9:.0f}" if calls else "-" for side, calls in sides.items()}
        ours, plain, theirs = found["JAX bfloat16"], found["plain"], found["PyTorch float32"]
        lines.append(f"| {name} | {found['JAX float32']} | {ours} ({plain}) | {theirs} | {found['PyTorch bfloat16']} |")
    return "\n".join(lines)


def _fastest(call: Callable[[], object]) -> float:
    call()
    clock, seconds = timer(), []
    for _ in range(ROUNDS):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def _ours(dtype: str, plain: bool = False) -> dict[str, Callable[[], object]]:
    x, w, dy = (jnp.asarray(a, dtype) for a in _operands())

    def dot(axes, a, b):
        return lax.dot_general(a, b, (axes, ((), ())))

    forward = functools.partial(dot, ((2,), (0,))) if plain else lambda x, w: product(x, w, ((2,), (0,)))
    forms = {
        "x W": (forward, x, w),
        "one row: x W": (forward, x[:1, :1], w),
        "dy W^T": (functools.partial(dot, ((2,), (1,))) if plain else lambda y, w: product(y, w, ((2,), (1,))), dy, w),
        "x^T dy": (
            (lambda x, y: dot(((0,), (0,)), x.reshape(-1, D), y.reshape(-1, M)))
            if plain
            else lambda x, y: sum_over_rows(x, y, 2),
            x,
            dy,
        ),
    }

    def call(form, a, b):
        made = jax.jit(form).lower(a, b).compile()
        return lambda: jax.block_until_ready(made(a, b))

    return {name: call(*parts) for name, parts in forms.items()}


def _theirs(dtype: str) -> dict[str, Callable[[], object]]:
    try:
        import torch
    except ImportError:
        return {}
    x, w, dy = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in _operands())
    flat, slope = x.reshape(-1, D), dy.reshape(-1, M)
    return {
        "x W": lambda: flat @ w,
        "dy W^T": lambda: slope @ w.T,
        "x^T dy": lambda: flat.T @ slope,
        "one row: x W": lambda: flat[:1] @ w,
    }


def _operands() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, np.float32) for shape in ((B, T, D), (D, M), (B, T, M)))


if __name__ == "__main__":
    main()

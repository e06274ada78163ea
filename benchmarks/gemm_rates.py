"""Rates of a training step's matrix products, in JAX and (where it is installed) in PyTorch: what bounds their ratio.

    python benchmarks/gemm_rates.py

A layer's products at 8 rows of 50 tokens and at one token, GPT-2 small's widths, in the form of
eim_jax/models/products.py and, in brackets, in the plain form that it takes the place of.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from pairs import machine, timer

from eim_jax.models.products import product, sum_over_rows


class Shape(NamedTuple):
    """x [rows slots width] and W [width inner]."""

    rows: int = 8
    slots: int = 50
    width: int = 768
    inner: int = 3072


GPT2 = Shape()
ROUNDS = 30


def main() -> None:
    """Prints one table."""
    print(machine("jax", "torch"))
    print("Command: python benchmarks/gemm_rates.py\n")
    print(table())


def table(shape: Shape = GPT2, dtypes: Sequence[str] = ("float32", "bfloat16")) -> str:
    """GFLOP/s of every product, the fastest of ROUNDS calls; a product that no library here makes is a dash."""
    b, t, d, m = shape
    work = dict.fromkeys(("x W", "dy W^T", "x^T dy"), 2 * b * t * d * m) | {"one row: x W": 2 * d * m}
    columns = {f"JAX {dtype} (plain)": (_ours(shape, dtype), _ours(shape, dtype, plain=True)) for dtype in dtypes}
    columns |= {f"PyTorch {dtype}": (_theirs(shape, dtype),) for dtype in dtypes}
    lines = [f"| GFLOP/s at {b} x {t} tokens, widths {d} and {m} | {' | '.join(columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    for name, flops in work.items():
        found = [
            [f"{flops / _fastest(calls[name]) / 1e9:.0f}" if calls else "-" for calls in sides]
            for sides in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(f'{x[0]} ({x[1]})' if x[1:] else x[0] for x in found)} |")
    return "\n".join(lines)


def _fastest(call: Callable[[], object]) -> float:
    call()
    clock, seconds = timer(), []
    for _ in range(ROUNDS):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def _ours(shape: Shape, dtype: str, plain: bool = False) -> dict[str, Callable[[], object]]:
    x, w, dy = (jnp.asarray(a, dtype) for a in _operands(shape))

    def dot(axes, a, b):
        return lax.dot_general(a, b, (axes, ((), ())))

    forward = functools.partial(dot, ((2,), (0,))) if plain else lambda x, w: product(x, w, ((2,), (0,)))
    forms = {
        "x W": (forward, x, w),
        "one row: x W": (forward, x[:1, :1], w),
        "dy W^T": (functools.partial(dot, ((2,), (1,))) if plain else lambda y, w: product(y, w, ((2,), (1,))), dy, w),
        "x^T dy": (
            (lambda x, y: dot(((0,), (0,)), x.reshape(-1, shape.width), y.reshape(-1, shape.inner)))
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


def _theirs(shape: Shape, dtype: str) -> dict[str, Callable[[], object]]:
    try:
        import torch
    except ImportError:
        return {}
    x, w, dy = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in _operands(shape))
    flat, slope = x.reshape(-1, shape.width), dy.reshape(-1, shape.inner)
    return {
        "x W": lambda: flat @ w,
        "dy W^T": lambda: slope @ w.T,
        "x^T dy": lambda: flat.T @ slope,
        "one row: x W": lambda: flat[:1] @ w,
    }


def _operands(shape: Shape) -> tuple[np.ndarray, ...]:
    rng, (b, t, d, m) = np.random.default_rng(0), shape
    return tuple(rng.standard_normal(sides, np.float32) for sides in ((b, t, d), (d, m), (b, t, m)))


if __name__ == "__main__":
    main()

"""Matrix products, each in the form that is fast on what it is compiled for.

A CPU with bf16 units (AMX, AVX-512 BF16) is reached by XLA's compiler only through a product of bf16 operands with a
float32 result, where both operands are summed over their rows only if these rows lie on two axes, and where there is
one row only if a second one of zeros stands under it: other forms run at float32's rate or below it (`python
benchmarks/gemm_rates.py` shows both). Accelerators have bf16 results and any axes at full speed. Products in float32
are lax.dot_general's to the bit; sums over rows on a CPU to rounding, since the rows of what is narrower are turned
first, which its compiler would do slowly.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Inside, products take the form of this platform ("cpu", "tpu", "cuda"), not of the devices that are here.

    That holds for what is traced inside: a jitted function that was traced before keeps its form.

    >>> x = jnp.ones((2, 2), jnp.bfloat16)
    >>> with compiling_for("tpu"):
    ...     traced = str(jax.make_jaxpr(lambda x: product(x, x, ((1,), (0,))))(x))
    >>> "float32" in traced
    False
    """
    before = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(before)


def on_cpu() -> bool:
    """Whether products are compiled for a CPU."""
    return (_PLATFORM.get() or jax.default_backend()) == "cpu"


def wants_float32(dtype: Any) -> bool:
    """Whether a product of operands of this dtype is faster with a float32 result, rounded afterwards."""
    return dtype == jnp.bfloat16 and on_cpu()


def product(a: Array, b: Array, contract: tuple[Sequence[int], Sequence[int]]) -> Array:
    """Returns a times b in their own dtype, added up in float32 over the axes `contract` of each (a's last ones)."""
    if not wants_float32(a.dtype):
        return lax.dot_general(a, b, (contract, ((), ())))
    alone = 0 not in contract[0] and math.prod(a.shape) == math.prod(a.shape[axis] for axis in contract[0])
    a = jnp.pad(a, [(0, 1)] + [(0, 0)] * (a.ndim - 1)) if alone else a
    found = lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32).astype(a.dtype)
    return found[:1] if alone else found


def sum_over_rows(a: Array, b: Array, rows: int, dtype: Any = None) -> Array:
    """Returns the sum of a's rows times b's, [*d *c] of [*rows *d] and [*rows *c]: a kernel's gradient.

    Args:
      a: what a layer read.
      b: the gradient of what it gave, in a's dtype.
      rows: how many of the leading axes count rows.
      dtype: of the result; None: of the operands.
    """
    dtype = dtype or a.dtype
    wide = wants_float32(a.dtype)
    if wide and rows == 1:
        a, b = (_on_two_axes(x) for x in (a, b))
        rows = 2
    axes = tuple(range(rows))
    wide = wide or dtype != a.dtype
    narrow = math.prod(a.shape[rows:]) <= math.prod(b.shape[rows:])
    if a.dtype == jnp.float32 and narrow and on_cpu():
        a = _rows_last(a, rows)
        contract = ((a.ndim - 1,), (0,))
        b = b.reshape(-1, *b.shape[rows:])
    else:
        contract = (axes, axes)
    found = lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32 if wide else None)
    return found.astype(dtype)


def _rows_last(x: Array, rows: int) -> Array:
    """[*rows *d] as [*d n] in memory, which XLA's CPU compiler else does in a slow loop beside what made x."""
    x = jnp.moveaxis(x.reshape(-1, *x.shape[rows:]), 0, -1)
    return lax.optimization_barrier(x)


def _on_two_axes(x: Array) -> Array:
    """[n ...] as [2 n/2 ...]; a row of zeros, which adds nothing, makes an odd n even."""
    x = jnp.pad(x, [(0, x.shape[0] % 2)] + [(0, 0)] * (x.ndim - 1)) if x.shape[0] % 2 else x
    return x.reshape(2, x.shape[0] // 2, *x.shape[1:])


def mix(spec: str, a: Array, b: Array) -> Array:
    """Returns jnp.einsum(spec, a, b) of three named index lists in a's dtype: attention's weights times its values."""
    return _mix(spec, a, b) if wants_float32(a.dtype) else jnp.einsum(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _mix_forward(spec, a, b):
    return _mix(spec, a, b), (a, b)


def _mix_backward(spec, kept, dy):
    (a, b), (inputs, out) = kept, spec.split("->")
    of_a, of_b = inputs.split(",")
    return _mix(f"{out},{of_b}->{of_a}", dy, b), _mix(f"{of_a},{out}->{of_b}", a, dy)


_mix.defvjp(_mix_forward, _mix_backward)

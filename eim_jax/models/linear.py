"""`Dense` and `DenseGeneral` as Flax's, but faster to train on a CPU: the gradient comes in the kernel's own layout.

JAX's transpose rule forms d loss / d kernel as [out in] and transposes it. XLA's CPU compiler lets that layout spread
into the optimizer, which then copies the kernel and both of Adam's moments there and back in every step.
"""

import functools

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from eim_jax.models.products import product, sum_over_rows

PRODUCT = "product"  # what a policy of recomputation calls a result: it does not see into a custom gradient


def linear(
    x: Float[Array, "*b d"], kernel: Float[Array, "d *c"], dimensions=None, precision=None
) -> Float[Array, "*_"]:
    """Returns x times kernel, summed over d: lax.dot_general's result to the bit, as the `dot_general` of nn.Dense.

    Raises ValueError for any other contraction, or a `precision`.
    """
    if precision is not None or dimensions not in (None, (((x.ndim - 1,), (0,)), ((), ()))):
        raise ValueError(
            f"linear contracts the last axis of x with the first of the kernel at JAX's default precision, "
            f"not {dimensions} at precision {precision}"
        )
    return checkpoint_name(_product(x, kernel), PRODUCT)


@jax.custom_vjp
def _product(x, kernel):
    return product(x, kernel, ((x.ndim - 1,), (0,)))


def _forward(x, kernel):
    """Keeps x for a trained kernel only, and the kernel where x has a gradient."""
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _product(x.value, kernel.value), kept


def _backward(kept, dy):
    x, kernel = kept
    dx = dkernel = None
    if kernel is not None:
        inner = kernel.ndim - 1
        outputs = tuple(range(dy.ndim - inner, dy.ndim)), tuple(range(1, kernel.ndim))
        dx = product(dy, kernel, outputs)
    if x is not None:
        dkernel = sum_over_rows(x, dy, x.ndim - 1)
    return dx, dkernel


_product.defvjp(_forward, _backward, symbolic_zeros=True)

Dense = functools.partial(nn.Dense, dot_general=linear)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=linear)

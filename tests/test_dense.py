"""A trained linear layer's product: Flax's float32 values to the bit, its weight gradient without a transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_trees_close
from flax import linen as nn

from eim_jax.models.linear import Dense, DenseGeneral, linear

KERNELS = {"dense": (Dense, nn.Dense, 5), "qkv": (DenseGeneral, nn.DenseGeneral, (3, 4))}


BF16 = 2.0**-8  # bfloat16's unit roundoff


def run(layer, features, dtype, params, x):
    """(sum of sines, y), its gradients towards params and x."""

    def loss(params, x):
        y = layer(features, dtype=dtype).apply(params, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def problem(theirs, features):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7))
    params = theirs(features).init(jax.random.key(1), x)
    return jax.tree.map(lambda leaf: leaf + 0.1, params), x  # no bias of zeros


@pytest.mark.parametrize(("ours", "theirs", "features"), KERNELS.values(), ids=KERNELS)
def test_values_and_gradients_are_flaxs(ours, theirs, features):
    params, x = problem(theirs, features)
    ((_, y), gradients), ((_, want), slopes) = (run(f, features, jnp.float32, params, x) for f in (ours, theirs))
    np.testing.assert_array_equal(y, want)
    assert_trees_close(gradients, slopes, 1e-6, rtol=1e-6)


@pytest.mark.parametrize(("ours", "theirs", "features"), KERNELS.values(), ids=KERNELS)
def test_bfloat16_is_off_by_its_roundings_alone(ours, theirs, features):
    """Against float64. What is rounded once is off by BF16 times the sum of its terms' magnitudes at most."""
    params, x = problem(theirs, features)
    (_, y), (to_params, to_x) = run(ours, features, jnp.bfloat16, params, x)
    x, kernel, bias = (
        np.asarray(a, np.float64).reshape(shape)
        for a, shape in ((x, (12, 7)), (params["params"]["kernel"], (7, -1)), (params["params"]["bias"], -1))
    )
    want = x @ kernel + bias
    size = abs(x) @ abs(kernel) + abs(bias)
    off = 4 * BF16 * size  # x, the kernel, their product, and what the bias makes of it
    dy = np.cos(want)
    dy_off = off + BF16 * abs(dy)  # a cosine moves no more than its argument

    def assert_near(found, want, bound):
        found = np.asarray(found.astype(jnp.float32), np.float64).reshape(want.shape)
        np.testing.assert_array_less(abs(found - want), bound * (1 + 8 * BF16))  # and the products of roundings

    assert_near(y, want, off)
    to_kernel, to_bias = to_params["params"]["kernel"], to_params["params"]["bias"]
    assert_near(to_x, dy @ kernel.T, dy_off @ abs(kernel).T + 2 * BF16 * abs(dy) @ abs(kernel).T)
    assert_near(to_kernel, x.T @ dy, abs(x).T @ dy_off + 2 * BF16 * abs(x).T @ abs(dy))
    assert_near(to_bias, dy.sum(0), dy_off.sum(0) + 12 * BF16 * abs(dy).sum(0))  # 12 rows, added in bfloat16


def test_only_what_the_backward_pass_needs_is_kept():
    x, kernel = jnp.ones((8, 16)), jnp.ones((16, 32))
    kept = [
        {leaf.shape for leaf in jax.tree.leaves(jax.vjp(f, a)[1]) if leaf.ndim}
        for f, a in ((lambda x: linear(x, kernel), x), (lambda kernel: linear(x, kernel), kernel))
    ]
    assert kept == [{kernel.shape}, {x.shape}]


def test_the_weight_gradient_is_never_transposed():
    def gradient(dot):
        loss = lambda kernel, x: jnp.sum(dot(x, kernel) ** 2)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((16, 3, 8)), jnp.ones((2, 4, 16))))

    transposed = "f32[16,3,8] = transpose["  # as the kernel is laid out
    assert transposed not in gradient(linear)
    assert transposed in gradient(lambda x, kernel: jnp.einsum("btd,dce->btce", x, kernel))


def test_another_contraction_is_refused():
    with pytest.raises(ValueError, match="last axis of x with the first"):
        linear(jnp.ones((2, 3)), jnp.ones((3, 2)), (((0,), (1,)), ((), ())))
    with pytest.raises(ValueError, match="precision"):
        linear(jnp.ones((2, 3)), jnp.ones((3, 2)), precision="highest")

"""A trained linear layer's product: Flax's float32 values to the bit, its weight gradient without a transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_trees_close
from flax import linen as nn

from eim_jax.models.linear import Dense, DenseGeneral, linear

KERNELS = {"dense": (Dense, nn.Dense, 5), "qkv": (DenseGeneral, nn.DenseGeneral, (3, 4))}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "features"), KERNELS.values(), ids=KERNELS)
def test_values_and_gradients_are_flaxs(ours, theirs, features, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7))
    params = theirs(features).init(jax.random.key(1), x)

    def run(layer):
        def loss(params, x):
            y = layer(features, dtype=dtype).apply(params, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    ((_, y), gradients), ((_, want), slopes) = run(ours), run(theirs)
    if dtype == jnp.float32:
        np.testing.assert_array_equal(y, want)
        assert_trees_close(gradients, slopes, 1e-6, rtol=1e-6)
    else:  # rounded at other places than Flax's; against float64 in test_products.py
        np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2, rtol=1e-2)
        assert_trees_close(gradients, slopes, 1e-1, rtol=2e-2)


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

    assert "transpose[" not in gradient(linear)
    assert "transpose[" in gradient(lambda x, kernel: jnp.einsum("btd,dce->btce", x, kernel))


def test_another_contraction_is_refused():
    with pytest.raises(ValueError, match="last axis of x with the first"):
        linear(jnp.ones((2, 3)), jnp.ones((3, 2)), (((0,), (1,)), ((), ())))
    with pytest.raises(ValueError, match="precision"):
        linear(jnp.ones((2, 3)), jnp.ones((3, 2)), precision="highest")

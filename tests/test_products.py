"""bfloat16 products in the form that a CPU's bf16 units take: values and gradients of float64, and only on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.models.linear import linear
from eim_jax.models.products import compiling_for, mix, sum_over_rows
from eim_jax.training.tower_form import faster_dtype

BF16 = 2.0**-8  # half a unit in the last place of bfloat16, relative


def draw(i, *shape):
    return jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def assert_rounded(found, want, size):
    """Off by no more than the roundings of a bfloat16 result whose terms add up to `size` in magnitude."""
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_less(np.abs(wide(found) - want), BF16 * np.abs(want) + 1e-5 * size + 1e-6)


@pytest.mark.parametrize("rows", [(6,), (5,), (2, 3), (1, 1)])
def test_a_linear_layer_and_its_gradients_are_rounded_once(rows):
    x, kernel, dy = draw(0, *rows, 24), draw(1, 24, 8), draw(2, *rows, 8)
    y, back = jax.vjp(linear, x, kernel)
    dx, dkernel = back(dy)
    a, w, d = (wide(v) for v in (x.reshape(-1, 24), kernel, dy.reshape(-1, 8)))
    for found, left, right in ((y, a, w), (dx, d, w.T), (dkernel, a.T, d)):
        shape = found.shape
        assert_rounded(found, (left @ right).reshape(shape), (np.abs(left) @ np.abs(right)).reshape(shape))


@pytest.mark.parametrize("rows", [4, 7])
def test_a_sum_over_rows_keeps_float32(rows):
    a, b = draw(0, rows, 5), draw(1, rows, 3)
    found = sum_over_rows(a, b, 1, jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide(a).T @ wide(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "turned"), [(5, True), (7, False)])
@pytest.mark.parametrize("rows", [(12,), (3, 4)])
def test_float32_sums_over_rows_are_exact_to_their_own_roundings(rows, width, turned):
    """Off by at most a rounding of each of the 12 terms and sums; a CPU alone turns rows, of the narrower side."""
    a, b = (jax.random.normal(jax.random.key(i), (*rows, *more)) for i, more in enumerate([(width,), (3, 2)]))
    found = jax.jit(sum_over_rows, static_argnums=2)(a, b, len(rows))
    assert found.shape == (width, 3, 2)
    left, right = (np.asarray(x, np.float64).reshape(12, -1) for x in (a, b))
    bound = 12 * 2.0**-23 * (abs(left).T @ abs(right))
    np.testing.assert_array_less(abs(np.asarray(found, np.float64).reshape(width, 6) - left.T @ right), bound)

    def traced():
        return str(jax.make_jaxpr(lambda a, b: sum_over_rows(a, b, len(rows)))(a, b))

    assert ("optimization_barrier" in traced()) == turned
    with compiling_for("cuda"):
        assert "optimization_barrier" not in traced()


def test_attentions_mix_and_its_gradients_are_rounded_once():
    weights, values, dy = draw(0, 2, 3, 4, 5), draw(1, 2, 5, 3, 6), draw(2, 2, 4, 3, 6)
    out, back = jax.vjp(lambda a, b: mix("bhts,bshe->bthe", a, b), weights, values)
    da, db = back(dy)
    w, v, d = wide(weights), wide(values), wide(dy)
    for found, spec, left, right in (
        (out, "bhts,bshe->bthe", w, v),
        (da, "bthe,bshe->bhts", d, v),
        (db, "bhts,bthe->bshe", w, d),
    ):
        assert_rounded(found, np.einsum(spec, left, right), np.einsum(spec, np.abs(left), np.abs(right)))


def test_only_a_cpu_gets_float32_results_and_rows_on_two_axes():
    x, kernel = draw(0, 4, 24), draw(1, 24, 8)

    def traced():
        return str(jax.make_jaxpr(lambda x, w: jax.vjp(linear, x, w)[1](jnp.ones((4, 8), x.dtype)))(x, kernel))

    here = traced()
    with compiling_for("tpu"):
        there = traced()
    assert "preferred_element_type=float32" in here and "f32" not in there
    assert "bf16[2,2,24]" in here and "bf16[2,2,24]" not in there
    assert "f32" in traced()  # the choice ends with the block


def test_the_log_names_the_units_of_a_float32_run_on_a_cpu_alone():
    single, half = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert "avx512_bf16, amx_bf16" in faster_dtype(single, "cpu", ("avx512f", "avx512_bf16", "amx_bf16"), 768)
    silent = [
        (half, "cpu", ("amx_bf16",), 768),
        (single, "tpu", ("amx_bf16",), 768),
        (single, "cpu", (), 768),
        (single, "cpu", ("amx_bf16",), 128),
    ]
    assert [faster_dtype(*case) for case in silent] == [""] * 4

"""The STs against their formulas in float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close

from eim_jax.models.connector import STConfig, make_st
from eim_jax.training.partition import flatten

CONFIGS = {
    "mlp": STConfig(kind="mlp", width_in=6, width_out=8, tokens=3),
    "transformer": STConfig(kind="transformer", width_in=6, width_out=8, tokens=3, layers=2, heads=2, clip_length=4),
    "ffn": STConfig(kind="ffn", width_in=6, width_out=8),
    "projector": STConfig(kind="projector", width_in=6, width_out=8, hidden=4),
    "queries": STConfig(kind="queries", width_in=6, width_out=8, tokens=3, hidden=12, heads=3),
}


@functools.cache
def setting(kind: str):
    """An ST with no zero parameter, its parameters in float64, and an input of 5 visual tokens."""
    config = CONFIGS[kind]
    st, rng = make_st(config), np.random.default_rng(0)
    seen = rng.standard_normal((2, 5, 6))
    params = tiny.loud(st.init, jnp.asarray(seen, jnp.float32))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64) + 0.1 * rng.standard_normal(x.shape), params)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    out = jax.jit(lambda p, x: st.apply({"params": p}, x))(low, jnp.asarray(seen, jnp.float32))
    return config, params, seen, np.asarray(out)


def dense(p: dict, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0.0)


def qkv(p: dict, x: np.ndarray) -> list[np.ndarray]:
    return [x @ p["kernel"][:, i] + (p["bias"][i] if "bias" in p else 0) for i in range(3)]


def layer_norm(p: dict, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def test_mlp_mapper_is_linear_tanh_linear_of_token_0():
    _, p, seen, out = setting("mlp")
    expected = dense(p["down"], np.tanh(dense(p["up"], seen[:, 0]))).reshape(2, 3, 8)
    assert_close(out, expected, 1e-5)


def test_ffn_is_linear_gelu_linear_of_every_token():
    _, p, seen, out = setting("ffn")
    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    assert_close(out, dense(p["down"], gelu(dense(p["up"], seen))), 1e-5)


def test_projector_is_linear_silu_linear_of_every_token():
    _, p, seen, out = setting("projector")
    inner = dense(p["up"], seen)
    assert_close(out, dense(p["down"], inner / (1 + np.exp(-inner))), 1e-5)


def test_queries_attend_in_front_of_all_visual_tokens_and_only_they_are_kept():
    """Pre-norm ViT blocks with biases and exact GELU; LayerNorms after the first and the last linear map."""
    config, p, seen, out = setting("queries")
    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    image = layer_norm(p["ln_in"], dense(p["down"], seen))
    x = np.concatenate([np.broadcast_to(p["queries"], (2, 3, 12)), image], axis=1)
    assert config.layers == 2
    for i in range(2):
        b = p[f"blocks_{i}"]
        assert b["attn"]["qkv"]["bias"].shape == (3, 12) and b["mlp"]["up"]["kernel"].shape == (12, 48)
        q, k, v = qkv(b["attn"]["qkv"], layer_norm(b["ln_1"], x))
        mixed = []
        for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
            weights = np.exp(q[..., head] @ k[..., head].transpose(0, 2, 1) / math.sqrt(4))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[..., head])
        x = x + dense(b["attn"]["out"], np.concatenate(mixed, axis=-1))
        x = x + dense(b["mlp"]["down"], gelu(dense(b["mlp"]["up"], layer_norm(b["ln_2"], x))))
    assert_close(out, layer_norm(p["ln_out"], dense(p["up"], x[:, :3])), 1e-5)


def test_transformer_mapper_keeps_the_outputs_of_its_constants():
    config, p, seen, out = setting("transformer")
    image = dense(p["linear"], seen[:, 0]).reshape(2, 4, 8)
    x = np.concatenate([image, np.broadcast_to(p["constant"], (2, 3, 8))], axis=1)
    for i in range(config.layers):
        b = p[f"blocks_{i}"]
        assert "bias" not in b["attn"]["qkv"]
        q, k, v = qkv(b["attn"]["qkv"], layer_norm(b["ln_1"], x))
        mixed = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = np.exp(q[..., head] @ k[..., head].transpose(0, 2, 1) / math.sqrt(4))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[..., head])
        x = x + dense(b["attn"]["out"], np.concatenate(mixed, axis=-1))
        x = x + dense(b["mlp"]["down"], np.maximum(dense(b["mlp"]["up"], layer_norm(b["ln_2"], x)), 0))
    assert_close(out, x[:, 4:], 1e-5)


def test_linear_layers_start_as_in_pytorch():
    st = make_st(STConfig(kind="ffn", width_in=400, width_out=100))
    kernel = st.init(jax.random.key(0), jnp.zeros((1, 1, 400)))["params"]["up"]["kernel"]
    bound = 400**-0.5
    assert bound * 0.99 < float(jnp.abs(kernel).max()) <= bound
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.01)


@pytest.mark.parametrize("kind", ["mlp", "transformer", "queries"])
def test_uniform_biases_start_as_in_pytorch_and_the_default_ones_at_zero(kind):
    """U(+-1/sqrt(fan_in)) by each layer's own fan-in: standard deviation bound / sqrt(3), none beyond the bound."""
    shape = {"width_in": 400, "width_out": 192, "tokens": 6, "hidden": 160, "layers": 1, "heads": 2}
    params = {}
    for bias in ("zeros", "uniform"):
        st = make_st(STConfig(kind=kind, bias=bias, **shape))
        params[bias] = flatten(st.init(jax.random.key(0), jnp.zeros((1, 1, 400)))["params"])
    layers = [path for path in params["uniform"] if path.endswith("/bias") and "ln_" not in path]
    assert len(layers) == {"mlp": 2, "transformer": 4, "queries": 6}[kind]
    for path in layers:
        bound = params["uniform"][path.replace("/bias", "/kernel")].shape[0] ** -0.5
        biases = np.asarray(params["uniform"][path])
        assert not np.any(params["zeros"][path])
        assert 0.9 * bound < np.abs(biases).max() <= bound, path
        np.testing.assert_allclose(biases.std(), bound / math.sqrt(3), rtol=0.15, err_msg=path)
    for path in params["zeros"].keys() - set(layers):  # kernels are drawn from the same keys either way
        np.testing.assert_array_equal(params["zeros"][path], params["uniform"][path], err_msg=path)


def test_the_projector_starts_from_xaviers_uniform_weights_and_zero_biases():
    st = make_st(STConfig(kind="projector", width_in=400, width_out=300))
    params = st.init(jax.random.key(0), jnp.zeros((1, 1, 400)))["params"]
    for name, fan_in, fan_out in (("up", 400, 128), ("down", 128, 300)):
        kernel, bound = params[name]["kernel"], math.sqrt(6 / (fan_in + fan_out))
        assert kernel.shape == (fan_in, fan_out) and not np.any(params[name]["bias"])
        assert bound * 0.99 < float(jnp.abs(kernel).max()) <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.01)


def test_queries_start_from_the_unit_normal_distribution():
    st = make_st(STConfig(kind="queries", width_in=4, width_out=4, hidden=64, layers=1, tokens=200))
    queries = jax.jit(st.init)(jax.random.key(0), jnp.zeros((1, 1, 4)))["params"]["queries"]
    assert queries.shape == (200, 64)
    np.testing.assert_allclose([queries.mean(), queries.std()], [0, 1], atol=0.03)


def test_depth_defaults_to_each_kinds_own():
    found = {kind: (STConfig(kind=kind).layers, STConfig(kind=kind).heads) for kind in ("transformer", "queries")}
    assert found == {"transformer": (8, 8), "queries": (2, 16)}
    assert STConfig(kind="queries", layers=8).layers == 8


def test_unknown_kinds_and_activations_are_errors():
    with pytest.raises(ValueError, match="'conv'"):
        STConfig(**{"kind": "conv"})
    with pytest.raises(ValueError, match="'swish'"):
        STConfig(activation="swish")

"""LLaMA without adapters: values against float64 NumPy, RoPE, counts, cache, padding, scan and remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, assert_trees_close
from llama_oracle import TINY as DEEP
from llama_oracle import oracle, random_params, stacked, tokens_of

from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.language.rope import rotate, rotation
from eim_jax.pretrained import lm_shapes

TINY = dataclasses.replace(DEEP, layers=2)
SIZES = {
    "7B": (LlamaConfig(), 6_738_415_616),
    "13B": (LlamaConfig(width=5120, layers=40, heads=40, mlp=13824), 13_015_864_320),
    "Llama-2-70B": (LlamaConfig(width=8192, layers=80, heads=64, kv_heads=8, mlp=28672, eps=1e-5), 68_976_648_192),
}


def read(config: LlamaConfig, params: dict, tokens: jax.Array, **kwargs):
    """(logits, cache) of tokens."""
    return _read(config, params, tokens, kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _read(config, params, tokens, kwargs):
    def method(model, tokens):
        hidden, cache = model.hidden(model.embed(tokens), **kwargs)
        return model.logits(hidden), cache

    return Llama(config).apply({"params": params}, tokens, method=method)


def prefixes(lengths: list[int], t: int) -> jax.Array:
    """Flags of rows that are padded on the right to t."""
    return jnp.arange(t)[None] < jnp.asarray(lengths)[:, None]


@pytest.mark.parametrize(
    "change",
    [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"tied": True}, {"rope_theta": 1e4, "eps": 1e-2}],
    ids=["grouped", "ungrouped", "multi-query", "tied", "other theta and eps"],
)
def test_logits_equal_the_float64_oracle_on_right_padded_rows(change):
    config = dataclasses.replace(TINY, **change)
    params, tokens, valid = random_params(config), tokens_of((3, 7)), prefixes([7, 3, 5], 7)
    expected = oracle(params, config, tokens, valid)
    unrolled, _ = read(config, params, tokens, valid=valid)
    scanned = dataclasses.replace(config, scan=True)
    rolled, _ = read(scanned, stacked(params, config.layers), tokens, valid=valid)
    assert unrolled.dtype == jnp.float32
    for found in (unrolled, rolled):
        assert_close(found, expected, 1e-5)


def test_rope_turns_pair_i_by_position_times_theta_to_the_minus_2i_over_width():
    x = jnp.zeros((1, 1, 1, 6)).at[..., 1].set(1.0)  # the first half of pair 1
    turned = rotate(x, rotation(jnp.array([[5]]), 6, 100.0))[0, 0, 0]
    angle = 5 * 100.0 ** (-2 / 6)
    assert_close(turned, [0, np.cos(angle), 0, 0, np.sin(angle), 0], 1e-6)


def test_rope_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(m: int, n: int) -> float:
        a, b = (rotate(x, rotation(jnp.array([[at]]), 8, 1e4)) for x, at in ((q, m), (k, n)))
        return float(jnp.sum(a * b))

    size = float(jnp.sum(jnp.abs(q * k)))
    assert_close([score(9, 4), score(105, 100)], score(5, 0), size=size)
    assert_close(score(7, 7), jnp.sum(q * k), size=size)
    assert abs(score(5, 0) - score(4, 0)) > 1e-3


def test_shifted_positions_change_no_logit():
    params, tokens = random_params(TINY), tokens_of((2, 6))
    at = jnp.broadcast_to(jnp.arange(6), (2, 6))
    here, there = (read(TINY, params, tokens, positions=at + shift)[0] for shift in (0, 11))
    assert_close(here, there, 1e-5)
    apart, _ = read(TINY, params, tokens, positions=2 * at)
    assert np.abs(apart - here).max() > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_the_released_files(size):
    config, total = SIZES[size]
    assert sum(x.size for x in lm_shapes(dataclasses.replace(config, scan=True)).values()) == total


def test_unrolled_and_scanned_models_have_the_same_parameters():
    flat = lm_shapes(TINY)
    rolled = lm_shapes(dataclasses.replace(TINY, scan=True))
    assert sum(x.size for x in flat.values()) == sum(x.size for x in rolled.values())
    for path, leaf in rolled.items():
        layer = flat[path.replace("/blocks/", "/blocks_0/")]
        assert leaf.shape == ((TINY.layers, *layer.shape) if "/blocks/" in path else layer.shape)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding_equals_teacher_forcing_at_every_position_of_uneven_prompts(scan):
    """Rows of 5, 2 and 4 prompt tokens are padded to 5, then 4 tokens each are decoded one by one."""
    config = dataclasses.replace(TINY, scan=scan)
    params = stacked(random_params(TINY), TINY.layers) if scan else random_params(TINY)
    lengths, new = np.array([5, 2, 4]), 4
    tokens = tokens_of((3, 5 + new))
    cache = init_cache(config, 3, 5 + new)
    assert {x.shape[-2:] for x in jax.tree.leaves(cache.kv)} == {(2, 8)}  # key-value heads, not query heads
    at = jnp.broadcast_to(jnp.arange(5), (3, 5))
    logits, cache = read(config, params, tokens[:, :5], positions=at, valid=prefixes([5, 2, 4], 5), cache=cache)
    found = [[*logits[i, :n]] for i, n in enumerate(lengths)]
    for step in range(new):
        at = jnp.asarray(lengths + step)[:, None]
        logits, cache = read(config, params, jnp.take_along_axis(tokens, at, axis=1), positions=at, cache=cache)
        for i in range(3):
            found[i].append(logits[i, 0])
    assert int(cache.length) == 5 + new
    full, _ = read(config, params, tokens, valid=prefixes([9, 6, 8], 9))
    for i, n in enumerate(lengths):
        assert_close(np.stack(found[i]), full[i, : n + new], 1e-5)


def test_padding_on_either_side_changes_no_real_token():
    params, tokens = random_params(TINY), tokens_of((2, 7))
    alone, _ = read(TINY, params, tokens[:, 2:6])
    valid = jnp.broadcast_to((jnp.arange(7) >= 2) & (jnp.arange(7) < 6), (2, 7))
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(7) - 2, 0), (2, 7))
    padded, _ = read(TINY, params, tokens, valid=valid, positions=positions)
    assert_close(padded[:, 2:6], alone, 1e-5)
    assert np.all(np.isfinite(padded))  # also where a query may see nothing


def value_and_gradient(config: LlamaConfig, params: dict):
    @jax.jit
    def both(params):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(Llama(config).apply({"params": p}, tokens_of((2, 6))))))(
            params
        )

    return both(params)


@pytest.fixture(scope="module")
def unrolled_gradient():
    return value_and_gradient(TINY, random_params(TINY))


@pytest.mark.parametrize(
    ("remat", "scan"), [("full", False), ("dots", False), ("none", True), ("full", True), ("dots", True)]
)
def test_scan_and_remat_change_neither_values_nor_gradients(remat, scan, unrolled_gradient):
    stack = (lambda tree: stacked(tree, TINY.layers)) if scan else (lambda tree: tree)
    value, gradient = value_and_gradient(dataclasses.replace(TINY, scan=scan, remat=remat), stack(random_params(TINY)))
    np.testing.assert_allclose(value, unrolled_gradient[0], rtol=1e-5)
    assert_trees_close(gradient, stack(unrolled_gradient[1]), 1e-4)


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones():
    params, tokens = random_params(TINY), tokens_of((2, 6))
    exact, _ = read(TINY, params, tokens)
    rough, _ = read(dataclasses.replace(TINY, dtype=jnp.bfloat16), params, tokens)
    assert rough.dtype == jnp.float32
    assert_close(rough, exact, 0.05)


def test_what_cannot_be_run_is_refused():
    params, model = random_params(TINY), Llama(TINY)
    with pytest.raises(ValueError, match="context of 24"):
        model.apply({"params": params}, tokens_of((1, 25)))
    embeds = jnp.zeros((1, 2, 32))
    with pytest.raises(ValueError, match="positions"):
        model.apply({"params": params}, embeds, cache=init_cache(TINY, 1, 4), method="hidden")
    with pytest.raises(ValueError, match="no adapter"):
        model.apply({"params": params}, None, jnp.ones(1, bool), method="steer")
    with pytest.raises(ValueError, match="remat 'some'"):
        Llama(dataclasses.replace(TINY, remat="some")).apply({"params": params}, tokens_of((1, 2)))
    for change in ({"heads": 5}, {"kv_heads": 3}, {"width": 36, "heads": 4}):
        with pytest.raises(ValueError, match=r"heads|odd"):
            dataclasses.replace(TINY, **change)

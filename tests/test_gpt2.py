import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close, assert_trees_close

from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.pretrained import LM, load_lm

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TINY = GPT2Config(vocab=61, context=24, width=16, layers=2, heads=2)


@pytest.fixture(scope="module")
def golden():
    return {k: jnp.asarray(v) for k, v in np.load(GOLDENS / "gpt2.npz").items()}


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_lm(GOLDENS / "gpt2")


def random_params(config: GPT2Config, seed: int = 0) -> dict:
    """Initial parameters, all moved so that no bias is zero."""
    return tiny.loud(GPT2(config).init, jnp.zeros((1, 1), jnp.int32), size=0.1, seed=seed)


def read(config: GPT2Config, params: dict, tokens: jax.Array, seed: int = 0, **kwargs):
    """(hidden, logits, cache) of tokens, compiled as one program: eager, every operation is compiled by itself."""
    train = kwargs.pop("train", False)

    @jax.jit
    def run(params, tokens, kwargs):
        def method(model, tokens):
            hidden, cache = model.hidden(model.embed(tokens), train=train, **kwargs)
            return hidden, model.logits(hidden), cache

        return GPT2(config).apply({"params": params}, tokens, rngs={"dropout": jax.random.key(seed)}, method=method)

    return run(params, tokens, kwargs)


def stacked(params: dict, layers: int) -> dict:
    rest = {k: v for k, v in params.items() if not k.startswith("blocks_")}
    blocks = [params[f"blocks_{i}"] for i in range(layers)]
    return {**rest, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


def tokens_of(shape: tuple[int, int], config: GPT2Config = TINY, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab, shape, np.int32))


def test_hidden_and_logits_equal_transformers(lm, golden):
    valid = golden["valid"]
    hidden, logits, cache = read(lm.config, lm.params, golden["tokens"], valid=valid)
    assert cache is None
    assert_close(hidden[valid], golden["hidden"][valid], 1e-5)
    assert_close(logits[valid], golden["logits"][valid], 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_every_gradient_equals_transformers(golden, scan):
    lm, gradient = load_lm(GOLDENS / "gpt2", scan=scan), load_lm(GOLDENS / "gpt2_gradient", scan=scan)
    tokens, valid = golden["tokens"], golden["valid"]

    def loss(params):
        logp = jax.nn.log_softmax(GPT2(lm.config).apply({"params": params}, tokens, valid=valid)[:, :-1])
        picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        return -jnp.mean(picked, where=valid[:, 1:])

    value, grads = jax.jit(jax.value_and_grad(loss))(lm.params)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    assert_trees_close(grads, gradient.params, 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding_equals_full_forward_for_prompts_of_different_lengths(scan):
    """Rows of 5, 2 and 4 prompt tokens are padded to 5, then 4 tokens each are decoded one by one."""
    config = dataclasses.replace(TINY, scan=scan)
    params = random_params(config)
    lengths, new = np.array([5, 2, 4]), 4
    tokens = tokens_of((3, 5 + new))  # row i: its prompt, then what it decodes
    prompt, valid = tokens[:, :5], jnp.arange(5)[None] < lengths[:, None]

    @jax.jit
    def step(tokens, positions, valid, cache):
        _, logits, cache = read(config, params, tokens, positions=positions, valid=valid, cache=cache)
        return logits, cache

    cache = init_cache(config, 3, 12)
    logits, cache = step(prompt, jnp.broadcast_to(jnp.arange(5), (3, 5)), valid, cache)
    got = [[logits[i, n - 1]] for i, n in enumerate(lengths)]
    for s in range(new):
        at = jnp.asarray(lengths + s)[:, None]
        logits, cache = step(jnp.take_along_axis(tokens, at, axis=1), at, None, cache)
        for i in range(3):
            got[i].append(logits[i, 0])
    assert int(cache.length) == 5 + new
    for i, n in enumerate(lengths):
        _, full, _ = read(config, params, tokens[i : i + 1, : n + new])
        assert_close(np.stack(got[i]), full[0, n - 1 :], 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_tokens_of_one_row_that_do_not_see_each_other_continue_it_apart(scan):
    config = dataclasses.replace(TINY, scan=scan)
    params, tokens = random_params(config), tokens_of((2, 6))
    _, _, cache = read(
        config, params, tokens[:, :4], positions=jnp.tile(jnp.arange(4), (2, 1)), cache=init_cache(config, 2, 6)
    )
    mask = jnp.concatenate([jnp.ones((2, 4), bool), jnp.eye(2, dtype=bool)], axis=1)
    cache = cache._replace(mask=jnp.broadcast_to(mask, (2, 1, 2, 6)))
    got, _, _ = read(config, params, tokens[:, 4:], positions=jnp.full((2, 2), 4), cache=cache)
    for j in range(2):
        full, _, _ = read(config, params, jnp.concatenate([tokens[:, :4], tokens[:, 4 + j :][:, :1]], axis=1))
        assert_close(got[:, j], full[:, 4], 1e-5)


def test_padding_changes_no_real_token():
    params, tokens = random_params(TINY), tokens_of((2, 7))
    _, short, _ = read(TINY, params, tokens[:, 2:6])
    valid = (jnp.arange(7) >= 2) & (jnp.arange(7) < 6)
    positions = jnp.maximum(jnp.arange(7) - 2, 0)
    spread = {"valid": jnp.broadcast_to(valid, (2, 7)), "positions": jnp.broadcast_to(positions, (2, 7))}
    _, padded, _ = read(TINY, params, tokens, **spread)
    assert_close(padded[:, 2:6], short, 1e-5)
    assert np.all(np.isfinite(padded))  # also where a query may see nothing


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scan_and_remat_change_neither_logits_nor_gradients(remat):
    params, tokens = random_params(TINY), tokens_of((2, 6))

    def loss(config):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(GPT2(config).apply({"params": p}, tokens)))))

    value, grads = loss(TINY)(params)
    config = dataclasses.replace(TINY, remat=remat)
    remat_value, remat_grads = loss(config)(params)
    scanned = dataclasses.replace(config, scan=True)
    scan_value, scan_grads = loss(scanned)(stacked(params, TINY.layers))
    np.testing.assert_allclose([remat_value, scan_value], value, rtol=1e-5)
    assert_trees_close(remat_grads, grads, 1e-4)
    assert_trees_close(scan_grads, stacked(grads, TINY.layers), 1e-4)


def test_scanned_model_initialises_to_the_stacked_shapes():
    scanned = random_params(dataclasses.replace(TINY, scan=True))
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, stacked(random_params(TINY), TINY.layers))


def test_dropout_of_one_leaves_only_the_last_bias():
    """Rate 1 zeroes embeddings and both branches, so ln_f sees 0 and gives its bias: all three are dropped."""
    params = random_params(TINY)
    hidden, _, _ = read(dataclasses.replace(TINY, dropout=1.0), params, tokens_of((2, 4)), train=True)
    assert_close(hidden, np.broadcast_to(params["ln_f"]["bias"], hidden.shape), 1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_follows_its_key_and_train_only(scan):
    config = dataclasses.replace(TINY, dropout=0.5, scan=scan)
    params, tokens = random_params(config), tokens_of((2, 5))

    def hidden(seed, train):
        return np.asarray(read(config, params, tokens, seed, train=train)[0])

    assert np.array_equal(hidden(0, True), hidden(0, True))
    assert not np.allclose(hidden(0, True), hidden(1, True))
    assert np.array_equal(hidden(0, False), hidden(1, False))


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones():
    params, tokens = random_params(TINY), tokens_of((2, 6))
    _, exact, _ = read(TINY, params, tokens)
    _, rough, _ = read(dataclasses.replace(TINY, dtype=jnp.bfloat16), params, tokens)
    assert rough.dtype == jnp.float32
    assert_close(rough, exact, 0.05)


def test_too_many_tokens_and_missing_positions_are_errors():
    params, model = random_params(TINY), GPT2(TINY)
    with pytest.raises(ValueError, match="context of 24"):
        model.apply({"params": params}, tokens_of((1, 25)))
    embeds = jnp.zeros((1, 2, 16))
    with pytest.raises(ValueError, match="positions"):
        model.apply({"params": params}, embeds, cache=init_cache(TINY, 1, 4), method="hidden")
    with pytest.raises(ValueError, match="remat 'some'"):
        GPT2(dataclasses.replace(TINY, remat="some")).apply({"params": params}, tokens_of((1, 2)))

"""LaVIN's and LLaMA-Adapter's changes to LLaMA, against the authors' form of them in float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, assert_trees_close, size_of
from llama_oracle import PROMPTS, ROUTER, TINY, oracle, random_params, stacked, tokens_of

from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.pretrained import lm_shapes

LAVIN = dataclasses.replace(TINY, adapter=ROUTER)
PROMPTED = dataclasses.replace(TINY, adapter=PROMPTS)
BOTH = pytest.mark.parametrize("config", [LAVIN, PROMPTED], ids=["LaVIN", "LLaMA-Adapter"])
HAS_IMAGE = jnp.array([True, False, True])
VALID = jnp.arange(6)[None] < jnp.array([6, 4, 5])[:, None]
TOKENS = tokens_of((3, 6))


def visual_of(config: LlamaConfig):
    """What the ST gives to LLaMA-Adapter; LaVIN's visual tokens are input tokens."""
    if isinstance(config.adapter, Router):
        return None
    return jnp.asarray(np.random.default_rng(3).standard_normal((3, config.adapter.prompts, config.width)), jnp.float32)


def form(config: LlamaConfig, params: dict, scan: bool) -> tuple[LlamaConfig, dict]:
    return (dataclasses.replace(config, scan=True), stacked(params, config.layers)) if scan else (config, params)


def positions_of(config: LlamaConfig, t: int) -> jax.Array:
    """LaVIN's modality row has RoPE index 0, so BOS has 1."""
    return jnp.broadcast_to(jnp.arange(t) + int(isinstance(config.adapter, Router)), (3, t))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def run(config, params, tokens, visual, has_image, positions, valid=None, cache=None, key=None, train=False):
    """(logits, cache) after the adapter; has_image None leaves it out."""
    rngs = None if key is None else {"dropout": key}

    def method(model, tokens):
        steer = None if has_image is None else model.steer(visual, has_image)
        more = {"valid": valid, "positions": positions, "cache": cache, "train": train}
        hidden, grown = model.hidden(model.embed(tokens), steer=steer, **more)
        return model.logits(hidden), grown

    return Llama(config).apply({"params": params}, tokens, method=method, rngs=rngs)


def logits(config: LlamaConfig, params: dict, has_image=HAS_IMAGE, **more) -> jax.Array:
    return run(config, params, TOKENS, visual_of(config), has_image, positions_of(config, 6), valid=VALID, **more)[0]


@pytest.mark.parametrize("scan", [False, True])
@BOTH
def test_logits_equal_the_authors_full_sequence_in_float64(config, scan):
    """LaVIN: with the modality row in the sequence and each router reading it, where ours looks its weights up."""
    params = random_params(config)
    expected = oracle(params, config, TOKENS, VALID, HAS_IMAGE, visual_of(config))
    found = logits(*form(config, params, scan))
    real = np.asarray(VALID)
    assert_close(found[real], expected[real], size=size_of(expected))


def test_lavins_modalities_and_positions_matter_to_the_logits():
    """Without this the equality above could hold for a router that does nothing."""
    params = random_params(LAVIN)
    moved = np.abs(logits(LAVIN, params, ~HAS_IMAGE) - logits(LAVIN, params))
    assert moved.max(axis=(1, 2)).min() > 1e-3  # in every row
    both = jnp.array([False, True])
    table = jax.jit(lambda p: Llama(LAVIN).apply({"params": p}, None, both, method="steer"))(params)
    assert table.shape == (3, 2, 2)
    assert_close(table.sum(-1), 1, 1e-6)
    assert np.abs(table[:, 0] - table[:, 1]).min() > 1e-3
    assert np.abs(table[1:] - table[:-1]).max() > 1e-3  # every layer has its own


def test_prompts_of_one_topmost_layer_with_ungrouped_heads_equal_the_oracle():
    config = dataclasses.replace(PROMPTED, kv_heads=4, adapter=ZeroInit(prompts=3, layers=1))
    params = random_params(config)
    expected = oracle(params, config, TOKENS, VALID, HAS_IMAGE, visual_of(config))
    for scan in (False, True):
        found = logits(*form(config, params, scan))
        assert_close(found[VALID], expected[VALID], size=size_of(expected))


@pytest.mark.parametrize("scan", [False, True])
@BOTH
def test_untrained_adapters_change_no_bit(config, scan):
    """LaVIN's second map and LLaMA-Adapter's gates start at zero."""
    params = random_params(config)
    fresh = jax.jit(Llama(config).init)(jax.random.key(1), TOKENS[:1, :1])["params"]["adapter"]
    config, params = form(config, {**params, "adapter": fresh}, scan)
    np.testing.assert_array_equal(logits(config, params), logits(config, params, has_image=None))


@BOTH
def test_gradients_of_the_adapter_are_the_slopes_of_the_oracle(config):
    """Central differences of the float64 oracle along random directions of each adapter leaf, modality included."""
    params = random_params(config)
    weights = np.random.default_rng(5).standard_normal((3, 6, config.vocab)) * np.asarray(VALID)[..., None]

    def loss(adapter):
        out = logits(config, {**params, "adapter": adapter})
        return jnp.sum(out * jnp.asarray(weights, jnp.float32))

    gradient = jax.jit(jax.grad(loss))(params["adapter"])
    leaves, tree = jax.tree.flatten(params["adapter"])
    rng = np.random.default_rng(6)
    for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = rng.standard_normal(leaf.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [np.asarray(x, np.float64) + (step * direction if i == j else 0) for j, x in enumerate(leaves)]
            moved = {**params, "adapter": jax.tree.unflatten(tree, moved)}
            ends.append(np.sum(oracle(moved, config, TOKENS, VALID, HAS_IMAGE, visual_of(config)) * weights))
        expected = (ends[0] - ends[1]) / 2e-5
        terms = np.asarray(slope, np.float64) * direction
        assert_close(np.sum(terms), expected, 1e-4, size=np.abs(terms).sum(), rtol=2e-3)
        assert abs(expected) > 1e-3


@pytest.mark.parametrize("scan", [False, True])
@BOTH
def test_decoded_logits_are_the_teacher_forced_ones_at_every_position(config, scan):
    """(LaVIN's own decoder puts generated tokens one RoPE index lower than training does.)"""
    config, params = form(config, random_params(config), scan)
    visual, at = visual_of(config), positions_of(config, 6)
    full, _ = run(config, params, TOKENS, visual, HAS_IMAGE, at)
    cache, found = init_cache(config, 3, 6), []
    for columns in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
        part, cache = run(config, params, TOKENS[:, columns], visual, HAS_IMAGE, at[:, columns], cache=cache)
        found.append(part)
    assert_close(np.concatenate(found, axis=1), full, 1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
@BOTH
def test_scan_and_remat_keep_the_adapters_gradients(config, remat):
    params = random_params(config)

    def gradient(config, params):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(logits(config, p)))))(params)

    expected = stacked(gradient(config, params), config.layers)
    found = gradient(*form(dataclasses.replace(config, remat=remat), params, scan=True))
    assert_trees_close(found, expected, 2e-4)


def test_dropout_of_one_leaves_of_an_adapter_only_its_last_biases():
    """In one layer: the routing weights do not depend on that layer's second map."""
    config = dataclasses.replace(LAVIN, layers=1, adapter=dataclasses.replace(ROUTER, dropout=1.0))
    params = random_params(config)
    up = {**params["adapter"]["up"], "kernel": jnp.zeros_like(params["adapter"]["up"]["kernel"])}
    silent = {**params, "adapter": {**params["adapter"], "up": up}}
    dropped = logits(config, params, key=jax.random.key(0), train=True)
    assert_close(dropped, logits(config, silent), 1e-5)
    assert np.abs(dropped - logits(config, params)).max() > 1e-3


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_follows_its_key_and_train_only(scan):
    config, params = form(LAVIN, random_params(LAVIN), scan)
    draws = [logits(config, params, key=jax.random.key(seed), train=True) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-3
    np.testing.assert_array_equal(logits(config, params, key=jax.random.key(0)), logits(config, params))


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (LlamaConfig(adapter=Router()), {"lm/adapter/": 2_621_760 + 8_192, "lm/adapter/modality": 8_192}),
        (
            LlamaConfig(width=5120, layers=40, heads=40, mlp=13824, adapter=Router(temperature=5.0)),
            {"lm/adapter/": 4_096_400 + 10_240, "lm/adapter/modality": 10_240},
        ),
        (LlamaConfig(adapter=ZeroInit()), {"lm/adapter/": 1_229_760, "lm/adapter/gate": 960}),
    ],
    ids=["LaVIN-7B", "LaVIN-13B", "LLaMA-Adapter-7B"],
)
def test_adapter_parameter_counts_are_the_papers(config, counts):
    shapes = lm_shapes(dataclasses.replace(config, scan=True))
    plain = lm_shapes(dataclasses.replace(config, scan=True, adapter=None))
    assert shapes.keys() - plain.keys() == {k for k in shapes if k.startswith("lm/adapter/")}
    for prefix, count in counts.items():
        assert sum(x.size for path, x in shapes.items() if path.startswith(prefix)) == count


def test_what_does_not_fit_the_adapter_is_refused():
    params = random_params(PROMPTED)
    with pytest.raises(ValueError, match="5 tokens for 3 prompts"):
        Llama(PROMPTED).apply({"params": params}, jnp.zeros((3, 5, 32)), HAS_IMAGE, method="steer")
    with pytest.raises(ValueError, match="needs has_image"):
        Llama(LAVIN).apply({"params": random_params(LAVIN)}, None, None, method="steer")
    with pytest.raises(ValueError, match="4 topmost layers"):
        dataclasses.replace(TINY, adapter=ZeroInit(layers=4))
    with pytest.raises(ValueError, match="groups"):
        dataclasses.replace(TINY, adapter=Router(groups=3))

"""LaVIN's router adapter against its equations in float64 NumPy, and CLIP with the adapters in every block."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, assert_trees_close, size_of
from tiny import loud

from eim_jax.models.adapters.lavin import Router, RouterAdapter, mix, route, shrink
from eim_jax.models.vision.clip import CLIPVision, CLIPVisionConfig

TINY = CLIPVisionConfig(
    image_size=16,
    patch_size=8,
    width=24,
    layers=2,
    heads=4,
    mlp=32,
    joint=12,
    prompts=3,
    adapter=Router(rank=8, temperature=3.0),
)
PIXELS = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def adapter(leaf: dict, z: np.ndarray, temperature: float) -> np.ndarray:
    """Two groups written out: the first half of the outputs reads u[0:4], the second u[4:8]."""
    w = softmax((z[:, 0] @ leaf["router"]["kernel"] + leaf["router"]["bias"]) / temperature)
    u = z @ leaf["down"]["kernel"] + leaf["down"]["bias"]
    out = z.copy()
    for k in range(2):
        first, second = leaf["up"]["kernel"][k]
        assert first.shape == (4, z.shape[-1] // 2)
        path = np.concatenate([u[..., 0:4] @ first, u[..., 4:8] @ second], axis=-1) + leaf["up"]["bias"][k]
        out += w[:, k, None, None] * path
    return out


def layer_norm(p: dict, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p: dict, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def qkv(p: dict, x: np.ndarray) -> list[np.ndarray]:
    return [x @ p["kernel"][:, i] + p["bias"][i] for i in range(3)]


def block(p: dict, leaf: dict | None, prompt: np.ndarray | None, x: np.ndarray, config: CLIPVisionConfig):
    """A CLIP block: LayerNorm, adapter, attention to x and to the prompt (not adapted), MLP."""
    z = layer_norm(p["ln_1"], x)
    if leaf is not None:
        z = adapter(leaf, z, config.adapter.temperature)
    keys = z
    if prompt is not None:
        shared = np.broadcast_to(layer_norm(p["ln_1"], prompt), (len(x), *prompt.shape))
        keys = np.concatenate([z, shared], axis=1)
    q, (_, k, v) = qkv(p["attn"]["qkv"], z)[0], qkv(p["attn"]["qkv"], keys)
    width = config.width // config.heads
    mixed = []
    for h in range(config.heads):
        head = slice(h * width, (h + 1) * width)
        weights = softmax(q[..., head] @ k[..., head].transpose(0, 2, 1) / math.sqrt(width))
        mixed.append(weights @ v[..., head])
    x = x + dense(p["attn"]["out"], np.concatenate(mixed, axis=-1))
    inner = dense(p["mlp"]["up"], layer_norm(p["ln_2"], x))
    return x + dense(p["mlp"]["down"], inner / (1 + np.exp(-1.702 * inner)))


def after_every_block(params: dict, config: CLIPVisionConfig) -> list[np.ndarray]:
    """The residual stream after each block, in float64."""
    p, side = double(params), config.image_size // config.patch_size
    pixels = PIXELS.astype(np.float64).reshape(3, side, 8, side, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = pixels.reshape(3, side**2, -1) @ p["patch_embedding"]["kernel"].reshape(-1, config.width)
    cls = np.broadcast_to(p["class_embedding"], (3, 1, config.width))
    x = layer_norm(p["pre_ln"], np.concatenate([cls, patches], axis=1) + p["position_embedding"])
    streams = []
    for i in range(config.layers):
        leaf = jax.tree.map(lambda a, i=i: a[i], p["adapter"]) if config.adapter else None
        x = block(p[f"blocks_{i}"], leaf, p["prompt"]["tokens"][i] if config.prompts else None, x, config)
        streams.append(x)
    return streams


def clip_params(config: CLIPVisionConfig = TINY) -> dict:
    return loud(CLIPVision(config).init, jnp.asarray(PIXELS))


def stacked(params: dict, config: CLIPVisionConfig) -> dict:
    """The parameters of the scanned tower."""
    blocks = [params[f"blocks_{i}"] for i in range(config.layers)]
    others = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
    return {**others, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def run(config, params, method="tokens", pixels=PIXELS, seed=None, **options):
    rngs = None if seed is None else {"dropout": jax.random.key(seed)}
    return compiled(config, method, tuple(options.items()))(params, pixels, rngs)


@functools.cache
def compiled(config, method, options):
    def apply(params, pixels, rngs):
        return CLIPVision(config).apply({"params": params}, pixels, method=method, rngs=rngs, **dict(options))

    return jax.jit(apply)


def test_adapter_equals_its_equations_in_float64():
    rng = np.random.default_rng(2)
    module = RouterAdapter(2, 12, Router())
    params = loud(module.init, method="leaves")
    z = rng.standard_normal((3, 5, 12))
    for layer in range(2):
        leaf = jax.tree.map(lambda a, layer=layer: a[layer], params)
        low = jnp.asarray(z, jnp.float32)
        found = mix(leaf, low, shrink(leaf, low), route(leaf, low[:, 0], 10.0))
        assert_close(found, adapter(double(leaf), z, 10.0), 1e-5)


def test_routing_weights_are_a_softmax_whose_temperature_divides_the_logits():
    leaf = {"router": {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.array([0.5, -0.5])}}
    z0 = jnp.array([[3.0, 1.0]])  # logits 3.5, 1.5
    for temperature in (1.0, 5.0, 10.0):
        first = 1 / (1 + math.exp(-2.0 / temperature))
        assert_close(route(leaf, z0, temperature), [[first, 1 - first]], 1e-6)


@pytest.mark.parametrize(
    ("prompts", "scan", "remat"),
    [(0, False, "none"), (3, False, "none"), (3, True, "none"), (3, False, "full"), (3, True, "dots")],
)
def test_clip_adapts_each_blocks_attention_input_by_each_images_own_cls(prompts, scan, remat):
    config = dataclasses.replace(TINY, prompts=prompts)
    params = clip_params(config)
    streams = after_every_block(params, config)
    given = stacked(params, config) if scan else params
    config = dataclasses.replace(config, scan=scan, remat=remat)
    assert_close(run(config, given), streams[-1])
    cls = run(config, given, "cls_of_blocks", every=1)
    assert_close(cls, np.stack([x[:, 0] for x in streams], axis=1), size=size_of(streams[-1]))


def test_stock_lavin_reads_blocks_4_8_to_24_as_six_tokens():
    config = CLIPVisionConfig(32, 16, 8, layers=24, heads=2, mlp=8, joint=4, scan=True)
    model, pixels = CLIPVision(config), jnp.zeros((1, 32, 32, 3))
    params = loud(model.init, pixels)
    every = jax.jit(lambda p, k: model.apply(p, pixels, k, method="cls_of_blocks"), static_argnums=1)
    six = every({"params": params}, 4)
    assert six.shape == (1, 6, 8)
    np.testing.assert_array_equal(six, every({"params": params}, 1)[:, [3, 7, 11, 15, 19, 23]])
    with pytest.raises(ValueError, match="24 blocks"):
        every({"params": params}, 25)


def started_adapter() -> dict:
    module = RouterAdapter(TINY.layers, TINY.width, TINY.adapter)
    return module.init(jax.random.key(0), method="leaves")["params"]


@pytest.mark.parametrize("scan", [False, True])
def test_an_untrained_adapter_is_the_identity_for_one_clip_also_in_training(scan):
    config = dataclasses.replace(TINY, scan=scan)
    params = {**loud(CLIPVision(config).init, jnp.asarray(PIXELS)), "adapter": started_adapter()}
    plain = {name: leaf for name, leaf in params.items() if name != "adapter"}
    expected = run(dataclasses.replace(config, adapter=None), plain)
    assert_close(run(config, params), expected, 1e-6)
    assert_close(run(config, params, train=True, seed=3), expected, 1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_takes_the_inner_vector_and_nothing_else(scan):
    """With everything dropped only the paths' biases are left, which is an adapter whose u is 0."""
    config = dataclasses.replace(TINY, scan=scan, adapter=Router(temperature=3.0, dropout=1.0))
    params = clip_params(TINY)
    params = stacked(params, TINY) if scan else params
    found = run(config, params, train=True, seed=4)
    empty = {**params["adapter"], "down": jax.tree.map(jnp.zeros_like, params["adapter"]["down"])}
    expected = run(config, {**params, "adapter": empty})
    assert_close(found, expected, 1e-5)
    assert np.abs(found - run(config, params)).max() > 1e-2


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full")])
def test_dropout_is_on_in_training_only_and_follows_its_key(scan, remat):
    config = dataclasses.replace(TINY, scan=scan, remat=remat)
    params = clip_params(TINY)
    params = stacked(params, TINY) if scan else params
    one, again, other = (run(config, params, train=True, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    np.testing.assert_array_equal(run(config, params, seed=5), run(config, params))


def test_gradients_of_the_adapter_do_not_depend_on_scan_and_remat():
    params = clip_params(TINY)

    def gradient(config, params):
        def loss(leaves):
            variables = {"params": {**params, "adapter": leaves}}
            seen = CLIPVision(config).apply(variables, jnp.asarray(PIXELS), method="tokens")
            return jnp.sum(jnp.sin(seen))

        return jax.jit(jax.grad(loss))(params["adapter"])

    expected = gradient(TINY, params)
    assert all(np.abs(leaf).min(axis=0).max() > 0 for leaf in jax.tree.leaves(expected))
    found = gradient(dataclasses.replace(TINY, scan=True, remat="full"), stacked(params, TINY))
    assert_trees_close(found, expected, 1e-4)


def test_groups_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="3 groups must divide its rank 8"):
        CLIPVision(dataclasses.replace(TINY, adapter=Router(groups=3))).init(jax.random.key(0), jnp.asarray(PIXELS))

"""JAX's fused attention against ours: the same numbers wherever it takes over."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close, assert_trees_close

from eim_jax.config import ConfigError
from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.attention import choose_attention, flash
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPVision, CLIPVisionConfig
from eim_jax.parallel.chips import platform_of
from eim_jax.parallel.sharding import make_mesh
from eim_jax.training.tower_form import attention_on_mesh, describe_attention, resolve_attention

B, T, SMALL = 3, 9, {"vocab": 50, "context": 16, "width": 32, "layers": 2, "heads": 4, "mlp": 64}
MODELS = {
    "GPT-2": (GPT2, GPT2Config(**SMALL)),
    "LLaMA, grouped": (Llama, LlamaConfig(**SMALL, kv_heads=2)),
    "LLaMA, LaVIN": (Llama, LlamaConfig(**SMALL, adapter=Router())),
    "LLaMA-Adapter, scanned": (Llama, LlamaConfig(**SMALL, adapter=ZeroInit(prompts=3, layers=1), scan=True)),
}


def both(kind, config, call):
    """`call`(model, params) by our softmax and by JAX's own."""
    params = tiny.loud(kind(config).init, jnp.zeros((1, 3), jnp.int32), size=0.1)
    drawn = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(drawn), x.shape), params)  # gates leave 0
    return [call(kind(dataclasses.replace(config, attention=name)), params) for name in ("softmax", "xla")]


@pytest.mark.parametrize(("kind", "config"), MODELS.values(), ids=MODELS)
def test_hidden_states_and_gradients_under_holes_in_the_mask_are_those_of_our_softmax(kind, config):
    rng = np.random.default_rng(0)
    embeds, weight = jnp.asarray(rng.normal(size=(2, B, T, 32)), jnp.float32)
    valid = rng.random((B, T)) < 0.6
    valid[:, 0] = True
    valid = jnp.asarray(valid)

    def call(model, params):
        def loss(params, embeds):
            options = {}
            if getattr(config, "adapter", None) is not None:
                visual = embeds[:, :3] if isinstance(config.adapter, ZeroInit) else None
                has = jnp.arange(B) > 0
                options["steer"] = model.apply({"params": params}, visual, has, method="steer")
            hidden, _ = model.apply({"params": params}, embeds, valid=valid, method="hidden", **options)
            hidden = jnp.where(valid[..., None], hidden, 0)  # what stands at padding is never read
            return jnp.sum(hidden * weight), hidden

        (_, hidden), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, embeds)
        return hidden, gradients

    ours, theirs = both(kind, config, jax.jit(call, static_argnums=0))
    assert_trees_close(ours, theirs, 2e-5, rtol=1e-4)
    assert jnp.abs(ours[0]).max() > 0.1


@pytest.mark.parametrize(("kind", "config"), list(MODELS.values())[:2], ids=list(MODELS)[:2])
def test_prefill_and_one_decoded_token_agree(kind, config):
    embeds = jax.random.normal(jax.random.key(2), (B, T, 32))

    def call(model, params):
        cache = init_cache(config, B, T + 1, jnp.float32)
        at = jnp.broadcast_to(jnp.arange(T), (B, T))
        hidden, cache = model.apply({"params": params}, embeds, positions=at, cache=cache, method="hidden")
        one, _ = model.apply({"params": params}, embeds[:, :1], positions=at[:, -1:] + 1, cache=cache, method="hidden")
        return hidden, one

    ours, theirs = both(kind, config, call)
    assert_trees_close(ours, theirs, 1e-5, rtol=1e-4)


def test_clip_with_prompt_tokens_sees_the_same():
    config = CLIPVisionConfig(16, 4, width=32, layers=2, heads=4, mlp=64, joint=16, prompts=2, prompt_hidden=8)
    pixels = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = {"params": tiny.loud(CLIPVision(config).init, pixels, size=0.1)}
    theirs = CLIPVision(dataclasses.replace(config, attention="xla")).apply(params, pixels, method="tokens")
    assert_close(CLIPVision(config).apply(params, pixels, method="tokens"), theirs, 1e-5, rtol=1e-4)


BF16, LONG, SHORT = "bfloat16", (512, 512, 128), (50, 50, 64)
CHOICES = [  # asked for, platform, dtype, (queries, keys, head width), more -> what computes it
    ("auto", "cuda", BF16, LONG, {}, "cudnn"),
    ("auto", "cuda", BF16, (257, 257, 64), {}, "cudnn"),  # ViT-L/14: padded
    ("auto", "cuda", BF16, (517, 522, 128), {"decoding": True}, "cudnn"),  # a prompt read into a cache
    ("auto", "cuda", BF16, SHORT, {}, "softmax"),  # ViT-B/32
    ("auto", "cuda", BF16, (1, 512, 128), {"decoding": True}, "softmax"),
    ("auto", "cuda", BF16, (512, 10, 128), {}, "softmax"),  # few keys
    ("auto", "cuda", BF16, LONG, {"dropout": True}, "softmax"),
    ("auto", "cuda", BF16, LONG, {"capped": True}, "softmax"),
    ("auto", "cuda", BF16, (512, 512, 256), {}, "softmax"),  # Gemma's heads
    ("auto", "cuda", BF16, (512, 512, 20), {}, "softmax"),
    ("auto", "cuda", "float32", LONG, {}, "softmax"),
    ("auto", "gpu", BF16, LONG, {}, "softmax"),  # another maker's, or too old
    ("auto", "tpu", BF16, LONG, {}, "softmax"),
    ("auto", "cpu", BF16, LONG, {}, "softmax"),
    ("cudnn", "cuda", BF16, SHORT, {}, "cudnn"),
    ("cudnn", "cuda", BF16, (17, 31, 64), {}, "cudnn"),
    ("cudnn", "cuda", BF16, (1, 1, 128), {}, "softmax"),  # LaVIN's routing table
    ("cudnn", "cuda", BF16, (512, 512, 256), {}, "softmax"),
    ("softmax", "cuda", BF16, LONG, {}, "softmax"),
    ("xla", "cpu", "float32", (1, 1, 64), {}, "xla"),
    ("xla", "cpu", "float32", (1, 9, 64), {"decoding": True}, "softmax"),
]


@pytest.mark.parametrize(("name", "platform", "dtype", "shape", "more", "found"), CHOICES)
def test_the_attention_of_a_shape_is_a_rule(name, platform, dtype, shape, more, found):
    built_with = resolve_attention(name, jnp.dtype(dtype), platform)
    assert choose_attention(built_with, dtype, *shape, **more) == found
    assert bool(describe_attention(built_with)) == (built_with != "softmax")


def test_heads_that_tensor_does_not_divide_are_ours():
    """GPT-2's 12 over 8, and a LLaMA whose 8 queries share 2 keys, over 4."""
    shared = LlamaConfig(width=64, heads=8, kv_heads=2, attention="cudnn")
    for shape, tensor in ((GPT2Config(attention="cudnn_long"), 8), (shared, 4)):
        assert attention_on_mesh(shape, make_mesh((8 // tensor, 1, tensor))).attention == "softmax"
    for shape in (shared, LlamaConfig(attention="xla"), CLIPVisionConfig(attention="cudnn"), None):
        assert attention_on_mesh(shape, make_mesh((4, 1, 2))) is shape


def test_cudnn_by_name_is_refused_where_it_is_not():
    for dtype, platform in (("bfloat16", "cpu"), ("bfloat16", "tpu"), ("bfloat16", "gpu"), ("float32", "cuda")):
        with pytest.raises(ConfigError, match=f"towers.attention='cudnn'.*{platform} in {dtype}"):
            resolve_attention("cudnn", jnp.dtype(dtype), platform)


@pytest.mark.parametrize(
    ("kind", "capability", "found"),
    [("NVIDIA H100 80GB HBM3", "9.0", "cuda"), ("Tesla V100 NVIDIA", "7.0", "gpu"), ("AMD Instinct MI300X", "", "gpu")],
)
def test_an_nvidia_gpu_is_told_from_others(kind, capability, found):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    assert platform_of(device) == found
    assert platform_of(jax.devices()[0]) == "cpu"


@pytest.mark.parametrize("masked", [True, False])
def test_odd_lengths_are_padded_for_cudnn_without_a_change_of_numbers(masked, monkeypatch):
    """JAX's own arithmetic in cuDNN's place: values and gradients as unpadded, softmax in NumPy's float64 as oracle."""
    passed, theirs = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **options):
        passed.append((implementation, q.shape[1], k.shape[1]))
        return theirs(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, h, 8)).astype(np.float32) for n, h in ((7, 4), (13, 2), (13, 2)))
    mask = rng.random((2, 1, 7, 13)) < 0.6 if masked else np.ones((2, 1, 7, 13), bool)
    mask[..., 0] = True
    given = jnp.asarray(mask) if masked else None

    def loss(name, q, k, v):
        mixed = flash(q, k, v, given, name)
        return jnp.sum(mixed**2), mixed

    padded, plain = (jax.value_and_grad(functools.partial(loss, n), (0, 1, 2), True)(q, k, v) for n in ("cudnn", "xla"))
    assert passed == [("cudnn", 8, 16), ("xla", 7, 13)]
    scores = np.einsum("btkge,bske->bkgts", q.astype(np.float64).reshape(2, 7, 2, 2, 8), k)
    weights = np.exp(scores) * mask[:, None]
    mixed = np.einsum("bkgts,bske->btkge", weights / weights.sum(-1, keepdims=True), v).reshape(2, 7, 4, 8)
    assert_close(padded[0][1], mixed, 1e-5)
    assert_trees_close(padded, plain, 1e-5, rtol=1e-5)


def test_an_unknown_attention_is_refused():
    for config in (lambda: LlamaConfig(**SMALL, attention="flash"), lambda: GPT2(GPT2Config(attention="flash")).init):
        with pytest.raises(ValueError, match="'flash' is not one of"):
            made = config()
            made(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))

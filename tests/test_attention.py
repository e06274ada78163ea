"""JAX's fused attention against ours: the same numbers wherever it takes over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close, assert_trees_close

from eim_jax.config import ConfigError
from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPVision, CLIPVisionConfig
from eim_jax.training.tower_form import resolve_attention

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


def test_cudnn_is_for_gpus_in_bfloat16_and_auto_is_ours():
    assert resolve_attention("auto", jnp.dtype("float32"), "cpu") == "softmax"
    assert resolve_attention("cudnn", jnp.dtype(jnp.bfloat16), "gpu") == "cudnn"
    for dtype, platform in (("bfloat16", "cpu"), ("bfloat16", "tpu"), ("float32", "gpu")):
        with pytest.raises(ConfigError, match=f"towers.attention='cudnn'.*{platform} in {dtype}"):
            resolve_attention("cudnn", jnp.dtype(dtype), platform)


def test_an_unknown_attention_is_refused():
    for config in (lambda: LlamaConfig(**SMALL, attention="flash"), lambda: GPT2(GPT2Config(attention="flash")).init):
        with pytest.raises(ValueError, match="'flash' is not one of"):
            made = config()
            made(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))

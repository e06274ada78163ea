"""A folded LLaMA gives the logits of the LLaMA with its adapters, for rows of the modality that was folded in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, size_of
from tiny import loud

from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.language.llama import Llama, LlamaConfig

ONE = jnp.zeros((1, 2), jnp.int32)  # tokens, for shapes
TINY = LlamaConfig(
    vocab=19,
    context=16,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp=24,
    adapter=Router(rank=4, temperature=2.0),
)


def logits(config: LlamaConfig, params: dict, tokens, has_image=None):
    lm = Llama(config)

    def run(params):
        apply = lambda *x, method, **more: lm.apply({"params": params}, *x, method=method, **more)  # noqa: E731
        steer = None if has_image is None else apply(None, has_image, method="steer")
        hidden, _ = apply(apply(tokens, method="embed"), steer=steer, method="hidden")
        return apply(hidden, method="logits")

    return jax.jit(run)(params)


@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("options", [{}, {"scan": True}, {"qkv_bias": True}], ids=["unrolled", "scan", "biases"])
def test_folded_logits_equal_those_of_rows_of_that_modality_and_of_no_other(options, modality):
    config = dataclasses.replace(TINY, **options)
    params = loud(Llama(config).init, ONE)
    tokens = jax.random.randint(jax.random.key(2), (4, 7), 0, config.vocab)
    has_image = jnp.array([False, True, True, False])
    expected = np.asarray(logits(config, params, tokens, has_image))
    plain, folded = config.adapter.fold(Llama(config), params, modality)
    assert plain == dataclasses.replace(config, adapter=None, qkv_bias=True)
    found = np.asarray(logits(plain, folded, tokens))
    same = np.asarray(has_image) == bool(modality)
    assert_close(found[same], expected[same], size=size_of(expected))
    assert np.abs(found[~same] - expected[~same]).max() > 1e-3  # the modalities do differ


def test_folded_parameters_are_exactly_those_of_a_llama_with_biases():
    _, folded = TINY.adapter.fold(Llama(TINY), loud(Llama(TINY).init, ONE), 0)
    plain = Llama(dataclasses.replace(TINY, adapter=None, qkv_bias=True))
    shapes = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert jax.tree.map(lambda x: x.shape, folded) == jax.tree.map(lambda x: x.shape, shapes)


def test_an_untrained_adapter_folds_into_the_same_kernels_and_zero_biases():
    params = jax.jit(Llama(TINY).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    _, folded = TINY.adapter.fold(Llama(TINY), params, 1)
    for name, part in folded["blocks_1"]["attn"].items():
        np.testing.assert_array_equal(part["kernel"], params["blocks_1"]["attn"][name]["kernel"])
        assert not np.any(part.get("bias", 0))


def test_what_cannot_be_folded_is_refused():
    params = loud(Llama(TINY).init, ONE)
    plain = {name: leaf for name, leaf in params.items() if name != "adapter"}
    for match, config, leaves, modality in (
        ("no router", TINY, plain, 0),
        ("neither 0", TINY, params, 2),
        ("nf4", dataclasses.replace(TINY, quant="nf4"), params, 0),
    ):
        with pytest.raises(ValueError, match=match):
            TINY.adapter.fold(Llama(config), leaves, modality)
    with pytest.raises(ValueError, match="LLaMA-Adapter's prompts cannot be folded"):
        ZeroInit().fold(Llama(TINY), params, 0)

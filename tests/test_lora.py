"""Low-rank terms against towers whose kernels hold W + s A B, computed in float64 by NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close, assert_trees_close
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P
from llama_oracle import oracle, stacked, tokens_of

from eim_jax.config import Arm, ConfigError, Stage
from eim_jax.models.kv_cache import init_cache
from eim_jax.models.language.gpt2 import GPT2, GPT2_FAMILY, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.linear import Dense
from eim_jax.models.lora import Layer, LoRA, Tuned
from eim_jax.models.quant import QDense, dequantise, quantise
from eim_jax.models.vision.clip import CLIPVision, CLIPVisionConfig
from eim_jax.models.vision.clip_files import CLIP_FAMILY
from eim_jax.parallel.sharding import make_mesh, shard_params
from eim_jax.planning.shapes import abstract_inputs
from eim_jax.training import low_rank
from eim_jax.training.arm_model import fresh, model, shapes

LLAMA = LlamaConfig(vocab=61, context=24, width=64, layers=2, heads=4, kv_heads=2, mlp=128, rope_theta=50.0)
ONE = jnp.zeros((1, 1), jnp.int32)
FAMILIES = {"lm": GPT2_FAMILY.rows(None), "visual": CLIP_FAMILY.rows}


def tower(name: str, module: nn.Module, patterns: tuple, **settings) -> tuple[Tuned, dict, dict]:
    """(the tuned tower, flat parameters of the tower alone, flat leaves of its terms, none zero)."""
    example = jnp.zeros((1, 16, 16, 3)) if name == "visual" else ONE
    base = flatten_dict(tiny.loud(module.init, example), sep="/")
    arm = Arm(lora=patterns, **{f"lora_{field}": value for field, value in settings.items()})
    found = low_rank.tuned(arm, {name: module}, FAMILIES, {f"{name}/{path}": leaf for path, leaf in base.items()})
    rng = np.random.default_rng(3)
    drawn = {p: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32) for p, s in shapes_of(found[name]).items()}
    return found[name], base, drawn


def shapes_of(tuned: Tuned) -> dict:
    return jax.eval_shape(tuned.draw, jax.random.key(0))


def tree(*flats: dict) -> dict:
    return unflatten_dict({path: leaf for flat in flats for path, leaf in flat.items()}, sep="/")


def added(base: dict, leaves: dict, scale: float) -> dict:
    """W + s A B for every layer of unrolled blocks, in float64; fused maps one by one."""
    found = {path: np.asarray(leaf, np.float64) for path, leaf in base.items()}
    for path in leaves:
        if path.endswith("/a"):
            layer = path.removesuffix("/lora/a")
            a, b = (np.asarray(leaves[f"{layer}/lora/{name}"], np.float64) for name in "ab")
            kernel = found[f"{layer}/kernel"]
            if kernel.ndim == 2:
                kernel += scale * a @ b
            for i in range(3) if kernel.ndim == 3 else ():
                kernel[:, i] += scale * (a[:, i] @ b[i] if a.ndim == 3 else a @ b[:, i])
    return found


@functools.cache
def llama_logits(tuned: Tuned):
    return jax.jit(lambda params, tokens: tuned.apply({"params": params}, tokens))


@pytest.mark.parametrize("rs", [False, True], ids=["LoRA", "rsLoRA"])
def test_a_llama_with_terms_has_the_logits_of_the_sums_in_float64_and_without_training_its_own(rs):
    tuned, base, leaves = tower("lm", Llama(LLAMA), (r"lm/blocks.*/attn/(q|v)", "lm/blocks_1/mlp/.*"), rank=4, rs=rs)
    assert len(leaves) == 2 * (2 * 2 + 3)  # q, v of both layers, gate, up, down of one; A and B
    tokens = tokens_of((2, 9), LLAMA)
    scale = 16 / (2.0 if rs else 4.0)
    expected = oracle(tree(added(base, leaves, scale)), LLAMA, tokens, np.ones((2, 9), bool))
    run = llama_logits(tuned)
    assert_close(run(tree(base, leaves), tokens), expected)
    drawn = tuned.draw(jax.random.key(1))
    plain = jax.jit(lambda params, tokens: tuned.module.apply({"params": params}, tokens))(tree(base), tokens)
    np.testing.assert_array_equal(run(tree(base, drawn), tokens), plain)
    for path, leaf in drawn.items():
        bound = base[path.replace("lora/a", "kernel")].shape[0] ** -0.5 if path.endswith("/a") else 0
        assert float(abs(leaf).max()) == pytest.approx(bound, rel=0.05)  # PEFT: kaiming_uniform(a=sqrt(5)), and zeros


def test_fused_maps_share_one_a_where_their_file_has_one_layer_and_have_three_where_it_has_three():
    gpt2 = GPT2(GPT2Config(vocab=61, context=24, width=16, layers=2, heads=2))
    clip = CLIPVision(CLIPVisionConfig(image_size=16, patch_size=8, width=24, layers=2, heads=4, mlp=32, joint=12))
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    for name, module, x, a in (
        ("lm", gpt2, tokens_of((2, 9), LLAMA), (16, 4)),
        ("visual", clip, pixels, (24, 3, 4)),
    ):
        tuned, base, leaves = tower(name, module, (f"{name}/.*",), rank=4, alpha=2.0)
        assert leaves["blocks_0/attn/qkv/lora/a"].shape == a
        assert name == "lm" or "projection/lora/a" in leaves  # not only blocks; no convolution
        assert not any("embedding" in path for path in leaves)
        both = jax.jit(lambda p, q, x, t=tuned: (t.apply({"params": p}, x), t.module.apply({"params": q}, x)))
        whole = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in added(base, leaves, 0.5).items()}
        merged = flatten_dict(tuned.merge(tree(base, leaves)), sep="/")
        for path, leaf in whole.items():
            assert_close(merged[path], leaf, 3e-7)
        found, expected = both(tree(base, leaves), tree(whole), x)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_close(one, other)


def test_over_4_bits_the_term_is_added_to_what_the_codes_stand_for():
    rng = np.random.default_rng(0)
    kernel, a, b, x = (rng.standard_normal(n).astype(np.float32) for n in ((64, 5), (64, 3), (3, 5), (7, 64)))
    x = jnp.asarray(x)
    tuned = Tuned(QDense(64, 5, quant="nf4"), LoRA(rank=3, alpha=6.0), (Layer("", 64, (5,)),))
    codes = quantise(kernel)
    params = {**codes, "lora": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
    expected = np.asarray(x, np.float64) @ (np.asarray(dequantise(codes), np.float64) + 2 * a.astype(np.float64) @ b)
    assert_close(tuned.apply({"params": params}, x), expected)
    packed = Llama(dataclasses.replace(LLAMA, quant="nf4"))
    made = jax.eval_shape(packed.init, jax.random.key(0), ONE)["params"]
    base = flatten_dict({"lm": made}, sep="/")
    in_bits = low_rank.tuned(Arm(lora=("lm/blocks.*",)), {"lm": packed}, FAMILIES, base)["lm"]
    assert in_bits.layers == tower("lm", Llama(LLAMA), ("lm/blocks.*",))[0].layers
    with pytest.raises(ValueError, match="attn/k is held in 4 bits"):
        in_bits.merge(made)


def test_gradients_on_a_mesh_are_those_of_the_chain_rule_for_scanned_and_recomputed_blocks():
    """d loss / d A = s G B^T and d loss / d B = s A^T G, where G is the gradient of the kernel W + s A B."""
    module = Llama(dataclasses.replace(LLAMA, scan=True, remat="full"))
    single, base, leaves = tower("lm", Llama(LLAMA), ("lm/blocks.*",), rank=4)
    tuned, stack, many = tower("lm", module, ("lm/blocks.*",), rank=4)
    stack, many = (flatten_dict(stacked(tree(flat), 2), sep="/") for flat in (base, leaves))
    assert {p: x.shape for p, x in many.items()} == {p: x.shape for p, x in shapes_of(tuned).items()}
    tokens, weights = tokens_of((4, 9), LLAMA), jnp.asarray(np.random.default_rng(1).standard_normal((4, 9, 61)))

    def loss(apply, params):
        return jnp.sum(apply({"params": params}, tokens) * weights) / 100

    mesh = make_mesh((2, 2, 2))
    placed = shard_params({f"lm/{path}": leaf for path, leaf in (stack | many).items()}, mesh)
    at = {path: leaf.sharding.spec for path, leaf in placed.items()}
    assert at["lm/blocks/attn/q/lora/a"] == at["lm/blocks/mlp/gate/lora/a"] == P(None, "fsdp")
    assert at["lm/blocks/attn/out/lora/a"] == P(None, "tensor") and at["lm/blocks/mlp/up/lora/b"][2] == "tensor"
    held = {path.removeprefix("lm/"): leaf for path, leaf in placed.items()}
    trained = {path: held.pop(path) for path in many}
    found = jax.jit(jax.grad(lambda own: loss(tuned.apply, tree(held, own))))(trained)

    merged = single.merge(tree(base, leaves))
    kernels = flatten_dict(jax.jit(jax.grad(lambda p: loss(single.module.apply, p)))(merged), sep="/")
    expected = {}
    for layer in single.layers:
        g, a, b = (np.asarray(x, np.float64) for x in (
            kernels[f"{layer.path}/kernel"], leaves[f"{layer.path}/lora/a"], leaves[f"{layer.path}/lora/b"]
        ))  # fmt: skip
        expected[f"{layer.path}/lora/a"], expected[f"{layer.path}/lora/b"] = 4 * g @ b.T, 4 * a.T @ g
    expected = flatten_dict(stacked(tree(expected), 2), sep="/")
    assert_trees_close(dict(sorted(found.items())), dict(sorted(expected.items())), 1e-4)


def test_merging_and_taking_out_again_is_exact_to_rounding():
    tuned, base, leaves = tower("lm", Llama(LLAMA), ("lm/blocks.*",), rank=4)
    merged = flatten_dict(tuned.merge(tree(base, leaves)), sep="/")
    assert merged.keys() == base.keys()
    for path, leaf in added(base, leaves, 4.0).items():
        np.testing.assert_allclose(merged[path], leaf, rtol=0, atol=3e-7 * np.abs(leaf).max())
    back = flatten_dict(tuned.merge(tree(merged, leaves), sign=-1), sep="/")
    for path, leaf in base.items():
        np.testing.assert_allclose(back[path], leaf, rtol=0, atol=5e-7 * np.abs(merged[path]).max())


def test_dropout_is_on_the_terms_input_alone_scaled_and_only_where_a_key_is_given():
    tuned = Tuned(Dense(3), LoRA(rank=2, alpha=2.0, dropout=0.25), (Layer("", 4, (3,)),))
    a, b = jnp.ones((4, 2)), jnp.ones((2, 3))
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3), "lora": {"a": a, "b": b}}
    x = jnp.ones((4000, 4))
    np.testing.assert_array_equal(tuned.apply({"params": params}, x), jnp.full((4000, 3), 8.0))
    noisy = np.asarray(tuned.apply({"params": params}, x, rngs={"dropout": jax.random.key(0)}))
    kept = noisy[:, 0] * 0.75 / 2  # how many of the four inputs of a row
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)
    assert set(np.round(kept)) == {0, 1, 2, 3, 4} and abs(kept.mean() - 3) < 0.06


def test_the_full_size_recipe_trains_what_llavas_does():
    """Rank 128 on q, k, v, o (4096 x 4096) and gate, up, down (4096 x 11008) of 32 layers; a two-layer projector."""
    config = tiny.config_of("llava_lora")
    inputs, _ = abstract_inputs(config, make_mesh((1, 1, 1), jax.devices()[:1]), samples=665_000)
    arm = config.arm["baseline"]
    held = shapes(inputs, arm, model(inputs, arm))
    assert sum(leaf.size for path, leaf in held.items() if "/lora/" in path) == 319_815_680
    assert sum(leaf.size for path, leaf in held.items() if path.startswith("st/")) == 20_979_712


def test_an_arms_terms_are_counted_trained_by_their_pattern_and_asked_for_by_name():
    config = tiny.config_of("miniature_lora", **{"data.scenes": 24, "arm.eim.lora": ("lm/blocks.*", ".*/attn/.*")})
    inputs, _ = abstract_inputs(config, make_mesh((1, 1, 1), jax.devices()[:1]))
    arm = config.arm["eim"]
    vlm = model(inputs, arm)
    rank, c, v = 16, vlm.lm.config, vlm.visual.config
    square, wide = 2 * rank * c.width, rank * (c.width + c.mlp)  # kv_heads = heads here
    counted = {path: leaf for path, leaf in shapes(inputs, arm, vlm).items() if "/lora/" in path}
    size = sum(leaf.size for path, leaf in counted.items() if path.startswith("lm/"))
    shared = c.kv_heads * c.head_width
    assert size == c.layers * (2 * square + 2 * rank * (c.width + shared) + 3 * wide)
    size = sum(leaf.size for path, leaf in counted.items() if path.startswith("visual/"))
    assert size == v.layers * (4 * 2 * rank * v.width)  # q, k, v and out
    said = low_rank.described(vlm.parts)
    assert f"lm: {7 * c.layers} linear layers, rank 16, factor 2" in said and "visual: " in said
    untouched = jax.eval_shape(lambda key: fresh(vlm.untouched(), key), jax.random.key(0))
    assert not any("lora" in path for path in untouched)
    with pytest.raises(ConfigError, match=r"'lm/head' matches no linear layer; the towers have .*lm/blocks_N/attn/k"):
        model(inputs, dataclasses.replace(arm, lora=("lm/head",)))  # read as weights, not called
    stages = {"st": Stage(train=("st/.*",))}
    with pytest.raises(ConfigError, match=r"no stage of its sequence trains .*/lora/a"):
        low_rank.check_trained(dataclasses.replace(arm, sequence=("st",)), "eim", stages, vlm.parts, "")
    with pytest.raises(ConfigError, match=r"config\.arm\.eim\.lora: '\(' is no regular expression"):
        tiny.config_of("miniature_lora", **{"arm.eim.lora": ("(",)})


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", [{}, {"scan": True, "remat": "full"}], ids=["unrolled", "scan"])
def test_every_term_is_trained_with_dropout_and_cached_decoding_is_the_forward(form):
    config = dataclasses.replace(LLAMA, **form)
    module = Llama(config)
    made = jax.eval_shape(module.init, jax.random.key(0), ONE)["params"]
    base = flatten_dict(jax.jit(module.init)(jax.random.key(0), ONE)["params"], sep="/")
    arm = Arm(lora=("lm/blocks.*",), lora_rank=4, lora_dropout=0.2)
    tuned = low_rank.tuned(arm, {"lm": module}, FAMILIES, flatten_dict({"lm": made}, sep="/"))["lm"]
    rng = np.random.default_rng(3)
    leaves = {p: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32) for p, s in shapes_of(tuned).items()}
    assert len(leaves) == 14 * (1 if config.scan else config.layers)
    tokens = tokens_of((2, 9), config)

    def loss(own):
        made = tuned.apply({"params": tree(base, own)}, tokens, train=True, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(made**2)

    for path, gradient in jax.jit(jax.grad(loss))(leaves).items():
        layers = gradient if config.scan else gradient[None]
        assert all(float(abs(layer).max()) > 0 for layer in layers), path

    @jax.jit
    def both(params):
        def run(model, tokens):
            embeds, places = model.embed(tokens), jnp.broadcast_to(jnp.arange(9), (2, 9))
            whole, _ = model.hidden(embeds)
            cache = init_cache(config, 2, 9)
            first, cache = model.hidden(embeds[:, :8], positions=places[:, :8], cache=cache)
            last, _ = model.hidden(embeds[:, 8:], positions=places[:, 8:], cache=cache)
            return whole, jnp.concatenate([first, last], axis=1)

        return tuned.apply({"params": params}, tokens, method=run)

    whole, cached = both(tree(base, leaves))
    assert_close(cached, whole)

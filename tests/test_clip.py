import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close, assert_trees_close

from eim_jax.models.layers import Block, BlockConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vision.features import FEATURES, select
from eim_jax.pretrained import load_clip

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TINY = CLIPVisionConfig(
    image_size=16, patch_size=8, width=24, layers=2, heads=4, mlp=48, joint=12, prompts=3, prompt_hidden=7
)


@pytest.fixture(scope="module")
def golden():
    return {k: jnp.asarray(v) for k, v in np.load(GOLDENS / "clip.npz").items()}


def apply(model, params: dict, x: jax.Array, method: str = "__call__"):
    """model.method(x), compiled as one program: eager, every operation is compiled by itself."""
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))(params, x)


def features(clip, params, pixels, tokens) -> dict:
    vision, text = CLIPVision(clip.vision), CLIPText(clip.text)
    seen, image = apply(vision, params["visual"], pixels)
    hidden = apply(text, params["text"], tokens, "hidden")
    return {"seen": seen, "image": image, "hidden": hidden, "text": apply(text, params["text"], tokens)}


def random_params(config: CLIPVisionConfig) -> dict:
    return tiny.loud(CLIPVision(config).init, jnp.zeros((1, config.image_size, config.image_size, 3)), size=0.1)


def pixels_of(config: CLIPVisionConfig) -> jax.Array:
    shape = (2, config.image_size, config.image_size, 3)
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))


@pytest.mark.parametrize("scan", [False, True])
def test_features_and_every_gradient_equal_transformers(golden, scan):
    """The checkpoint has quick_gelu and the legacy eos_token_id 2: pooled at the largest id."""
    clip, gradient = load_clip(GOLDENS / "clip", scan=scan), load_clip(GOLDENS / "clip_gradient", scan=scan)

    def probed(params):
        values = features(clip, params, golden["pixels"], golden["tokens"])
        return sum(jnp.sum(golden[f"probe_{k}"] * v) for k, v in values.items()), values

    grads, values = jax.jit(jax.grad(probed, has_aux=True))(clip.params)
    for k, value in values.items():
        assert_close(value, golden[k], 1e-5, err_msg=k)
    assert_trees_close(grads, gradient.params, 1e-4)


def test_gelu_and_a_real_eos_id_are_honoured(golden, tmp_path):
    config = json.loads((GOLDENS / "clip" / "config.json").read_text())
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = "gelu"
    config["text_config"]["eos_token_id"] = 47
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDENS / "clip" / "model.safetensors", tmp_path)
    clip = load_clip(tmp_path)
    for k, value in features(clip, clip.params, golden["pixels"], golden["tokens"]).items():
        assert_close(value, golden[f"gelu_{k}"], 1e-5, err_msg=k)


def test_project_acts_on_every_token_as_on_cls():
    config = dataclasses.replace(TINY, prompts=0)
    params, model = random_params(config), CLIPVision(config)
    seen, image = apply(model, params, pixels_of(config))
    assert seen.shape == (2, config.tokens, 24)
    every = apply(model, params, seen, "project")
    assert_close(every[:, 0], image, 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_deep_prompts_equal_tokens_put_in_front_of_every_block_and_cut_off_after_it(scan):
    params = random_params(TINY)
    only_pre_ln = {"capture_intermediates": lambda module, _: module.name == "pre_ln"}
    _, captured = CLIPVision(TINY).apply({"params": params}, pixels_of(TINY), mutable="intermediates", **only_pre_ln)
    x = captured["intermediates"]["pre_ln"]["__call__"][0]  # what enters the first block
    p, block = params["prompt"], Block(BlockConfig(24, 4, 48, "quick_gelu"))
    for i in range(TINY.layers):
        hidden = np.tanh(p["tokens"][i] @ p["up"]["kernel"][i] + p["up"]["bias"][i][None])
        tokens = hidden @ p["down"]["kernel"][i] + p["down"]["bias"][i][None]
        x = jnp.concatenate([jnp.broadcast_to(tokens[None], (2, 3, 24)), x], axis=1)
        x = jax.jit(lambda w, x: block.apply(w, x, None, False, None, None, None, None, False)[0])(
            {"params": params[f"blocks_{i}"]}, x
        )
        x = x[:, 3:]
    if scan:
        blocks = [params[f"blocks_{i}"] for i in range(TINY.layers)]
        params = {k: v for k, v in params.items() if not k.startswith("blocks_")}
        params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    model = CLIPVision(dataclasses.replace(TINY, scan=scan))
    seen = apply(model, params, pixels_of(TINY), "tokens")
    assert seen.shape == (2, TINY.tokens, 24)
    assert_close(seen, x, 1e-5)


def test_only_the_first_eos_counts_and_later_tokens_change_nothing():
    config = CLIPTextConfig(vocab=20, context=9, width=12, layers=2, heads=2, mlp=24, joint=8, eos_id=15)
    tokens = jnp.array([[3, 4, 15, 15, 19, 1, 15]])
    params = tiny.loud(CLIPText(config).init, tokens)
    feature = apply(CLIPText(config), params, tokens)
    assert_close(apply(CLIPText(config), params, tokens[:, :3]), feature, 1e-6)
    hidden = apply(CLIPText(config), params, tokens, "hidden")
    kernel = params["projection"]["kernel"]
    assert_close(hidden[:, 2] @ kernel, feature, 1e-5)


def test_old_configs_pool_at_the_largest_id_and_others_need_their_eos_in_every_row():
    config = CLIPTextConfig(vocab=20, context=9, width=12, layers=1, heads=2, mlp=24, joint=8, eos_id=15)
    rows = jnp.array([[3, 4, 15, 1], [3, 18, 4, 1]])
    params = tiny.loud(CLIPText(config).init, rows)
    by_eos = CLIPText(config)
    with pytest.raises(ValueError, match=r"row 1 of the texts has no EOS token \(id 15\)"):
        by_eos.apply({"params": params}, rows)
    jitted = apply(by_eos, params, rows)  # nothing can be raised there: queues name the sample of a key that is NaN
    assert np.isfinite(jitted[0]).all() and np.isnan(jitted[1]).all()
    largest = CLIPText(dataclasses.replace(config, eos_id=None))
    hidden = apply(largest, params, rows, "hidden")
    expected = np.stack([hidden[0, 2], hidden[1, 1]]) @ params["projection"]["kernel"]
    assert_close(apply(largest, params, rows), expected, 1e-5)


def test_wrong_sizes_are_errors_that_say_the_right_ones():
    with pytest.raises(ValueError, match="16 x 16"):
        apply(CLIPVision(TINY), random_params(TINY), jnp.zeros((1, 24, 24, 3)))
    config = CLIPTextConfig(vocab=20, context=4, width=12, layers=1, heads=2, mlp=24, joint=8, eos_id=15)
    with pytest.raises(ValueError, match="context of 4"):
        CLIPText(config).init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))


def test_bfloat16_compute_stays_near_float32():
    params = random_params(TINY)
    exact = apply(CLIPVision(TINY), params, pixels_of(TINY))[1]
    rough = apply(CLIPVision(dataclasses.replace(TINY, dtype=jnp.bfloat16)), params, pixels_of(TINY))[1]
    assert rough.dtype == jnp.bfloat16
    assert_close(rough.astype(jnp.float32), exact, 0.05)


@pytest.mark.parametrize("side", [8, 13, 14, 16, 24])
def test_grid_is_adaptive_average_pooling_to_7_by_7_as_torch_defines_it(side):
    """Bin i of k: indices floor(i n / k) up to ceil((i + 1) n / k), plain mean; [CLS] as it is."""
    seen = np.random.default_rng(3).standard_normal((2, 1 + side**2, 5))
    grid = seen[:, 1:].reshape(2, side, side, 5)
    pooled = np.empty((2, 7, 7, 5))
    for i in range(7):
        rows = slice(math.floor(i * side / 7), math.ceil((i + 1) * side / 7))
        for j in range(7):
            columns = slice(math.floor(j * side / 7), math.ceil((j + 1) * side / 7))
            pooled[:, i, j] = grid[:, rows, columns].mean((1, 2))
    found = jax.jit(select, static_argnums=1)(jnp.asarray(seen, jnp.float32), "grid")
    assert found.shape == (2, 50, 5)
    assert_close(found, np.concatenate([seen[:, :1], pooled.reshape(2, 49, 5)], axis=1), 1e-6)


def test_a_grid_of_49_patches_or_fewer_stays_and_other_choices_are_slices():
    seen = jax.random.normal(jax.random.key(0), (2, 50, 3))
    for tokens in (50, 10):
        np.testing.assert_array_equal(select(seen[:, :tokens], "grid"), seen[:, :tokens])
        np.testing.assert_array_equal(select(seen[:, :tokens], "first"), seen[:, :tokens])
    many = jax.random.normal(jax.random.key(1), (2, 257, 3))
    np.testing.assert_array_equal(select(many, "first"), many[:, :50])
    np.testing.assert_array_equal(select(many, "cls"), many[:, :1])
    np.testing.assert_array_equal(select(many, "full"), many)


def test_select_keeps_the_dtype_and_refuses_what_it_cannot_choose():
    seen = jnp.ones((1, 257, 2), jnp.bfloat16)
    assert {select(seen, name).dtype for name in FEATURES} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="'patches' is not one of"):
        select(seen, "patches")
    with pytest.raises(ValueError, match="needs a square of patches, not 255"):
        select(seen[:, :256], "grid")

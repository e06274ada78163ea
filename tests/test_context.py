"""Claims about the language model's context: the longest row with what stands before it, checked on shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from eim_jax.config import ConfigError, Losses, LossWeights, Stage
from eim_jax.data.samples import DrawnImages, Sample, Split
from eim_jax.data.tokenize import Encoded
from eim_jax.training import partition
from eim_jax.training.context import check_context, tokens_before

CONTEXT, VISUAL = 32, 5  # of tiny.model


@pytest.fixture(scope="module")
def shapes():
    vlm, params = tiny.model(bos=1)
    return vlm, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}


def encoded(longest):
    valid = np.arange(longest)[None] < np.array([[2], [longest]])
    return Encoded(np.ones((2, longest), np.int32), valid, valid)


def check(shapes, longest, image=0, **losses):
    samples = (Sample("short", 0, "", "a"), Sample("long", image, "", "a"))
    split = Split("train", samples, DrawnImages(["i"], lambda row: Image.new("RGB", (8, 8)), ["i"]))
    vlm, params = shapes
    check_context(vlm, Stage(losses=LossWeights(losses)), Losses(), params, encoded(longest), split, "config.stages.a")


def test_what_stands_before_a_text_is_counted_as_the_model_lays_it_out(shapes):
    vlm, params = shapes
    assert tokens_before(vlm, params, with_image=True) == VISUAL + 1  # and BOS
    assert tokens_before(vlm, params, with_image=False) == 1
    whole = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    visual = jnp.zeros((1, VISUAL, tiny.WIDTH))
    tokens = jnp.ones((1, 3), jnp.int32)
    read = vlm.lm_input(partition.unflatten(whole), tokens, jnp.ones((1, 3), bool), visual=visual)
    assert read.embeds.shape[1] == VISUAL + 1 + 3


def test_the_longest_row_that_fits_is_taken_and_one_more_token_is_refused(shapes):
    check(shapes, CONTEXT - VISUAL - 1, base=1)
    with pytest.raises(ConfigError, match=r"that of sample 'long', is 27 tokens, and 6 slots stand .* at most 26"):
        check(shapes, CONTEXT - VISUAL, base=1)


@pytest.mark.parametrize("markers", [((), ()), ((3, 4), (3, 4, 5)), ((3,), tuple(range(3, 12)))])
def test_a_row_without_a_picture_has_the_slots_of_one_with_it_and_what_is_let_through_runs(shapes, markers):
    """Also where the marker of no picture is the longest: 9 ids where a picture takes 1 and 5 tokens."""
    with_image, without_image = markers
    plain, params = shapes
    vlm = dataclasses.replace(plain, with_image=with_image, without_image=without_image)
    before = 1 + max(len(with_image) + VISUAL, len(without_image))
    check((vlm, params), CONTEXT - before, image=None, base=1)
    with pytest.raises(
        ConfigError, match=rf"{before} slots stand .*max_tokens_text_only to at most {CONTEXT - before}"
    ):
        check((vlm, params), CONTEXT - before + 1, image=None, base=1)

    def hidden(params, tokens):
        visual, pictured = jnp.zeros((2, VISUAL, tiny.WIDTH)), jnp.array([True, False])
        return vlm.lm_hidden(params, visual, tokens, jnp.ones(tokens.shape, bool), has_image=pictured)

    def run(length):
        return jax.eval_shape(hidden, partition.unflatten(params), jax.ShapeDtypeStruct((2, length), jnp.int32))

    assert run(CONTEXT - before).shape[1] == CONTEXT - before
    with pytest.raises(ValueError, match="do not fit"):
        run(CONTEXT - before + 1)


def test_a_stage_of_texts_alone_has_the_visual_tokens_room_and_one_without_the_lm_any(shapes):
    check(shapes, CONTEXT - 1, lm=1)
    with pytest.raises(ConfigError, match="at most 31"):
        check(shapes, CONTEXT, lm=1)
    check(shapes, 10 * CONTEXT, st=1)

"""How an image enters each language model: what is read, in which order, and that decoding sees what training saw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close, assert_most_probable, size_of

from eim_jax.generation.sampler import DecodeConfig, continue_text
from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM

VOCAB, WIDTH, BOS = 31, 16, 1
WITH, WITHOUT = (5, 6, 7), (5, 6, 8, 9, 10)
KINDS = {"plain": None, "lavin": Router(temperature=2.0), "prompts": ZeroInit(prompts=4, layers=2)}


@functools.cache
def build(kind, scan=False):
    """A tiny VLM on LLaMA, its adapters moved off their initial identity, and a batch with a text-only row."""
    vision = CLIPVisionConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp=32, joint=8)
    text = CLIPTextConfig(vocab=VOCAB, context=9, width=16, layers=1, heads=2, mlp=32, joint=8, eos_id=VOCAB - 1)
    llama = LlamaConfig(
        vocab=VOCAB, context=64, width=WIDTH, layers=3, heads=4, kv_heads=2, mlp=24, adapter=KINDS[kind], scan=scan
    )
    st = STConfig("mlp", width_in=16, width_out=WIDTH, tokens=4)
    marks = {"with_image": WITH, "without_image": WITHOUT} if kind == "lavin" else {}
    vlm = VLM(CLIPVision(vision), CLIPText(text), make_st(st), Llama(llama), bos=BOS, **marks)
    params = {
        "visual": tiny.loud(vlm.visual.init, jnp.zeros((1, 8, 8, 3)), size=0.1),
        "st": tiny.loud(vlm.st.init, jnp.zeros((1, 5, 16)), size=0.1),
        "lm": tiny.loud(vlm.lm.init, jnp.zeros((1, 3), jnp.int32)),
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(11, VOCAB, (3, 6)).astype(np.int32)
    valid = np.arange(6)[None] < np.array([6, 4, 5])[:, None]
    images = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    has_image = np.array([True, False, True])
    given = (np.where(valid, tokens, 0), valid, images, has_image)
    return vlm, params, *(jnp.asarray(x) for x in given)


def look(vlm, params, images):
    return vlm.connect(params, vlm.encode_image(params, images))


def visible(read, row):
    keep = np.asarray(read.valid[row])
    return np.asarray(read.embeds[row])[keep], np.asarray(read.positions[row])[keep]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_lavin_reads_bos_image_and_visual_tokens_or_na_from_position_one(count):
    """In as many slots as the longer of the two needs: "Image: N/A" with 1 visual token, both alike with 2."""
    vlm, params, tokens, valid, images, has_image = build("lavin")
    visual = look(vlm, params, images)[:, :count]
    read = vlm.lm_input(params, tokens, valid, visual=visual, has_image=has_image)
    table = np.asarray(params["lm"]["token_embedding"]["embedding"])
    for row in range(3):
        own = [int(t) for t in tokens[row][valid[row]]]
        if has_image[row]:
            expected = np.concatenate([table[[BOS, *WITH]], np.asarray(visual[row]), table[own]])
        else:
            expected = table[[BOS, *WITHOUT, *own]]
        found, positions = visible(read, row)
        np.testing.assert_array_equal(found, expected)
        assert positions.tolist() == list(range(1, len(expected) + 1))  # 0 is the modality row's
    before = 1 + max(len(WITH) + count, len(WITHOUT))
    assert read.embeds.shape[1] == before + tokens.shape[1]
    # Experiments read the visual tokens there.
    np.testing.assert_array_equal(read.embeds[0, before - count : before], visual[0])
    alone = vlm.lm_input(params, tokens[:1], valid[:1], visual=visual[:1])
    np.testing.assert_array_equal(visible(alone, 0)[0], visible(read, 0)[0])
    assert alone.embeds.shape[1] == 1 + len(WITH) + count + tokens.shape[1]


@pytest.mark.parametrize("count", [1, 4])
def test_what_a_row_gives_does_not_depend_on_slots_that_other_rows_need(count):
    vlm, params, tokens, valid, images, has_image = build("lavin")
    visual = look(vlm, params, images)[:, :count]
    together = vlm.token_logits(params, visual, tokens, valid, has_image=has_image)
    for row in range(3):
        read = vlm.lm_input(params, tokens, valid, visual=visual, has_image=has_image)
        keep = np.flatnonzero(np.asarray(read.valid[row]))[None]
        steer = jax.tree.map(lambda part, row=row: part[:, row : row + 1], read.steer)
        hidden, _ = vlm.lm.apply(
            {"params": params["lm"]},
            read.embeds[row, keep],
            positions=read.positions[row, keep],
            steer=steer,
            method="hidden",
        )
        own = int(valid[row].sum())
        expected = vlm.logits(params, hidden[:, -own - 1 : -1])[0]
        assert_close(together[row, :own], expected, size=size_of(expected))


def test_llama_adapter_reads_text_alone_from_position_zero():
    vlm, params, tokens, valid, images, has_image = build("prompts")
    read = vlm.lm_input(params, tokens, valid, visual=look(vlm, params, images), has_image=has_image)
    table = np.asarray(params["lm"]["token_embedding"]["embedding"])
    for row in range(3):
        found, positions = visible(read, row)
        np.testing.assert_array_equal(found, table[[BOS, *(int(t) for t in tokens[row][valid[row]])]])
        assert positions.tolist() == list(range(len(found)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_only_row_does_not_depend_on_the_pixels_in_its_slot_and_the_others_do(kind):
    vlm, params, tokens, valid, images, has_image = build(kind)
    answers = [
        np.asarray(vlm.token_logits(params, look(vlm, params, pixels), tokens, valid, has_image=has_image))
        for pixels in (images, 255 - images)
    ]
    np.testing.assert_array_equal(answers[0][1, :4], answers[1][1, :4])
    assert np.abs(answers[0][0] - answers[1][0]).max() > 1e-4
    assert np.abs(answers[0][2, :5] - answers[1][2, :5]).max() > 1e-4


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_follows_the_teacher_forced_logits_at_every_position(kind, scan):
    vlm, params, tokens, valid, images, has_image = build(kind, scan)
    visual = look(vlm, params, images)
    read = vlm.lm_input(params, tokens, valid, visual=visual, has_image=has_image)
    decoded = continue_text(vlm.lm, params["lm"], read, DecodeConfig(max_tokens=7), eos_id=None)
    for row in range(3):
        start = int(valid[row].sum())
        whole = jnp.concatenate([tokens[row, :start], decoded.tokens[row]])[None]
        logits = vlm.token_logits(
            params, visual[row : row + 1], whole, jnp.ones(whole.shape, bool), has_image=has_image[row : row + 1]
        )
        chosen = jax.nn.log_softmax(logits[0, start:])
        assert_most_probable(decoded.tokens[row], logits[0, start:])
        forced = np.take_along_axis(np.asarray(chosen), np.asarray(decoded.tokens[row])[:, None], 1).mean()
        assert_close(decoded.logprob[row], forced, size=size_of(logits))


@pytest.mark.parametrize("kind", ["lavin", "prompts"])
def test_beams_keep_their_own_rows_steering(kind):
    vlm, params, tokens, valid, images, has_image = build(kind)
    read = vlm.lm_input(params, tokens, valid, visual=look(vlm, params, images), has_image=has_image)
    config = DecodeConfig("beam", beams=3, max_tokens=5)
    together = continue_text(vlm.lm, params["lm"], read, config, eos_id=None)
    for row in range(3):
        part = slice(row, row + 1)
        alone = vlm.lm_input(
            params, tokens[part], valid[part], visual=look(vlm, params, images[part]), has_image=has_image[part]
        )
        found = continue_text(vlm.lm, params["lm"], alone, config, eos_id=None)
        np.testing.assert_array_equal(found.tokens[0], together.tokens[row])


@pytest.mark.parametrize("kind", ["lavin", "prompts"])
def test_the_original_lm_is_the_one_without_adapters(kind):
    vlm, params, tokens, valid, *_ = build(kind)
    plain = build("plain")[0]
    bare = {**params, "lm": {name: leaf for name, leaf in params["lm"].items() if name != "adapter"}}
    found = vlm.untouched().lm_block(bare, tokens, valid)
    np.testing.assert_array_equal(found, plain.lm_block(bare, tokens, valid))
    assert np.abs(np.asarray(found - vlm.lm_block(params, tokens, valid))).max() > 1e-3


def test_the_first_token_of_a_text_only_row_is_predicted_from_what_stands_before_it():
    vlm, params, tokens, valid, images, has_image = build("lavin")
    logits = vlm.token_logits(params, look(vlm, params, images), tokens, valid, has_image=has_image)
    read = vlm.lm_input(params, tokens[1:2, :0], valid[1:2, :0], visual=None, has_image=jnp.array([False]))
    # Without text and visual tokens the row is BOS alone; LaVIN's "Image: N/A" is what an image row's slots would hold.
    assert read.embeds.shape[1] == 1
    table = params["lm"]["token_embedding"]["embedding"]
    embeds = table[jnp.array([BOS, *WITHOUT])][None]
    steer = vlm.lm.apply({"params": params["lm"]}, None, jnp.array([False]), method="steer")
    hidden, _ = vlm.lm.apply({"params": params["lm"]}, embeds, steer=steer, method="hidden")
    expected = vlm.lm.apply({"params": params["lm"]}, hidden[:, -1:], method="logits")[0, 0]
    assert_close(logits[1, 0], expected, 1e-5, rtol=1e-5)

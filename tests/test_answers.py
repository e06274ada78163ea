"""Answers and their likelihoods in batches over eight devices are those of one row alone, computed without padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import miniature_lavin, miniature_llama_adapter
from eim_jax.config import from_config_dict
from eim_jax.data import tokenize
from eim_jax.data.datasets import load_split
from eim_jax.evaluation.tasks import choosing, options, questions
from eim_jax.generation import batched_inference as inference
from eim_jax.generation import visual_tokens
from eim_jax.generation.sampler import DecodeConfig, continue_text
from eim_jax.training import arm_model, partition, setup
from eim_jax.utils.images import clip_preprocess

CONFIGS = {"lavin": miniature_lavin, "prompts": miniature_llama_adapter}


@pytest.fixture(scope="module", params=CONFIGS)
def world(request, tmp_path_factory):
    """An untrained EIM arm, moved off its identity, and eleven test questions."""
    values = CONFIGS[request.param].get_config()
    values.data.scenes, values.decode.batch, values.decode.max_tokens = 40, 8, 6
    config = from_config_dict(values)
    loaded = setup.load(config, tmp_path_factory.mktemp("answers"))
    vlm, params = arm_model.start(loaded, config.arm["eim"])
    rng = np.random.default_rng(0)
    params = {
        path: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32) if "/adapter/" in path else leaf
        for path, leaf in params.items()
    }
    test = load_split(config, "test", loaded.workdir)
    split = dataclasses.replace(test, samples=test.samples[:11])
    assert 0 < sum(sample.image is None for sample in split.samples) < 11
    return loaded, vlm, params, split


def alone(loaded, vlm, params, split, sample, response=""):
    """(parameters, visual tokens, has_image, token ids) of one sample, unpadded."""
    tree = jax.device_put(jax.device_get(partition.unflatten(params)), jax.devices()[0])
    size = vlm.visual.config.image_size
    pixels = np.zeros((size, size, 3), np.uint8)
    if sample.image is not None:
        pixels = clip_preprocess(split.images[sample.image], size, loaded.config.data.fit)
    visual = vlm.connect(tree, vlm.encode_image(tree, jnp.asarray(pixels)[None]))
    ids = [
        id_
        for words in (sample.instruction, response)
        for id_ in loaded.lm_tokenizer(words, add_special_tokens=False)["input_ids"]
    ]
    return tree, visual, jnp.array([sample.image is not None]), jnp.asarray([ids], jnp.int32)


def looked(world):
    """The visual tokens of the questions' images."""
    loaded, vlm, params, split = world
    return visual_tokens.encode_images(loaded, vlm, params, split, [sample.image for sample in split.samples])


def test_each_answer_is_the_one_its_question_gets_alone(world):
    loaded, vlm, params, split = world
    images = [sample.image for sample in split.samples]
    prompts = [sample.instruction for sample in split.samples]
    found = inference.generate_text(loaded, vlm, params, looked(world), images, prompts, "greedy", "answers")
    assert len(found) == 11
    for sample, said in [(split.samples[row], found[row]) for row in (0, 1, 10)]:
        tree, visual, has_image, tokens = alone(loaded, vlm, params, split, sample)
        read = vlm.lm_input(tree, tokens, jnp.ones(tokens.shape, bool), visual=visual, has_image=has_image)
        decoded = continue_text(
            vlm.lm, tree["lm"], read, DecodeConfig(max_tokens=6), eos_id=loaded.lm_tokenizer.eos_token_id
        )
        words = loaded.lm_tokenizer.decode(np.asarray(decoded.tokens[0, : int(decoded.length[0])]).tolist())
        assert said == words.strip()


def test_the_most_likely_option_is_the_largest_of_sums_of_log_probabilities(world):
    loaded, vlm, params, split = world
    responses = options.OPTIONS.responses(split)
    chosen = choosing.likeliest(loaded, vlm, params, split, responses, looked(world), end=options.OPTIONS.ended)
    assert list(chosen) == [sample.id for sample in split.samples]
    for sample in split.samples[:2]:
        values = []
        for k in range(len(split.problems[sample.id].choices)):
            sentence = f"The answer is {'ABCDE'[k]}."
            tree, visual, has_image, tokens = alone(loaded, vlm, params, split, sample, sentence)
            ones = jnp.ones(tokens.shape, bool)
            logits = np.asarray(vlm.token_logits(tree, visual, tokens, ones, has_image=has_image)[0], np.float64)
            length = len(loaded.lm_tokenizer(sentence, add_special_tokens=False)["input_ids"])
            scores = np.asarray(jax.nn.log_softmax(logits))[np.arange(tokens.shape[1]), np.asarray(tokens[0])]
            values.append(scores[-length:].sum())
        assert chosen[sample.id] == int(np.argmax(values))


def test_likelihoods_count_every_supervised_token_once_however_the_last_batch_is_filled(world):
    loaded, vlm, params, split = world
    encoded = tokenize.encode_split(split, loaded.lm_tokenizer, 96, eos=True)
    images = [sample.image for sample in split.samples]
    loss, count = inference.likelihoods(loaded, vlm, params, looked(world), images, encoded, "likelihood")
    np.testing.assert_array_equal(count, encoded.supervised.sum(1))
    sample = split.samples[9]
    tree, visual, has_image, tokens = alone(loaded, vlm, params, split, sample, sample.response)
    tokens = jnp.concatenate([tokens, jnp.array([[loaded.lm_tokenizer.eos_token_id]], jnp.int32)], axis=1)
    logits = vlm.token_logits(tree, visual, tokens, jnp.ones(tokens.shape, bool), has_image=has_image)[0]
    scores = np.asarray(jax.nn.log_softmax(logits))[np.arange(tokens.shape[1]), np.asarray(tokens[0])]
    np.testing.assert_allclose(loss[9], scores[-int(count[9]) :].sum(), rtol=1e-4)


def test_the_shuffled_likelihood_shows_every_pictured_question_another_picture(world, monkeypatch):
    loaded, vlm, params, split = world
    seen, shown, asked = looked(world), {}, [row for row, s in enumerate(split.samples) if s.image is not None]

    def spy(inputs, vlm, params, seen, images, encoded, label):
        shown[label] = images, encoded
        return np.full(len(images), -1.0 - len(shown)), np.ones(len(images))

    monkeypatch.setattr(questions, "likelihoods", spy)
    found, sums = questions.response_likelihoods(loaded, vlm, params, options.OPTIONS.ask(split), seen)
    (own, words), (other, theirs) = shown.values()
    assert list(own) == [sample.image for sample in split.samples]
    assert len(other) == len(asked) and all(other[at] != own[row] for at, row in enumerate(asked))
    assert None not in other
    np.testing.assert_array_equal(theirs.tokens, words.tokens[asked])
    assert found == {"nll": 2.0, "nll_image": 2.0, "nll_image_shuffled": 3.0}
    assert sums["nll"] == [[2.0, 1]] * len(split)
    assert [row for row, (_, tokens) in enumerate(sums["nll_image_shuffled"]) if tokens] == asked

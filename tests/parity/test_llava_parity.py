"""An exported arm as transformers' LlavaForConditionalGeneration: logits, pictures, words and answers are ours."""

import export_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eim_jax.commands import exporting
from eim_jax.commands.chat import answer
from eim_jax.data.datasets import chat_prompt
from eim_jax.training import partition
from eim_jax.utils.images import normalise

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")
CASES = {
    "frozen LM": ("clipcap", False, {}),
    "tuned LM, stretched pictures": ("clipcap", True, {"data.fit": "stretch"}),
    "LaVIN, folded": ("lavin", False, {}),
}
QUESTION = "How many red circles are there?"


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def exported(request, tmp_path_factory):
    """(inputs, vlm, nested parameters, the exported folder, the model, its processor)."""
    recipe, tuned, changes = request.param
    home = tmp_path_factory.mktemp("llava")
    config = export_cases.config_of(recipe, tuned, **changes)
    inputs, vlm, params = export_cases.loud_arm(config, home)
    exporting.write_arm(inputs, "baseline", params, home / "out")
    folder = home / "out" / "llava"
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    return inputs, vlm, params, model.eval(), processor


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8))


def asked(processor):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    return processor(images=picture(), text=text, return_tensors="pt", add_special_tokens=False)


def test_words_are_read_by_the_ids_of_training(exported):
    """BOS, LaVIN's marker, a token for each visual token, the question in its words; nothing more."""
    inputs, vlm, _, _, processor = exported
    ids = asked(processor)["input_ids"][0].tolist()
    image = processor.image_token_id
    words = inputs.lm_tokenizer(chat_prompt(inputs.config.data, QUESTION), add_special_tokens=False)["input_ids"]
    assert ids == [vlm.bos, *vlm.with_image, *[image] * vlm.visual.config.tokens, *words]


def test_logits_behind_a_picture_are_ours(exported, agree):
    inputs, vlm, params, model, processor = exported
    given = asked(processor)
    with torch.no_grad():
        theirs = model(**given).logits[0].numpy()
    tree = partition.unflatten(params)
    pixels = given["pixel_values"].numpy().transpose(0, 2, 3, 1)
    config = vlm.visual.config
    grey = np.clip(np.round((pixels * np.array(config.std) + np.array(config.mean)) * 255), 0, 255).astype(np.uint8)
    np.testing.assert_allclose(normalise(jnp.asarray(grey), config.mean, config.std), pixels, atol=1e-5)
    words = given["input_ids"][0, 1 + len(vlm.with_image) + config.tokens :].numpy()

    @jax.jit
    def ours(tree):
        visual = vlm.connect(tree, vlm.encode_image(tree, jnp.asarray(grey)))
        tokens = jnp.asarray(words, jnp.int32)[None]
        hidden = vlm.lm_block(tree, tokens, jnp.ones(tokens.shape, bool), visual=visual, has_image=jnp.ones(1, bool))
        return vlm.logits(tree, hidden)[0]

    # Ours has slots for LaVIN's other marker too, which nothing sees: the words are the last ones of both.
    agree("logits", np.asarray(ours(tree))[-len(words) :], theirs[-len(words) :, : inputs.lm.config.vocab])
    assert theirs.shape[1] - inputs.lm.config.vocab in (0, 1)  # the picture's own token, never the likeliest
    assert (theirs.argmax(-1) < inputs.lm.config.vocab).all()


def test_a_greedy_answer_is_ours(exported, tmp_path):
    """From the picture's file on: resize, crop, normalise, prompt, decode."""
    inputs, vlm, params, model, processor = exported
    picture().save(tmp_path / "a.png")
    ours = answer(inputs, vlm, params, tmp_path / "a.png", QUESTION)
    given = asked(processor)
    length = given["input_ids"].shape[1]
    tokens = model.generate(**given, do_sample=False, max_new_tokens=inputs.config.decode.max_tokens)[0, length:]
    theirs = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert theirs.split() == ours.split() and theirs.strip()

"""Claims about SigLIP and DINOv2 as vision towers; oracles: NumPy in float64, published counts, stored values."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BitImageProcessorPil,
    PreTrainedTokenizerFast,
    Siglip2Tokenizer,
    SiglipImageProcessorPil,
)

from eim_jax.config import ConfigError
from eim_jax.data.tokenize import encode_padded, load_tokenizer
from eim_jax.models.hugging_face import WeightsError
from eim_jax.models.vision import VISION_TOWERS
from eim_jax.models.vision.dinov2 import DINOv2Config
from eim_jax.models.vision.siglip import SigLIPText, SigLIPTextConfig, SigLIPVision, SigLIPVisionConfig
from eim_jax.pretrained import CLIP, clip_config, clip_shapes, export_clip, image_processor, load_clip, resolve
from eim_jax.pretrained.positions import interpolated
from eim_jax.training import joint_space
from eim_jax.utils.images import clip_preprocess, normalise
from tests import mains
from tests.tiny import config_of, loud

VISION = SigLIPVisionConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp=24)
TEXT = SigLIPTextConfig(vocab=724, context=6, width=16, layers=1, heads=2, mlp=24, joint=16)


@pytest.fixture(scope="module")
def tower():
    """A tiny SigLIP of which no parameter is zero."""
    visual = loud(SigLIPVision(VISION).init, jnp.zeros((1, 32, 32, 3)))
    text = loud(SigLIPText(TEXT).init, jnp.zeros((1, 6), jnp.int32))
    return CLIP(VISION, TEXT, {"visual": visual, "text": text}, logit_scale=2.3, logit_bias=-10.0)


@pytest.fixture
def folder(tower, tmp_path):
    """The tiny SigLIP as a folder, with the miniature's tokenizer."""
    export_clip(tmp_path / "siglip", tower)
    for file in resolve("miniature/clip").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "siglip")
    return tmp_path / "siglip"


def rewritten(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_siglip_pools_by_attention_and_its_choices_of_tokens_keep_the_pooled_vector(tower):
    """One program: all tokens, the pooled vector from each choice, and the text's feature: the last place's."""
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    ids = jnp.asarray([[5, 9, 1, 1, 1, 1], [7, 8, 9, 10, 11, 1]])

    @jax.jit
    def run(params):
        module = SigLIPVision(VISION)
        see = {n: module.apply({"params": params["visual"]}, pixels, n, method="tokens") for n in module.features}
        pooled = {n: module.apply({"params": params["visual"]}, x, n, method="pooled") for n, x in see.items()}
        text = SigLIPText(TEXT)
        hidden = text.apply({"params": params["text"]}, ids, method="hidden")
        return see, pooled, hidden, text.apply({"params": params["text"]}, ids)

    see, pooled, hidden, feature = run(tower.params)
    assert [see[name].shape for name in ("full", "pooled", "grid")] == [(2, 16, 16), (2, 1, 16), (2, 17, 16)]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), tower.params["visual"]["pool"])
    x, kernel, bias = np.asarray(see["full"], np.float64), p["qkv"]["kernel"], p["qkv"]["bias"]
    q, k, v = (of @ kernel[:, i] + bias[i] for i, of in enumerate((p["probe"], x, x)))
    scores = np.einsum("he,bnhe->bhn", q.reshape(2, 8), k.reshape(2, 16, 2, 8)) / 8**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhn,bnhe->bhe", weights, v.reshape(2, 16, 2, 8)).reshape(2, 16)
    y = mixed @ p["out"]["kernel"] + p["out"]["bias"]
    z = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * p["ln"]["scale"] + p["ln"]["bias"]
    up = z @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    up = 0.5 * up * (1 + np.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
    expected = y + up @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
    for name in see:
        np.testing.assert_allclose(pooled[name], expected, rtol=2e-5, atol=2e-5)
    head = tower.params["text"]["projection"]
    last = np.asarray(hidden)[:, -1] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(feature, last, rtol=1e-5, atol=1e-5)


def test_an_exported_siglip_is_read_back_whole(folder, tower):
    again = load_clip(folder)
    assert (again.vision, again.text) == (VISION, TEXT)
    assert (again.logit_scale, again.logit_bias) == (pytest.approx(2.3), -10.0)
    jax.tree.map(np.testing.assert_array_equal, again.params, tower.params)


def test_positions_are_interpolated_as_pytorch_does():
    """Stored: torch.nn.functional.interpolate([1, -2, 0.5, 3], mode="bicubic") to 6 and to 3 places."""
    row = np.array([1.0, -2.0, 0.5, 3.0])
    table = np.repeat(row[:, None], 4, 1).reshape(16, 1)  # the same in every column
    stored = {
        6: [1.2604169845, -0.734375, -1.9450230598, -0.1278933584, 1.984375, 3.2170138359],
        3: [0.5260417461, -1.265625, 2.6846058368],
    }
    for new, values in stored.items():
        found = interpolated(np.concatenate([[[7.0]], table]), 4, new, has_cls=True)
        assert found[0] == 7
        np.testing.assert_allclose(found[1:].reshape(new, new), np.repeat(np.array(values)[:, None], new, 1), atol=1e-6)
    np.testing.assert_array_equal(interpolated(table, 4, 4, has_cls=False), table)


def test_another_picture_size_changes_positions_alone(folder, tower):
    found = load_clip(folder, image_size=48)
    assert found.vision == dataclasses.replace(VISION, image_size=48)
    own, moved = tower.params["visual"], found.params["visual"]
    expected = interpolated(np.asarray(own["position_embedding"]), 4, 6, has_cls=False)
    np.testing.assert_allclose(moved["position_embedding"], expected)
    rest = [{k: v for k, v in tree.items() if k != "position_embedding"} for tree in (own, moved)]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    with pytest.raises(WeightsError, match="pictures of 7 pixels have no patch of 8"):
        clip_config(folder, image_size=7)


def test_what_is_not_read_is_refused_by_name(folder, tmp_path):
    with pytest.raises(WeightsError, match=r"has its own text tower: config\.towers\.text is for one that has none"):
        clip_config(folder, text="miniature/clip")
    with pytest.raises(WeightsError, match=r"config\.json: model_type is 'siglip2': .*NaFlex.*google/siglip2"):
        clip_config(rewritten(folder, model_type="siglip2"))
    with pytest.raises(WeightsError, match="model_type is 'siglip_vision_model': it is a part saved alone"):
        clip_config(rewritten(folder, model_type="siglip_vision_model"))
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    headless = {"model_type": "siglip", "vision_config": {**vision, "vision_use_head": False}}
    with pytest.raises(WeightsError, match=r"vision_config\.vision_use_head false is not supported"):
        clip_config(rewritten(folder, **headless))
    with pytest.raises(WeightsError, match=r"projection_size 8 is not vision_config\.hidden_size 16"):
        clip_config(rewritten(folder, vision_config=vision, text_config={**text, "projection_size": 8}))


# As the model cards on the hub count them; SigLIP's two numbers and DINOv2's mask token are no parameters of ours.
COUNTS = {
    "google/siglip-base-patch16-224": 203_155_970 - 2,
    "google/siglip-so400m-patch14-384": 877_960_498 - 2,
    "facebook/dinov2-base": 86_580_480 - 768 - 768 * (37**2 - 16**2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_the_published_number_of_parameters(name):
    shapes = next(family.published[name] for family in VISION_TOWERS.values() if name in family.published)
    stacked = [None if shape is None else dataclasses.replace(shape, scan=True) for shape in shapes]
    assert sum(leaf.size for leaf in clip_shapes(*stacked).values()) == COUNTS[name]


@pytest.fixture(scope="module")
def words():
    """A tokenizer as SigLIP's: lower-cases, puts EOS behind, pads with a token of its own."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgh"])}
    own = Tokenizer(models.WordLevel(vocab, "<unk>"))
    own.normalizer, own.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return lambda **options: PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **options
    )


def test_captions_are_padded_to_the_context_as_the_tokenizer_frames_them(words, capsys):
    texts = ["A b", "", "a b c d e f g h"]
    expected = [[3, 4, 1, 0, 0], [1, 0, 0, 0, 0], [3, 4, 5, 6, 1]]
    np.testing.assert_array_equal(encode_padded(texts, words(), 5), expected)
    assert "1 of 3 texts cut to the 5 tokens that the text tower reads" in capsys.readouterr().out
    theirs = words()(texts, padding="max_length", truncation=True, max_length=5)["input_ids"]
    np.testing.assert_array_equal(theirs, expected)
    np.testing.assert_array_equal(encode_padded(["a b"], words(padding_side="left"), 5), [[0, 0, 3, 4, 1]])
    with pytest.raises(ValueError, match="context is 1: needs room"):
        encode_padded(["a"], words(), 1)


def test_siglip2s_class_lower_cases_what_its_file_does_not(tmp_path):
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "b": 5, "A": 6, "▁": 7}
    Siglip2Tokenizer(vocab=vocab, merges=[]).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # Gemma's, as SigLIP 2's files have it
    file.write_text(json.dumps({**content, "normalizer": replace}))
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)(["A b"])["input_ids"]
    assert load_tokenizer(tmp_path)(["A b"])["input_ids"] == theirs == [[4, 7, 5]]


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    ("processor", "fit"),
    [
        (SiglipImageProcessorPil(size={"height": 32, "width": 32}), "stretch"),
        (BitImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}), "crop"),
    ],
    ids=["siglip", "dinov2"],
)
def test_pictures_are_made_as_the_familys_processor_makes_them(processor, fit, resample, tmp_path):
    processor.resample = resample
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 85, 3), np.uint8))
    expected = processor(picture, return_tensors="np")["pixel_values"][0]
    found = image_processor(tmp_path)
    pixels = clip_preprocess(picture, 32, found.check(32, fit))
    ours = np.moveaxis(np.asarray(normalise(jnp.asarray(pixels[None]), found.mean, found.std)[0]), 2, 0)
    np.testing.assert_allclose(ours, expected, atol=1.01 / 255 / min(found.std))


def _arm(**changes):
    config = config_of("miniature", **changes)
    return config, config.arm["eim"]


def test_an_arm_that_asks_for_what_its_tower_lacks_is_refused():
    blind, seeing = DINOv2Config(image_size=28), DINOv2Config(image_size=28, joint=64)
    text = clip_config("miniature/clip")[1]
    with pytest.raises(ConfigError, match=r"stages\.ie\.losses: K_t is made by a text tower, .* config\.towers\.text"):
        joint_space.check(*_arm(), blind, None)
    with pytest.raises(ConfigError, match=r"add 'visual/projection/\.\*' to config\.stages\.ie\.train"):
        joint_space.check(*_arm(), seeing, text)
    joint_space.check(*_arm(**{"stages.ie.train": ("visual/projection/.*", "st/.*", "visual/prompt/.*")}), seeing, text)
    with pytest.raises(ConfigError, match=r"output_layer: .* has no output layer"):
        joint_space.check(*_arm(**{"arm.eim.output_layer": True}), blind, None)
    config, arm = _arm()
    with pytest.raises(ConfigError, match=r"visual_adapter: an image's \[CLS\] routes"):
        joint_space.check(config, dataclasses.replace(arm, visual_adapter=True), VISION, TEXT)
    with pytest.raises(ConfigError, match=r"features='cls': .* gives full, pooled, grid"):
        joint_space.check(config, dataclasses.replace(arm, features="cls"), VISION, TEXT)


@pytest.mark.exhaustive
def test_a_run_with_siglip_trains_all_stages_and_is_scored(folder, tmp_path):
    lengths = {"steps": 2, "batch": 8, "warmup_steps": 1}
    flags = [f"--config.stages.{stage}.{k}={v}" for stage in ("st", "lm", "ie") for k, v in lengths.items()]
    flags += ["--config.data.scenes=16", "--config.data.fit=stretch", "--config.data.eval_limit=2"]
    flags += ["--config.arms=('eim',)", "--config.decode.methods=('greedy',)", "--config.decode.java=False"]
    flags += [f"--config.towers.clip={folder}", "--config.towers.image_size=40", f"--workdir={tmp_path / 'run'}"]
    code, said = mains.run(["--config=configs/miniature.py", *flags], tmp_path / "said.txt")
    assert code == 0, said
    assert "texts cut to the 6 tokens that the text tower reads" in said
    assert "pictures become squares of 40 x 40 pixels: stretch" in said and "eim ie done, 2 steps" in said
    assert (tmp_path / "run" / "report.html").is_file()

"""The miniature world says the same on every machine, says only what is true, and hides what it claims to hide."""

import hashlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from eim_jax.data.miniature import captioning, language
from eim_jax.data.miniature.captioning import HELD_OUT, MiniatureSplit, attribute_f1, load
from eim_jax.data.miniature.drawing import BACKGROUNDS, CELL, COLOURS, SHAPES, Dice, Scene, Thing, draw, random_scene
from eim_jax.data.miniature.language import Group, captions, groups, parse, relation
from eim_jax.data.tokenize import encode_clip
from eim_jax.models.language.gpt2 import GPT2
from eim_jax.models.vision.clip import CLIPText, CLIPVision
from eim_jax.pretrained import load_clip, load_lm, resolve
from eim_jax.utils.images import normalise

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOWERS = ROOT / "eim_jax" / "data" / "miniature" / "towers"


@pytest.fixture(scope="module")
def train() -> MiniatureSplit:
    return load("train", scenes=300)


@pytest.fixture(scope="module")
def val() -> MiniatureSplit:
    return load("val", scenes=100)


def any_scene(index: int, seed: int = 7) -> Scene:
    return random_scene(Dice(seed, 0, index), tuple(BACKGROUNDS))


def test_world_is_the_same_on_every_machine():
    # Recorded once; whoever changes the world changes these, and must pretrain the towers anew.
    split = load("test", seed=3, scenes=20)
    texts = "\n".join(s.response for s in split.samples).encode()
    assert hashlib.sha256(split.pixels.tobytes()).hexdigest()[:16] == "03d7534a0aaac451"
    assert hashlib.sha256(texts).hexdigest()[:16] == "812d032252c6fec9"


def test_dice_follow_philox_by_its_definition():
    # Philox4x64-10 in Python integers (Salmon et al. 2011), which NumPy's raw stream must equal for ever.
    key, counter = [5, (2 << 40) + 9], [1, 0, 0, 0]
    mask = 2**64 - 1
    for _ in range(10):
        low = (0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2])
        counter = [
            (low[1] >> 64) ^ counter[1] ^ key[0],
            low[1] & mask,
            (low[0] >> 64) ^ counter[3] ^ key[1],
            low[0] & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    rolls = Dice(5, 2, 9)
    assert [rolls.below(1000) for _ in range(4)] == [word % 1000 for word in counter]


def test_smaller_split_is_the_start_of_a_larger_one_and_seeds_differ(val):
    few = load("val", scenes=10)
    assert few.samples == val.samples[:50]
    np.testing.assert_array_equal(few.pixels, val.pixels[:10])
    assert load("val", seed=1, scenes=10).pixels.tobytes() != few.pixels.tobytes()
    assert load("test", scenes=10).fingerprint() != few.fingerprint() == load("val", scenes=10).fingerprint()


def test_held_out_pairs_never_occur_in_train_and_in_every_second_scene_elsewhere(train, val):
    assert not any(scene.pairs & HELD_OUT for scene in train.scenes.values())
    assert not any(parse(sample.response).pairs & HELD_OUT for sample in train.samples)
    for split in (val, load("test", scenes=100)):
        shown = [bool(scene.pairs & HELD_OUT) for scene in split.scenes.values()]
        assert shown == [False, True] * 50
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS) and {shape for _, shape in HELD_OUT} == set(SHAPES)
    known = set().union(*(scene.pairs for scene in train.scenes.values()))
    assert len(known) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)  # all the others are taught


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_captions_are_true_different_sentences(index):
    scene = any_scene(index)
    texts = captions(scene, Dice(7, 1, index))
    assert len(set(texts)) == 5
    for text in texts:
        assert text.endswith(".") and text.count(".") == 1 and "  " not in text and text == text.strip().lower()
        assert parse(text).pairs and parse(text).pairs <= scene.pairs
        for word, count in (("two", 2), ("three", 3), ("four", 4)):
            for colour, shape in scene.pairs:
                plurals = [language.plural(noun) for noun in language.NOUNS[shape]]
                for plural in plurals:
                    if f"{word} {colour} {plural}" in text:
                        assert sum((t.colour, t.shape) == (colour, shape) for t in scene.things) == count


def test_relations_hold_for_every_member_of_a_group():
    a, b, c = Thing("star", "red", row=0, column=0), Thing("star", "red", row=0, column=1), Thing("ring", "blue", row=1)
    assert relation(Group((a,)), Group((b,))) == "left" and relation(Group((b,)), Group((a,))) == "right"
    assert relation(Group((a, b)), Group((c,))) == "above" and relation(Group((c,)), Group((a, b))) == "below"
    assert relation(Group((b,)), Group((c,))) is None  # diagonal
    assert groups(Scene((a, b, c))) == [Group((a, b)), Group((c,))]


@pytest.mark.parametrize("colour", COLOURS)
def test_thing_is_drawn_in_its_cell_in_its_colour(colour):
    scene = Scene((Thing("square", colour, "big", "solid", 1, 0),), "wall")
    picture = draw(scene, Dice(0, 0, 0)).astype(float)
    middle = picture[CELL + 5 : CELL + 11, 5:11].mean((0, 1))
    assert min(COLOURS, key=lambda name: np.abs(middle - COLOURS[name]).sum()) == colour
    for empty in (picture[:CELL, :CELL], picture[:CELL, CELL:], picture[CELL:, CELL:]):
        assert np.abs(empty.mean((0, 1)) - BACKGROUNDS["wall"]).max() < 20


@pytest.mark.parametrize("text, pairs", [
    ("a red circle above two big striped violet boxes.", {("red", "circle"), ("purple", "square")}),
    ("A Red Plus Sign with dots and a hoop", {("red", "cross")}),
    ("red red red", set()),
    ("", set()),
    ("a redcircle", set()),
])  # fmt: skip
def test_parse_reads_colour_and_shape_together(text, pairs):
    assert parse(text).pairs == pairs


def test_attribute_f1_by_hand():
    scenes = {
        "x": Scene((Thing("circle", "red"), Thing("star", "blue", column=1))),
        "y": Scene((Thing("ring", "green"),)),
    }
    said = {"x": "a blue circle and a blue star.", "y": "a green hoop."}
    scores = attribute_f1(said, scenes)
    assert scores["shape_colour_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["shape_colour_precision"] == scores["shape_colour_recall"] == pytest.approx(2 / 3)
    assert scores["shape_f1"] == 1.0
    assert scores["colour_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert "shape_colour_f1_held_out" not in scores
    with pytest.raises(ValueError, match="zebra"):
        attribute_f1({"zebra": "a red circle."}, scenes)


def test_true_captions_score_high_and_those_of_other_scenes_near_zero(val):
    ids = list(val.scenes)
    true = {name: texts[0] for name, texts in val.references.items()}
    other = dict(zip(ids, [true[name] for name in ids[1:] + ids[:1]], strict=True))
    assert attribute_f1(true, val.scenes)["shape_colour_f1"] > 0.95
    assert attribute_f1(other, val.scenes)["shape_colour_f1"] < 0.1


def test_split_fits_the_contract_of_records(train):
    assert len(train) == 1500 and len(train.images) == 300
    assert train.images[4].size == (32, 32) and train.images[4].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(train.images[4]), train.pixels[4])
    np.testing.assert_array_equal(train.groups, np.repeat(np.arange(300), 5))
    assert train.references[train.images.ids[2]] == [s.response for s in train.samples[10:15]]
    with pytest.raises(ValueError, match="no split 'dev'"):
        load("dev")
    with pytest.raises(ValueError, match="at least one scene"):
        load("val", scenes=0)


@pytest.mark.parametrize("tower", ["clip", "gpt2"])
def test_tokenizers_read_any_text_and_know_the_grammar(tower, val):
    tok = AutoTokenizer.from_pretrained(resolve(f"miniature/{tower}"))
    for text in ("Ünïcode 日本 🎈 <tag> 12%", "a dog on the moon?"):
        ids = tok(text, add_special_tokens=False)["input_ids"]
        assert tok.decode(ids).strip() == (text.lower() if tower == "clip" else text)
    for sample in val.samples:  # one token a word, comma or period
        words = sample.response.replace(".", " .").replace(",", " ,").split()
        ids = tok(sample.response, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(words)
        assert tok.decode(ids).strip() == sample.response
    assert tok.eos_token == "<|endoftext|>" and tok.eos_token_id == len(tok) - 1
    if tower == "gpt2":  # one period id, after which decoding may stop
        assert len(tok(".")["input_ids"]) == 1 and tok("a ring.")["input_ids"][2:] == tok(".")["input_ids"]


def test_shipped_towers_are_small_and_pass_their_recorded_gates():
    assert sum(path.stat().st_size for path in TOWERS.rglob("*") if path.is_file()) < 6e6
    record = json.loads((TOWERS / "pretrain.json").read_text())
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from pretrain_miniature import GATES
    finally:
        sys.path.pop(0)
    for tower, gates in GATES.items():
        for name, (lowest, highest) in gates.items():
            assert lowest <= record[tower]["measured"][name] <= highest


def test_shipped_clip_sees_objects_and_finds_captions(val):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import miniature_gates
    finally:
        sys.path.pop(0)
    clip = load_clip("miniature/clip")
    tok = AutoTokenizer.from_pretrained(resolve("miniature/clip"))
    look = jax.jit(
        lambda p: CLIPVision(clip.vision).apply(
            {"params": clip.params["visual"]}, normalise(p, clip.vision.mean, clip.vision.std)
        )
    )
    fitted = load("train", scenes=600)
    seen = [miniature_gates.in_batches(lambda p: look(p)[0], split.pixels, 100) for split in (fitted, val)]
    cells = [miniature_gates.cell_patches(s).astype(np.float64) for s in seen]
    assert miniature_gates.probe(fitted, cells[0], val, cells[1])["shape_colour_f1"] > 0.75
    tokens = encode_clip([texts[0] for texts in val.references.values()], tok, clip.text.context)
    texts = CLIPText(clip.text).apply({"params": clip.params["text"]}, jnp.asarray(tokens))
    assert miniature_gates.retrieval(np.asarray(look(jnp.asarray(val.pixels))[1]), np.asarray(texts)) > 0.5


def test_shipped_gpt2_prefers_the_grammar_to_shuffled_words(val):
    lm = load_lm("miniature/gpt2")
    tok = AutoTokenizer.from_pretrained(resolve("miniature/gpt2"))
    rng = np.random.default_rng(0)

    def nll(ids: list[int]) -> float:
        row = jnp.array([[tok.eos_token_id, *ids]], jnp.int32)
        scores = jax.nn.log_softmax(GPT2(lm.config).apply({"params": lm.params}, row))[0]
        return -float(np.asarray(scores)[np.arange(len(ids)), ids].mean())

    true, shuffled = [], []
    for sample in val.samples[:100:10]:
        ids = tok(sample.response, add_special_tokens=False)["input_ids"]
        true.append(nll(ids))
        shuffled.append(nll(list(rng.permutation(ids))))
    assert np.mean(true) < 2.0 and np.mean(shuffled) > 3.0


def test_loading_is_a_pure_function_of_its_arguments():
    assert load("train", scenes=3).samples == load("train", scenes=3).samples
    assert captioning.SCENES == {"train": 1200, "val": 200, "test": 400}

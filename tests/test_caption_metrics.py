"""Caption scores against the reference scorers, the reference tokeniser and closed forms."""

import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest

from eim_jax.evaluation.metrics import caption_scores, java_scorers, ptb

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java, the reference tokeniser, is not installed")

HARD = [
    "A dog's ball isn't here; it's AT&T's (old) 4-door T.V. truck.",
    "Cyclists ride by St. Louis at 10:22pm, near 1 1/2 miles... of mother-in-law's road!!",
    "Don't pay $1.75/kg -- 'stop' \"go\" and/or C++ at infowars.com",
    "The 1990's rock 'n' roll o'clock d'oeuvres cannot be Dunkin' & 50% off #1 :-)",
    "He holds the letter S.",
    "A sign with the letter S.",
    "another one .. with, dots., and ;stray:punctuation",
    "",
    "naïve café 日本 ½ cup “quoted” — dash don’t [x] {y}",
]


def official_tokens(captions):
    """The installed package's own wrapper around the jar."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    return [found[i][0] for i in range(len(captions))]


@pytest.fixture
def coco(shared_data):
    path = shared_data("coco_text") / "captions_val2017.json"
    references = caption_scores.load_references([path])
    said = {key: captions[0] for key, captions in references.items()}
    return said, {key: captions[1:] for key, captions in references.items()}


@needs_java
def test_python_tokens_equal_the_reference_on_hard_captions():
    assert ptb.ptb_captions(HARD) == official_tokens(HARD)


@needs_java
def test_python_tokens_equal_the_reference_on_all_real_captions(shared_data):
    content = json.loads((shared_data("coco_text") / "captions_val2017.json").read_text())
    captions = [" ".join(a["caption"].split()) for a in content["annotations"]]
    assert len(captions) == 25_014
    assert ptb.ptb_captions(captions) == official_tokens(captions)


@needs_java
def test_our_call_of_the_jar_equals_the_packages_wrapper():
    captions = [c for c in HARD if c]
    assert java_scorers.tokenise_java(captions, shutil.which("java")) == official_tokens(captions)


@needs_java
def test_scores_without_java_equal_the_reference_scorers_on_reference_tokens(coco):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, references = coco
    keys = list(said)[:300]
    flat = official_tokens([c for k in keys for c in (said[k], *references[k])])
    tokens, truth, found = iter(flat), {}, {}
    for key in keys:
        found[key] = [next(tokens)]
        truth[key] = [next(tokens) for _ in references[key]]
    expected = dict(zip(caption_scores.METRICS[:4], Bleu(4).compute_score(truth, found, verbose=0)[0], strict=True))
    expected |= {"ROUGE_L": Rouge().compute_score(truth, found)[0], "CIDEr": Cider().compute_score(truth, found)[0]}
    scores = caption_scores.score({k: said[k] for k in keys}, references, java=False)
    for name, value in expected.items():
        assert abs(scores[name] - value) < 1e-9, name
    assert scores["METEOR"] is None and scores["SPICE"] is None
    assert "Java" in scores["notes"]["METEOR"]


@needs_java
@pytest.mark.slow
def test_meteor_equals_the_packages_wrapper(coco):
    from pycocoevalcap.meteor.meteor import Meteor

    said, references = coco
    keys = list(said)[:5]
    truth = {k: ptb.ptb_captions(references[k]) for k in keys}
    found = {k: ptb.ptb_captions([said[k]]) for k in keys}
    found[keys[-1]] = [""]
    expected = Meteor().compute_score(truth, found)[0]
    assert java_scorers.meteor(truth, found, shutil.which("java")) == expected


def test_perfect_captions_score_one():
    said = {1: "a red cube left of a blue ball", 2: "two green cones stand in the corner"}
    scores = caption_scores.score(said, {k: [v] for k, v in said.items()}, java=False)
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"):
        assert scores[name] == pytest.approx(1, abs=1e-8)
    assert scores["CIDEr"] == pytest.approx(10, abs=1e-8)


def test_scores_equal_hand_computed_values():
    # "a cat sat" for "a cat sat down" : p_1 = p_2 = 1, brevity exp(1 - 4/3); LCS 3: P = 1, R = 3/4.
    # "dogs" for "birds sing": nothing in common. Corpus p_1 = 3/4, p_2 = 2/2, lengths 4 and 6.
    scores = caption_scores.score({7: "A cat sat.", 8: "dogs"}, {7: ["a cat sat down"], 8: ["Birds sing!"]}, java=False)
    brevity = math.exp(1 - 6 / 4)
    assert scores["Bleu_1"] == pytest.approx(brevity * 3 / 4, abs=1e-8)
    assert scores["Bleu_2"] == pytest.approx(brevity * math.sqrt(3 / 4), abs=1e-8)
    assert scores["ROUGE_L"] == pytest.approx((2.44 * 0.75 / (0.75 + 1.44)) / 2, abs=1e-12)
    # CIDEr: every n-gram has idf log 2, so tf-idf is a plain cosine: sqrt(n-grams said / n-grams in the reference) for
    # n = 1, 2, 3 (4-grams: none said); the lengths that its penalty compares are bigram counts, 2 and 3.
    cosines = math.sqrt(3 / 4) + math.sqrt(2 / 3) + math.sqrt(1 / 2)
    assert scores["CIDEr"] == pytest.approx(10 * math.exp(-1 / 72) * cosines / 4 / 2, abs=1e-9)


def test_white_space_inside_a_caption_never_shifts_the_others():
    odd = "a\rdog\x0bruns\x0cfast\u2028on\u2029grass\x85\nnow"
    tokens = ptb.ptb_captions([odd, "a cat"])
    assert tokens == ["a dog runs fast on grass now", "a cat"]
    if shutil.which("java"):
        assert java_scorers.tokenise_java([odd, "a cat"], shutil.which("java")) == tokens


def test_one_image_notes_that_its_cider_is_zero():
    scores = caption_scores.score({1: "a dog"}, {1: ["a dog"]}, java=False)
    assert scores["CIDEr"] == 0 and "single image" in scores["notes"]["CIDEr"]


def test_images_without_results_are_left_out_and_counted():
    references = {1: ["a red dog"], 2: ["a blue cat"], 3: ["one more"]}
    scores = caption_scores.score({2: "a blue cat", 1: "a red dog"}, references, java=False)
    two = caption_scores.score({1: "a red dog", 2: "a blue cat"}, {1: ["a red dog"], 2: ["a blue cat"]}, java=False)
    assert all(scores[name] == two[name] for name in caption_scores.METRICS)
    assert scores["notes"]["images"].startswith("2 results, of 3 images")


def test_empty_captions_are_scored_and_counted():
    scores = caption_scores.score({1: "", 2: "..."}, {1: ["a dog"], 2: ["a cat"]}, java=False)
    assert scores["Bleu_1"] == pytest.approx(0, abs=1e-9) and scores["ROUGE_L"] == 0 and scores["CIDEr"] == 0
    assert scores["notes"]["empty"].startswith("2 results without a word")


@pytest.mark.parametrize(
    ("results", "references", "message"),
    [
        ({}, {1: ["a"]}, "no results"),
        ({"1": "a"}, {1: ["a"]}, "no reference captions"),
        ({1: "a"}, {1: []}, "no reference caption"),
        ({1: None}, {1: ["a"]}, "not a string"),
    ],
)
def test_bad_input_is_named(results, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores.score(results, references, java=False)


def test_two_captions_for_one_image_are_an_error(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]))
    with pytest.raises(ValueError, match="more than one caption"):
        caption_scores.load_results(path)


def test_broken_java_leaves_meteor_null_with_its_reason(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    scores = caption_scores.score({1: "a dog"}, {1: ["a dog"]})
    assert scores["Bleu_1"] == pytest.approx(1, abs=1e-8) and scores["METEOR"] is None
    assert "does not work" in scores["notes"]["METEOR"]


def test_command_line_prints_exactly_one_json_object(tmp_path):
    results, annotations = tmp_path / "results.json", tmp_path / "captions.json"
    results.write_text(json.dumps([{"image_id": 5, "caption": "a dog"}, {"image_id": 6, "caption": "a cat"}]))
    content = {"images": [{"id": 5}, {"id": 6}], "annotations": []}
    content["annotations"] = [{"image_id": i, "id": i, "caption": c} for i, c in ((5, "a dog"), (6, "the cat"))]
    annotations.write_text(json.dumps(content))
    command = [
        sys.executable,
        "-m",
        "eim_jax.evaluation.metrics.caption_scores",
        "--no-java",
        "--results",
        str(results),
    ]
    command += ["--annotations", str(annotations)]
    root = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=True)
    assert list(json.loads(done.stdout)) == [*caption_scores.METRICS, "notes"]


def test_results_that_do_not_fit_their_references_are_named_by_file(tmp_path, capsys):
    results, references = tmp_path / "results.json", tmp_path / "captions.json"
    results.write_text(json.dumps([{"image_id": 9, "caption": "a dog"}]))
    references.write_text(json.dumps({"annotations": [{"image_id": 3, "caption": "a dog"}]}))
    with pytest.raises(SystemExit):
        caption_scores.main(["--no-java", "--results", str(results), "--annotations", str(references)])
    assert f"error: {results}: 1 results for images that have no reference" in capsys.readouterr().err

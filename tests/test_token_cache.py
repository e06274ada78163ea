"""Tokens that are kept: the same ones, read instead of made, and made anew where what decides them differs."""

import hashlib
import json

import numpy as np
import pytest

from eim_jax.data import token_cache, tokenize
from eim_jax.data.samples import DrawnImages, Sample, Split

WORDS = ["a", "red", "ball", "lies", "on", "the", "blue", "box", "and", "is", "small"]


def split(count=60, seed=0, instruction=""):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(count)]
    samples = tuple(Sample(f"s{i}", None if i % 7 == 0 else 0, instruction, text) for i, text in enumerate(texts))
    return Split("train", samples, DrawnImages(["p"], lambda row: 1 / 0, ["p"]))


def cached_split(place, texts, words, *settings, **options):
    name = tokenize.fingerprint(words, options.get("seam", ""))
    return token_cache.cached_split(place, texts, words, name, *settings, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenize.load_tokenizer("miniature/gpt2")


@pytest.fixture
def made(monkeypatch):
    """How often texts were tokenised."""
    calls, real = [], tokenize.encode_split
    monkeypatch.setattr(token_cache, "_LEAST", 50)
    monkeypatch.setattr(tokenize, "encode_split", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


def test_a_second_start_reads_the_tokens_and_says_the_same(tmp_path, tokenizer, made, capsys, monkeypatch):
    monkeypatch.setattr(tokenize, "_CHUNK", 17)  # several parts
    options = {"seam": "spaced", "cut": "end", "text_only": 9}
    for few in (True, False):
        texts = split(40 if few else 60, instruction="say it :")
        whole = tokenize.encode_split(texts, tokenizer, 6, True, **options)
        capsys.readouterr()
        said = []
        for _ in range(2):
            same(cached_split(tmp_path, texts, tokenizer, 6, True, **options), whole)
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] and "cut to 6 tokens" in said[0] and "they teach nothing" in said[0]
        assert len(made) == (3 if few else 5)  # few texts are not kept
        assert (tmp_path / "tokens").exists() != few


def test_other_texts_tokenizer_or_settings_are_tokenised_again(tmp_path, tokenizer, made):
    wanted = [
        (split(), tokenizer, 9, True, {}),
        (split(seed=1), tokenizer, 9, True, {}),
        (split(), tokenize.load_tokenizer("miniature/llama"), 9, True, {}),
        (split(), tokenizer, 8, True, {}),
        (split(), tokenizer, 9, False, {}),
        (split(), tokenizer, 9, True, {"seam": "spaced"}),
        (split(), tokenizer, 9, True, {"cut": "end"}),
    ]
    for number, (texts, words, most, eos, options) in enumerate(wanted, 1):
        cached_split(tmp_path, texts, words, most, eos, **options)
        assert len(made) == number
    same(cached_split(tmp_path, split(), tokenizer, 9, True), tokenize.encode_split(split(), tokenizer, 9, True))
    assert len(made) == len(wanted) + 1


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_tokens_are_made_again_with_a_word(tmp_path, tokenizer, made, capsys, damage):
    whole = cached_split(tmp_path, split(), tokenizer, 9, True)
    [file] = (tmp_path / "tokens").glob("*/ids.npy")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    capsys.readouterr()
    same(cached_split(tmp_path, split(), tokenizer, 9, True), whole)
    assert len(made) == 2 and "is damaged: tokenising again" in capsys.readouterr().out.replace("\n", " ")
    assert file.read_bytes() == content


def test_a_folder_that_may_not_be_written_is_no_reason_to_stop(tmp_path, tokenizer, made, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_cache, "new_folder", refuse)
    same(cached_split(tmp_path, split(), tokenizer, 9, True), tokenize.encode_split(split(), tokenizer, 9, True))
    assert "the tokens are not kept" in capsys.readouterr().out


def test_a_fingerprint_is_the_sum_of_lines_of_json():
    """As earlier versions wrote it into queues and run.json; ids and texts hold quotes, accents and emoji."""
    texts = ['a "b"\\', "é \n\t\x7f", "\U0001f600", ""]
    samples = tuple(Sample(f"s{i}", i % 2 or None, text, text[::-1], text * (i % 3)) for i, text in enumerate(texts))
    own = Split("train", samples, DrawnImages(["p", "q"], lambda row: 1 / 0, ["1", "2"]))

    def digest(lines):
        return hashlib.sha256("".join(json.dumps(line) + "\n" for line in lines).encode()).hexdigest()

    rows = [
        [
            s.id,
            None if s.image is None else "pq"[s.image],
            s.instruction,
            s.response,
            *([s.caption] if s.caption else []),
        ]
        for s in samples
    ]
    images = digest([["p", "1"], ["q", "2"]])
    assert own.images.fingerprint() == images
    assert own.fingerprint() == digest([digest(rows), images])

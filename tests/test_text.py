"""Claims about tokens and masks; oracles: published ids, a plain BPE written here, transformers' own padding."""

import gzip
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer, GPT2Tokenizer

from eim_jax.data import rows
from eim_jax.data.samples import DrawnImages, Sample, Split
from eim_jax.data.tokenize import check_vocabulary, encode_clip, encode_split, fingerprint, load_tokenizer

LETTERS = [*"abcdefgh.!", "Ġ"]  # Ġ is byte-level BPE's space
MERGES = ["a b", "Ġ a", "Ġ ab", "c d", "cd e"]
EOS = "<|endoftext|>"


def tiny_gpt2():
    pieces = [*LETTERS, *(merge.replace(" ", "") for merge in MERGES), EOS]
    return GPT2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[tuple(m.split()) for m in MERGES])


def tiny_clip():
    letters = [*"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    merges = [("a", "b</w>"), ("c", "d"), ("cd", "e</w>")]
    pieces = [*letters, *("".join(m) for m in merges), "<|startoftext|>", EOS]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def split_of(*pairs):
    samples = tuple(Sample(f"id{row}", 0, *pair) for row, pair in enumerate(pairs))
    return Split("train", samples, DrawnImages(["i"], lambda row: Image.new("RGB", (1, 1)), ["i"]))


def ids(pieces):
    vocabulary = tiny_gpt2().get_vocab()
    return [vocabulary[piece] for piece in pieces.split()]


def real(array, valid):
    return [row[mask].tolist() for row, mask in zip(array, valid, strict=True)]


def test_rows_are_instruction_then_response_then_eos_by_hand():
    found = encode_split(split_of(("", "ab"), ("ab ab", "cde!"), ("h", " a b")), tiny_gpt2(), 10, eos=True)
    assert real(found.tokens, found.valid) == [
        ids(f"ab {EOS}"),
        ids(f"ab Ġab cde ! {EOS}"),
        ids(f"h Ġa Ġ b {EOS}"),
    ]
    assert real(found.tokens, found.supervised) == [ids(f"ab {EOS}"), ids(f"cde ! {EOS}"), ids(f"Ġa Ġ b {EOS}")]
    assert found.tokens.shape == (3, 5) and found.tokens.dtype == np.int32 and found.truncated == 0
    assert not found.tokens[~found.valid].any()


def test_without_eos_the_response_alone_is_supervised_and_the_end_is_still_read():
    found = encode_split(split_of(("h", "ab!"), ("h", "ab")), tiny_gpt2(), 10, eos=False)
    assert real(found.tokens, found.valid) == [ids(f"h ab ! {EOS}"), ids(f"h ab {EOS}")]
    assert real(found.tokens, found.supervised) == [ids("ab !"), ids("ab")]


def test_segments_tokenised_apart_are_never_merged_across_their_border():
    """ "a" + "b" tokenised together is one token, "ab"; apart, as runs of earlier versions, they are two."""
    found = encode_split(split_of(("a", "b")), tiny_gpt2(), 10, eos=False, seam="apart")
    assert found.tokens.tolist() == [ids(f"a b {EOS}")] and found.supervised.tolist() == [[False, True, False]]


texts = st.text(alphabet="abcdefgh.! ", max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts.filter(len)), min_size=1, max_size=5), st.integers(2, 14), st.booleans())
def test_masks_hold_for_any_texts_and_lengths_tokenised_apart(pairs, max_tokens, eos):
    tokenizer = tiny_gpt2()
    found = encode_split(split_of(*pairs), tokenizer, max_tokens, eos, seam="apart")
    assert found.tokens.shape[1] <= max_tokens
    lengths = found.valid.sum(1)
    for row, (instruction, response) in enumerate(pairs):
        before = tokenizer(instruction)["input_ids"]
        least = max(max_tokens - len(before), max_tokens // 4, 2)
        after = [*tokenizer(response)["input_ids"][: least - 1], tokenizer.eos_token_id]
        room = max_tokens - len(after)
        before = before[len(before) - room :] if len(before) > room else before
        assert found.tokens[row, : lengths[row]].tolist() == before + after
        assert found.tokens[row, found.supervised[row]].tolist() == (after if eos else after[:-1])
        assert found.valid[row].tolist() == sorted(found.valid[row].tolist(), reverse=True)


def test_too_long_a_sample_loses_its_responses_end_first_then_its_instructions_beginning():
    long = split_of(("a b", "d e f"), ("h", "abcde"), ("", "hhhhhhhhh"), ("a b c d e f g h", "g h a b"))
    found = encode_split(long, tiny_gpt2(), 8, eos=True)
    rows = real(found.tokens, found.valid)
    instruction, response = (tiny_gpt2()(words)["input_ids"] for words in ("a b", "d e f"))
    assert rows[0] == instruction + response[: 7 - len(instruction)] + ids(EOS)
    assert rows[2] == ids("h h h h h h h " + EOS)
    instruction, response = (tiny_gpt2()(words)["input_ids"] for words in ("a b c d e f g h", "g h a b"))
    assert len(instruction) > 8 and rows[3] == instruction[-6:] + response[:1] + ids(EOS)  # a quarter is the response's
    assert found.truncated == 3
    assert encode_split(long, tiny_gpt2(), 40, eos=True).truncated == 0


def test_a_tokenizer_with_more_ids_than_the_weights_have_is_refused():
    with pytest.raises(ValueError, match=r"towers/lm: its tokenizer gives ids up to \d+, but its weights have 5"):
        check_vocabulary(tiny_gpt2(), 5, "towers/lm")


def test_changing_the_instruction_never_changes_what_is_supervised():
    one = encode_split(split_of(("a b", "cde h")), tiny_gpt2(), 20, eos=True)
    other = encode_split(split_of(("g!! ab", "cde h")), tiny_gpt2(), 20, eos=True)
    assert real(one.tokens, one.supervised) == real(other.tokens, other.supervised)


def test_responses_without_a_token_are_listed_by_id():
    with pytest.raises(ValueError, match=r"2 samples have a response without tokens.*ids id1, id3"):
        encode_split(split_of(("a", "b"), ("a", ""), ("", "c"), ("", "")), tiny_gpt2(), 9, eos=True)


def test_an_end_token_written_in_a_caption_is_plain_text():
    tokenizer = tiny_gpt2()
    found = encode_split(split_of(("", f"a{EOS}b")), tokenizer, 30, eos=True)
    assert (found.tokens[found.valid] == tokenizer.eos_token_id).sum() == 1


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="max_tokens is 1"):
        encode_split(split_of(("", "a")), tiny_gpt2(), 1, eos=True)
    tokenizer = tiny_gpt2()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        encode_split(split_of(("", "a")), tokenizer, 5, eos=True)


def test_many_texts_go_through_in_chunks_unchanged(monkeypatch):
    pairs = [("", "ab" * (i % 7 + 1)) for i in range(50)]
    whole = encode_split(split_of(*pairs), tiny_gpt2(), 9, eos=True)
    monkeypatch.setattr(rows, "_LONG", 10)
    monkeypatch.setattr(rows, "_CHUNK", 7)
    chunked = encode_split(split_of(*pairs), tiny_gpt2(), 9, eos=True)
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_array_equal(one, other)


def test_clip_rows_have_bos_and_eos_and_keep_eos_when_cut():
    tokenizer = tiny_clip()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = encode_clip(["ab", "AB  cde", "", "a b c d e f g h"], tokenizer, 6)
    vocabulary = tokenizer.get_vocab()
    expected = [["ab</w>"], ["ab</w>", "cde</w>"], [], [f"{letter}</w>" for letter in "abcd"]]
    for row, pieces in zip(found, expected, strict=True):
        inside = [vocabulary[piece] for piece in pieces]
        assert row.tolist() == [bos, *inside, eos] + [tokenizer.pad_token_id] * (4 - len(inside))
    assert encode_clip(["ab"], tokenizer, 77).shape == (1, 3)


def test_clip_rows_equal_transformers_padding_and_truncation():
    tokenizer = tiny_clip()
    lines = ["ab cde", "h", "a b c d e f g h a b", "cdecde"]
    expected = tokenizer(lines, padding="longest", truncation=True, max_length=7, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(encode_clip(lines, tokenizer, 7), expected)


def test_clip_encoding_refuses_other_tokenizers():
    tokenizer = tiny_gpt2()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="BOS and an EOS"):
        encode_clip(["a"], tokenizer, 7)
    with pytest.raises(ValueError, match="context is 1"):
        encode_clip(["a"], tiny_clip(), 1)


def test_fingerprint_follows_the_ids_and_not_the_use():
    used = tiny_gpt2()
    used(["ab", "a"], padding=False, truncation=True, max_length=1)
    assert fingerprint(used) == fingerprint(tiny_gpt2())
    pieces = list(tiny_gpt2().get_vocab())
    merges = [tuple(m.split()) for m in MERGES]
    fewer = GPT2Tokenizer(vocab=tiny_gpt2().get_vocab(), merges=merges[:-1])
    moved = GPT2Tokenizer(vocab={piece: i for i, piece in enumerate(reversed(pieces))}, merges=merges)
    assert len({fingerprint(t) for t in (tiny_gpt2(), fewer, moved, tiny_clip())}) == 4


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    loaded = load_tokenizer(str(tmp_path / "gpt2"))
    assert loaded("ab cde")["input_ids"] == tiny_gpt2()("ab cde")["input_ids"]
    assert fingerprint(loaded) == fingerprint(tiny_gpt2())
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer in .*bare"):
        load_tokenizer(str(tmp_path / "bare"))


# The real vocabularies, against a plain BPE: merge the pair of lowest rank until none is left.


def bytes_as_letters():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def plain_bpe(word, ranks):
    parts = list(word)
    while len(parts) > 1:
        rank, place = min((ranks.get((a, b), 1e9), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == 1e9:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def captions(shared_data):
    records = json.loads((shared_data("coco_text") / "captions_val2017.json").read_text())["annotations"]
    return [record["caption"] for record in records[:1500]]


@pytest.fixture(scope="module")
def letters():
    return bytes_as_letters()


def gpt2(folder):
    vocabulary = json.loads((folder / "gpt2" / "encoder.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "gpt2" / "vocab.bpe").read_text().splitlines()[1:] if line]
    return GPT2Tokenizer(vocab=vocabulary, merges=merges), vocabulary, {m: i for i, m in enumerate(merges)}


def test_gpt2_ids_are_the_published_ones_and_those_of_a_plain_bpe(shared_data, letters):
    tokenizer, vocabulary, ranks = gpt2(shared_data("tokenizers"))
    published = encode_split(split_of(("", "Hello world")), tokenizer, 40, eos=True)
    assert published.tokens.tolist() == [[15496, 995, 50256]]
    lines = captions(shared_data)
    found = encode_split(split_of(*(("", line) for line in lines)), tokenizer, 10_000, eos=False)
    word = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    for row, line in enumerate(lines):
        pieces = [
            piece
            for match in word.findall(line)
            for piece in plain_bpe("".join(letters[b] for b in match.encode()), ranks)
        ]
        assert found.tokens[row, found.valid[row]].tolist() == [vocabulary[piece] for piece in [*pieces, EOS]], line


def test_clip_ids_are_the_published_ones_and_those_of_a_plain_bpe(shared_data, letters):
    folder = shared_data("tokenizers")
    with gzip.open(folder / "clip" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    order = list(letters.values())
    pieces = order + [f"{letter}</w>" for letter in order] + ["".join(m) for m in merges] + ["<|startoftext|>", EOS]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    ranks = {merge: i for i, merge in enumerate(merges)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    found = encode_clip(["a photo of a cat"], tokenizer)
    assert found.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]

    lines = captions(shared_data)
    found = encode_clip(lines, tokenizer, 20)
    word = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
    for row, line in zip(found, lines, strict=True):
        inside = []
        for match in word.findall(re.sub(r"\s+", " ", line).strip().lower()):
            spelled = [letters[b] for b in match.encode()]
            spelled[-1] += "</w>"
            inside += [vocabulary[piece] for piece in plain_bpe(spelled, ranks)]
        expected = [49406, *inside[:18], 49407]
        assert row[: len(expected)].tolist() == expected and (row[len(expected) :] == 49407).all(), line


def test_a_sentencepiece_model_alone_gives_sentencepieces_own_ids(shared_data, tmp_path):
    pieces = shared_data("tokenizers") / "tok512/tok512.model"
    shutil.copy(pieces, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for words in ("Once upon a time", "Image: N/A", "The answer is B."):
        assert tokenizer(words, add_special_tokens=False)["input_ids"] == expected.encode(words)

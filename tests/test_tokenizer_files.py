"""Claims: a folder's tokenizer is the one in its tokenizer.json; oracle: the tokenizers library on the same file."""

import gzip
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPTokenizer, GPT2Tokenizer, LlamaTokenizer

from eim_jax.data.tokenize import encode_prompts
from eim_jax.pretrained import WeightsError, resolve
from eim_jax.pretrained.tokenizer import eos_id, load_tokenizer

EOS = "<|endoftext|>"
WORDS = ["cat", "CAT", "12 345", "0.5", "don't", "I'M", " ", "\n", "naïve", "e\u0301", "猫", "🐱", "_a_"]
WORDS += ["<extra>", "<x> ", EOS]
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=12).map("".join)
texts = texts.filter(lambda text: all(not 0xD800 <= ord(letter) < 0xE000 for letter in text))


def byte_letters():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def small_bpe(**options):
    pieces = [*byte_letters(), EOS, "ca", "cat", "12", "Ġc", "Ġca"]
    merges = [("c", "a"), ("ca", "t"), ("1", "2"), ("Ġ", "ca")]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    return Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, **options))


def digits():
    """SmolLM's splitter, which GPT2Tokenizer does not have; one added token that is no special one."""
    tokenizer = small_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([EOS])
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False), AddedToken("<x>", rstrip=True)])
    return tokenizer


def cased():
    """A CLIP-like file that keeps capitals and splits at spaces alone, which CLIPTokenizer does not."""
    tokenizer = small_bpe(unk_token=EOS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens(["<|startoftext|>", EOS])
    return tokenizer


def prefixed():
    """A LLaMA-like file without the space that LlamaTokenizer puts first; it cuts and pads, which is not ours to do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("cat", -1.0), ("c", -3.0), ("a", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


FOLDERS = {
    "GPT2Tokenizer": (digits, "gpt2", {}),
    "CLIPTokenizer": (cased, "clip", {}),
    "LlamaTokenizer": (prefixed, "llama", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "PreTrainedTokenizerFast": (digits, "llama", {"eos_token": EOS, "add_prefix_space": True}),
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory):
    """A folder whose tokenizer.json is none that the class which it names would build."""
    place = tmp_path_factory.mktemp(request.param)
    make, model, special = FOLDERS[request.param]
    make().save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": request.param, **special}))
    (place / "config.json").write_text(json.dumps({"model_type": model}))
    return place


def assert_ids_of_the_file(place):
    own, found = Tokenizer.from_file(str(place / "tokenizer.json")), load_tokenizer(place)
    own.encode_special_tokens = True  # special tokens written in a text are text, in every text that we encode

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def same(text):
        rows, valid = encode_prompts([text], found, 10_000)
        assert rows[valid].tolist() == own.encode(text, add_special_tokens=False).ids

    same()
    return found


def test_ids_are_those_of_tokenizer_json_whatever_class_the_folder_names(folder):
    found = assert_ids_of_the_file(folder)
    assert found.eos_token_id == found.get_vocab()[found.eos_token] == eos_id(folder)
    assert len(found.get_vocab()) == len(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def test_truncation_and_padding_that_a_file_carries_are_not_applied(tmp_path):
    tokenizer = digits()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert len(load_tokenizer(tmp_path)("cat 1 2 3", add_special_tokens=False)["input_ids"]) == 7


@pytest.mark.parametrize("name", ["clip", "gpt2", "llama"])
def test_the_miniatures_own_ids_are_their_files(name):
    assert_ids_of_the_file(resolve(f"miniature/{name}"))


def test_published_vocabularies_saved_by_transformers_keep_their_ids(shared_data, tmp_path):
    source = shared_data("tokenizers")
    vocabulary = json.loads((source / "gpt2" / "encoder.json").read_text())
    merges = [tuple(line.split()) for line in (source / "gpt2" / "vocab.bpe").read_text().splitlines()[1:] if line]
    gpt2 = GPT2Tokenizer(vocab=vocabulary, merges=merges)
    letters = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    with gzip.open(source / "clip" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    pieces = [*letters, *(f"{x}</w>" for x in letters), *("".join(m) for m in merges), "<|startoftext|>", EOS]
    clip = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    shutil.copy(source / "tok512" / "tok512.model", tmp_path / "tokenizer.model")
    for name, tokenizer in (("gpt2", gpt2), ("clip", clip), ("llama", LlamaTokenizer.from_pretrained(tmp_path))):
        tokenizer.save_pretrained(tmp_path / name)
        found = assert_ids_of_the_file(tmp_path / name)
        assert found.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, r"tokenizer_config\.json: eos_token is 5"),
        ("tokenizer_config.json", {"eos_token": "\ud83d"}, r"tokenizer_config\.json: eos_token is '\\ud83d'"),
        ("tokenizer_config.json", {"pad_token": {"content": 5}}, r"tokenizer_config\.json: pad_token is"),
        ("tokenizer_config.json", {"tokenizer_class": ["A"]}, r"tokenizer_config\.json: tokenizer_class is \['A'\]"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}, r"added_tokens_decoder\.a"),
        ("special_tokens_map.json", {"bos_token": []}, r"special_tokens_map\.json: bos_token is \[\]"),
        ("tokenizer.json", {"model": None}, r"tokenizer\.json: model is None, not an object"),
        ("tokenizer.json", {"added_tokens": {}}, r"tokenizer\.json: added_tokens is \{\}, not a list"),
        ("tokenizer.json", {"pre_tokenizer": "ByteLevel"}, r"tokenizer\.json: pre_tokenizer is 'ByteLevel'"),
        (
            "tokenizer.json",
            {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
            r"/tokenizer\.json: 'a' is 'b', not",
        ),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}}, r"/tokenizer\.json is none"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1, "c": 0}}}, r"json: 'a' and 'c' have one id, 0"),
        (
            "tokenizer_config.json",
            {"model_max_length": "a"},
            r"max_length is 'a', not a whole number or a number",
        ),
        ("tokenizer_config.json", {"padding_side": 3}, r"tokenizer_config\.json: padding_side is 3, not a text"),
        ("vocab.json", {"a": "b"}, r"vocab\.json: 'a' is 'b', not an id"),
    ],
)
def test_wrong_types_are_named_by_file_and_field(tmp_path, file, change, match):
    digits().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    path = tmp_path / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=match):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, file):
    digits().save(str(tmp_path / "tokenizer.json"))
    for content in (b"{", b"[]", b"\xff\xfe{}"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(WeightsError, match=file.replace(".", r"\.")):
            load_tokenizer(tmp_path)


def test_what_transformers_says_stands_behind_the_names_of_its_files(tmp_path):
    digits().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"post_processor": {"type": "TemplateProcessing"}}))
    with pytest.raises(ValueError, match=r"transformers says of tokenizer_config\.json, tokenizer\.json: "):
        load_tokenizer(tmp_path)

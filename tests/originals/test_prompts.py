"""Strings, ids and labels as LaVIN, LLaMA-Adapter and ClipCap make them: equality with what their own code gave."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from eim_jax.config import Data
from eim_jax.data import rows
from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.datasets.instruct_prompt import Question, prompt
from eim_jax.data.datasets.scienceqa import qa_split
from eim_jax.data.datasets.scienceqa_prompt import Problem
from eim_jax.data.samples import DrawnImages, NoImages, Sample, Split
from eim_jax.data.tokenize import encode_prompts, encode_split, load_tokenizer
from eim_jax.models.adapters.lavin import Router

BOS = 1
TRUNCATED = [("QCM-ALE", 512), ("QCM-LEA", 512), ("QCM-A", 512), ("QCM-ALE", 128), ("QCM-ALE", 64)]


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts(shared_original):
    return shared_original("prompts")


@pytest.fixture(scope="module")
def problems(prompts):
    return [
        Problem(**{**item, "choices": tuple(item["choices"]), "image": None})
        for item in lines(prompts / "scienceqa_items.jsonl")
    ]


@pytest.fixture(scope="module", params=["own", "tok512"])
def tokenized(request, prompts, shared_original, shared_data, tmp_path_factory):
    """A tokenizer, and the ids and labels that LaVIN's tokenize() gave with it."""
    folder = shared_original("tokenizers") / "llama"
    if request.param == "tok512":
        folder = tmp_path_factory.mktemp("tok512")
        model = shared_data("tokenizers") / "tok512" / "tok512.model"
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
    with np.load(prompts / f"tokens_{request.param}.npz") as held:
        return request.param, load_tokenizer(folder), {name: held[name] for name in held.files}


def questions(problems, form="QCM-ALE", use_caption=False):
    split = qa_split("x", problems, NoImages([], [], ""), form, use_caption=use_caption, wording="official")
    return [(sample.instruction, sample.response) for sample in split.samples]


def texts_alone(pairs):
    samples = tuple(Sample(str(number), None, *pair) for number, pair in enumerate(pairs))
    return Split("x", samples, NoImages([], [], ""))


def padded(held, width, first=()):
    """Rows as theirs: what stands before, then ours, then 0."""
    out = np.zeros((len(held), width), np.int64)
    for row, ids in zip(out, held, strict=True):
        row[: len(first) + len(ids)] = [*first, *ids]
    return out


def like_theirs(encoded, width):
    """Examples and labels in their form: BOS in front, the end padded with 0, labels of what is not supervised 0."""
    rows_of = [ids[valid] for ids, valid in zip(encoded.tokens, encoded.valid, strict=True)]
    examples = padded(rows_of, width, [BOS])
    labels = np.zeros_like(examples)
    labels[:, 1 : 1 + encoded.tokens.shape[1]] = np.where(encoded.supervised, encoded.tokens, 0)
    return examples, labels


def same_spaces(which, pairs):
    """Rows that both tokenizers read alike: tok512's model drops white space that transformers and we keep."""
    return [which == "own" or not re.search("  | $", "".join(pair)) for pair in pairs]


def test_the_strings_of_all_23_formats_are_theirs(prompts, problems):
    formats = json.loads((prompts / "formats.json").read_text())["formats"]
    expected = lines(prompts / "scienceqa_prompts.jsonl")
    assert len(formats) == 23 and len(expected) == len(problems) == 40
    for form in formats:
        asked, answered = form.split("-")
        for use_caption in (False, True):
            found = questions(problems, form, use_caption)
            name = asked + ("+caption" if use_caption else "")
            assert found == [(item["prompts"][name], item["answers"][answered]) for item in expected]


@pytest.mark.parametrize(("form", "length"), TRUNCATED)
def test_ids_and_labels_of_questions_are_theirs_whole_and_cut(tokenized, problems, form, length):
    which, tokenizer, expected = tokenized
    pairs = questions(problems, form)
    data = rows.settled(Data(max_tokens=length - 1, cut="end"), tokenizer)
    encoded = encode_split(texts_alone(pairs), tokenizer, data.max_tokens, True, **rows.row_options(data))
    alike = same_spaces(which, pairs)
    assert sum(alike) == (40 if which == "own" else 39)
    for name, found in zip(("examples", "labels"), like_theirs(encoded, length), strict=True):
        np.testing.assert_array_equal(found[alike], expected[f"{form}/{length}/{name}"][alike])
    if length == 64:
        assert (like_theirs(encoded, length)[1] == 0).all(1).sum() == (11 if which == "own" else 35)


def test_ids_and_labels_of_instructions_are_theirs(tokenized, prompts):
    which, tokenizer, expected = tokenized
    items = [(item["instruction"], item["answer"]) for item in lines(prompts / "instruct.jsonl")]
    whole = rows.whole_rows(*zip(*items, strict=True), tokenizer, "one_string", "")
    fitted = [rows.fit(row, 511, tokenizer.eos_token_id, eos=True, seam="one_string", cut="end") for row in whole]
    alike = same_spaces(which, items)
    assert len(items) == 12 and sum(alike) >= (12 if which == "own" else 6)
    examples = padded([row.ids for row in fitted], 512, [BOS])
    labels = padded([[0] * row.start + row.ids[row.start : row.stop] for row in fitted], 512, [0])
    np.testing.assert_array_equal(examples[alike], expected["instruct/512/examples"][alike])
    np.testing.assert_array_equal(labels[alike], expected["instruct/512/labels"][alike])


def test_the_pieces_around_the_seam_are_theirs(tokenized, prompts):
    which, tokenizer, _ = tokenized
    seen = 0
    for item in lines(prompts / "boundary.jsonl"):
        if item["tokenizer"] != which:
            continue
        seen += 1
        for seam, pieces in (("one_string", item["one_string"]), ("apart", item["two_strings"])):
            [row] = rows.whole_rows([item["prompt_end"]], [item["answer_start"]], tokenizer, seam, "")
            found = tokenizer.convert_ids_to_tokens(row.ids[row.start :])
            behind = [piece for piece in pieces[pieces.index(":") + 1 :] if piece != "</s>"]
            # The file's answers are cut inside a word: the last piece may be another.
            assert found[: max(len(behind) - 2, 1)] == behind[: max(len(behind) - 2, 1)] or not behind
    assert seen > 10


def test_what_stands_before_the_text_is_theirs(shared_original, prompts):
    with np.load(prompts / "tokens_own.npz") as expected:
        found = Router().markers(load_tokenizer(shared_original("tokenizers") / "llama"))
        assert found.with_image == tuple(expected["prefix/image"].tolist())
        assert found.without_image == tuple(expected["prefix/no_image"].tolist())


def test_instruction_rows_are_lavins_and_llama_adapters_from_the_same_files(prompts, tmp_path):
    items = lines(prompts / "instruct.jsonl")
    for item in items:
        asked = item["source"]
        if "instruction" in asked:
            question = Question(asked["instruction"], asked["input"])
            assert prompt(question, template="lavin") == item["instruction"] and asked["output"] == item["answer"]
            assert prompt(question, template="alpaca") == item["llama_adapter_prompt"]
    sources, names = [], []
    for item in items:
        source = {**item["source"], "id": item["source"].get("id", item["qid"])}
        if source not in sources:
            sources.append(source)
            names.append(source.get("image"))
    for name in filter(None, names):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(sources))
    with pytest.raises(BadDataError, match='"output" is empty'):  # LaVIN teaches EOS alone on such a row
        load_instruct(tmp_path / "rows.json", tmp_path, template="lavin")
    split = load_instruct(tmp_path / "rows.json", tmp_path, template="lavin", on_bad="drop").split
    found = {(sample.instruction, sample.response) for sample in split.samples}
    theirs = {(item["instruction"], item["answer"]) for item in items if item["answer"]}
    # They keep the first turn alone of files that they take for single turns; ours is every turn.
    assert theirs <= found and found - theirs == {("Instruction: Second question?\nResponse:", "Second answer.")}


def test_a_conversation_is_the_demos_but_for_what_its_training_never_has(prompts):
    """The demo writes "Responese: " and, beside a picture, two spaces; LaVIN's rows "Response:" and one."""
    conversations = lines(prompts / "chat.jsonl")
    for item in conversations:
        asked, answered = item["turns"][::2], item["turns"][1::2]
        for n, theirs in enumerate(item["prompts"]):
            earlier = rows.earlier_turns(list(zip(asked[:n], answered[:n], strict=True)), "one_string")
            as_trained = re.sub("Responese: ?", "Response:", theirs).replace("Instruction:  ", "Instruction: ")
            assert prompt(asked[n], earlier, template="lavin") == as_trained != theirs
    assert sum(len(item["prompts"]) for item in conversations) == 12


def test_llama_adapters_rows_are_theirs_whole_and_cut(shared_original):
    folder, tokenizer = shared_original("llama_adapter"), load_tokenizer(shared_original("tokenizers") / "llama")
    items = lines(folder / "prompts.jsonl")
    pairs = [(prompt(Question(i["instruction"], i["input"]), template="alpaca"), i["output"]) for i in items]
    assert [asked for asked, _ in pairs] == [item["prompt"] for item in items]
    tokens, valid = encode_prompts([asked for asked, _ in pairs], tokenizer, 500)
    assert [[BOS, *ids[real]] for ids, real in zip(tokens, valid, strict=True)] == [i["prompt_ids"] for i in items]
    with np.load(folder / "forward.npz") as expected:
        for width, name in ((160, ""), (60, "_max_words_60")):
            data = rows.settled(Data(max_tokens=width - 1, cut="end"), tokenizer)
            encoded = encode_split(texts_alone(pairs), tokenizer, width - 1, True, **rows.row_options(data))
            examples, labels = like_theirs(encoded, width)
            np.testing.assert_array_equal(examples, expected[f"examples{name}"])
            np.testing.assert_array_equal(labels, expected[f"labels{name}"])


def test_rows_with_and_without_a_picture_fill_lavins_length(shared_original):
    """Cut to max_seq_len when tokenised and again with modality row, prefix and picture: text-only rows keep more."""
    folder, tokenizer = shared_original("lavin"), load_tokenizer(shared_original("tokenizers") / "llama")
    items, length = lines(folder / "rows.jsonl"), 92
    pictures = DrawnImages(["i"], lambda row: Image.new("RGB", (1, 1)), ["i"])
    samples = (Sample(i["id"], 0 if i["has_image"] else None, i["prompt"], i["answer"]) for i in items)
    markers, visual = Router().markers(tokenizer), 2
    room = [length - 2 - len(markers.with_image) - visual, length - 2 - len(markers.without_image)]
    data = rows.settled(Data(max_tokens=room[0], max_tokens_text_only=room[1], cut="end"), tokenizer)
    split = Split("x", tuple(samples), pictures)
    found = encode_split(split, tokenizer, data.max_tokens, True, **rows.row_options(data))
    with np.load(folder / "authors.npz") as expected:
        for row, item in enumerate(items):
            before = [*markers.with_image, *[-2] * visual] if item["has_image"] else markers.without_image
            before = [-1, BOS, *before]
            ids = found.tokens[row, found.valid[row]]
            labels = np.where(found.supervised[row], found.tokens[row], 0)[found.valid[row]]
            np.testing.assert_array_equal(padded([ids], length, before)[0], expected["inserted_ids"][row])
            none = [0] * len(before)
            np.testing.assert_array_equal(padded([labels], length, none)[0], expected["inserted_labels"][row])


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_clipcaps_captions_are_theirs(shared_original, tmp_path, mapper):
    for file in (shared_original("tokenizers") / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = load_tokenizer(tmp_path)
    with np.load(shared_original(f"clipcap_{mapper}") / "forward.npz", allow_pickle=False) as expected:
        captions, tokens = [str(caption) for caption in expected["captions"]], expected["tokens"]
    data = rows.settled(Data(max_tokens=tokens.shape[1], eos=False), tokenizer)
    split = texts_alone([("", caption) for caption in captions])
    found = encode_split(split, tokenizer, data.max_tokens, False, **rows.row_options(data))
    supervised = [ids[mask] for ids, mask in zip(found.tokens, found.supervised, strict=True)]
    np.testing.assert_array_equal(padded(supervised, tokens.shape[1]), tokens)

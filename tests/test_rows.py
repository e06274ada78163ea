"""Claims about the seam between prompt and answer; oracles: strings tokenised whole, offsets, rules written here."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import EOS, ids, real, split_of, texts, tiny_gpt2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs import miniature
from eim_jax.config import ConfigError, Data, as_dict, from_config_dict, read_saved, recorded_seam
from eim_jax.config.resume import differences
from eim_jax.data import rows
from eim_jax.data.datasets import chat_prompt
from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.samples import Sample, Split
from eim_jax.data.tokenize import encode_prompts, encode_split, load_tokenizer


def llama_like():
    """SentencePiece's way: a space's mark before every text, and before every word behind a space."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefgh:.", "▁a", "▁b"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "b")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces_of(tokenizer, pair, **options):
    found = encode_split(split_of(pair), tokenizer, 40, True, **options)
    return tokenizer.convert_ids_to_tokens(real(found.tokens, found.supervised)[0])


def test_the_three_seams_by_hand():
    said = {seam: pieces_of(llama_like(), ("c:", "a b"), seam=seam) for seam in rows.SEAMS}
    assert said["one_string"] == ["a", "▁b", "</s>"]
    assert said["spaced"] == said["apart"] == ["▁a", "▁b", "</s>"]
    said = {seam: pieces_of(tiny_gpt2(), ("c!", "a b"), seam=seam) for seam in rows.SEAMS}
    assert said["one_string"] == said["apart"] == ["a", "Ġ", "b", EOS]
    assert said["spaced"] == ["Ġa", "Ġ", "b", EOS]


def test_a_piece_that_straddles_the_seam_is_supervised_with_the_answer():
    """ "a" + "b" is one piece, "ab"; labels from the prompt's own length, 1, would leave the answer's "b" untaught."""
    found = encode_split(split_of(("h a", "b c"), ("a", "b")), tiny_gpt2(), 10, eos=False)
    assert real(found.tokens, found.valid) == [ids(f"h Ġab Ġ c {EOS}"), ids(f"ab {EOS}")]
    assert real(found.tokens, found.supervised) == [ids("Ġab Ġ c"), ids("ab")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, texts.filter(len)), min_size=1, max_size=5), st.sampled_from(["one_string", "spaced"]))
def test_rows_are_the_whole_string_and_labels_are_what_reaches_beyond_the_prompt(pairs, seam):
    for tokenizer in (tiny_gpt2(), llama_like()):
        found = rows.whole_rows(*zip(*pairs, strict=True), tokenizer, seam, "")
        for (prompt, answer), row in zip(pairs, found, strict=True):
            touches = not prompt or prompt.endswith(" ") or answer.startswith(" ")
            whole = prompt + (" " if seam == "spaced" and not touches else "") + answer
            encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            assert row.ids == encoded["input_ids"]
            own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            beyond = [stop > len(prompt) for _, stop in encoded["offset_mapping"]]
            assert row.start == (len(own) if row.ids[: len(own)] == own else beyond.index(True))


@settings(max_examples=60, deadline=None)
@given(st.tuples(texts, texts.filter(len)), st.integers(2, 14), st.booleans())
def test_cut_at_the_end_keeps_the_rows_beginning(pair, most, eos):
    row, end = rows.whole_rows([pair[0]], [pair[1]], tiny_gpt2(), "one_string", "")[0], 99
    found = rows.fit(row, most, end, eos=eos, seam="one_string", cut="end")
    assert found.ids == ([*row.ids, end][:most] if eos else [*row.ids[:most], end])
    labels = [i for i in range(len(found.ids)) if i >= row.start and (eos or i < len(found.ids) - 1)]
    assert list(range(found.start, found.stop)) == labels


def test_a_caption_without_a_supervised_end_keeps_as_many_tokens_as_clipcaps():
    caption = "a b c d e f g h"
    whole = tiny_gpt2()(caption)["input_ids"]
    for cut in ("balanced", "end"):
        found = encode_split(split_of(("", caption)), tiny_gpt2(), 6, False, cut=cut)
        assert real(found.tokens, found.supervised) == [whole[:6]]
        assert real(found.tokens, found.valid) == [[*whole[:6], *ids(EOS)]]  # where loss_LM and K_b read
    assert rows.widest(Data(max_tokens=6, eos=False, seam="one_string")) == 7
    before = encode_split(split_of(("", caption)), tiny_gpt2(), 6, False, seam="apart")  # earlier versions: one fewer
    assert real(before.tokens, before.supervised) == [whole[:5]]


def test_rows_without_a_picture_may_have_more_tokens():
    samples = (Sample("a", 0, "h", "abcdefgh"), Sample("b", None, "h", "abcdefgh"))
    split = replace(split_of(("h", "a")), samples=samples)
    whole = tiny_gpt2()("habcdefgh")["input_ids"]
    found = encode_split(split, tiny_gpt2(), 4, True, cut="end", text_only=6)
    assert real(found.tokens, found.valid) == [whole[:4], whole[:6]]
    data = Data(max_tokens=4, max_tokens_text_only=6)
    assert [rows.limit(data, pictured) for pictured in (True, False)] == [4, 6]
    tokens, valid = encode_prompts(["habcdefgh"] * 2, tiny_gpt2(), [4, 6])
    assert real(tokens, valid) == [whole[-4:], whole[-6:]]


def test_rows_that_lose_their_whole_answer_are_counted_and_all_of_them_refused(capsys):
    long, short = ("a b c d e", "h"), ("a", "h")
    encode_split(split_of(long, short), tiny_gpt2(), 5, True, cut="end")
    assert "cut at their end, 1 of 2 samples keep no token of their response" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 of 1 samples keep no token .*config\.data\.cut='balanced'"):
        encode_split(split_of(long), tiny_gpt2(), 5, True, cut="end")


def test_the_seam_is_chosen_from_the_tokenizer_unless_its_folder_says_otherwise(shared_data, tmp_path):
    assert rows.seam_of(llama_like()) == "one_string"
    assert rows.seam_of(tiny_gpt2()) == rows.seam_of(load_tokenizer("miniature/gpt2")) == "spaced"
    assert rows.seam_of(load_tokenizer("miniature/llama")) == "one_string"  # byte-level, but trained so
    (tmp_path / "tokenizer.model").write_bytes((shared_data("tokenizers") / "tok512" / "tok512.model").read_bytes())
    assert rows.seam_of(load_tokenizer(tmp_path)) == "one_string"


@pytest.mark.parametrize("said", ["apart", "together", 3])
def test_a_folders_own_word_is_read_or_refused(tmp_path, said):
    tiny_gpt2().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seam": said}))
    if said == "apart":
        assert rows.seam_of(load_tokenizer(tmp_path)) == "apart"
    else:
        with pytest.raises(ValueError, match=r"seam is .*, none of one_string, spaced, apart"):
            rows.seam_of(load_tokenizer(tmp_path))


def test_the_miniatures_rows_are_what_they_were():
    """The committed results of questions and chat were tokenised apart: with this tokenizer that is the same ids."""
    from eim_jax.data.miniature import chat, qa

    tokenizer = load_tokenizer("miniature/llama")
    for split in (qa.load("train", problems=300, form="QCM-EA"), chat.load_chat("train", samples=300)):
        new = encode_split(split, tokenizer, 140, True, seam="one_string")
        old = encode_split(split, tokenizer, 140, True, seam="apart")
        assert real(new.tokens, new.valid) == real(old.tokens, old.valid)
        assert real(new.tokens, new.supervised) == real(old.tokens, old.supervised)


def test_an_earlier_answer_has_the_ids_that_it_had_as_an_answer(tmp_path):
    turns = [("b", "a b"), ("c", "a")]
    conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(sum(turns, ()))]
    (tmp_path / "x.json").write_text(json.dumps([{"conversations": conversation}]))
    words = {"multi_turn": True, "template": "b: {instruction}\nc:"}
    for tokenizer in (llama_like(), tiny_gpt2()):
        for seam in ("one_string", "spaced"):
            samples = load_instruct(tmp_path / "x.json", None, seam=seam, **words).split.samples
            pairs = zip(*((s.instruction, s.response) for s in samples), strict=True)
            first, second = rows.whole_rows(*pairs, tokenizer, seam, "")
            answer = first.ids[first.start :]
            at = second.ids.index(answer[0], first.start)
            assert second.ids[at : at + len(answer)] == answer
            data = Data(kind="instruct", seam=seam, **words)
            assert chat_prompt(data, "c", turns[:1]) == samples[1].instruction


def test_a_work_directory_keeps_its_seam(tmp_path):
    assert recorded_seam(tmp_path) is None and read_saved(tmp_path) is None
    values = as_dict(from_config_dict(miniature.get_config()))
    del values["data"]["seam"]
    values["data"]["eos"] = False
    (tmp_path / "run.json").write_text(json.dumps({"config": values}))  # of an earlier version
    assert recorded_seam(tmp_path) == "apart"
    old = read_saved(tmp_path)
    assert old.data.seam == "apart"  # and eos=False without stop_at_period, refused for new runs, still evaluates
    assert differences(old, replace(old, data=replace(old.data, seam="auto"))) == []
    assert differences(old, replace(old, data=replace(old.data, seam="spaced"))) == [
        "data.seam: 'apart' in the workdir, 'spaced' asked for"
    ]
    (tmp_path / "run.json").write_text(json.dumps({"config": values, "seam": "spaced"}))
    with pytest.raises(ConfigError, match=r"eos=False teaches no end .*stop_at_period=True"):
        read_saved(tmp_path)
    values["data"] |= {"eos": True, "seam": "auto"}
    (tmp_path / "run.json").write_text(json.dumps({"config": values, "seam": "spaced"}))
    assert read_saved(tmp_path).data.seam == "spaced"
    settled = rows.settled(Data(), tiny_gpt2(), recorded_seam(tmp_path))
    assert settled.seam == "spaced" and rows.settled(Data(), llama_like()).seam == "one_string"
    assert rows.settled(Data(seam="apart"), tiny_gpt2(), "spaced").seam == "apart"


def test_what_ends_a_text_is_what_the_config_says():
    end = tiny_gpt2().eos_token_id
    assert rows.end_id(Data(), tiny_gpt2()) == end
    assert rows.end_id(Data(eos=False), tiny_gpt2()) is None
    assert rows.end_id(Data(eos=False, seam="apart"), tiny_gpt2()) == end  # earlier versions


def test_a_queue_says_how_its_texts_became_ids():
    assert rows.described(Data(seam="apart", max_tokens=9)) == "at most 9 tokens"  # as on disk before
    said = rows.described(Data(seam="spaced", max_tokens=9, max_tokens_text_only=11, cut="end", eos=False))
    assert said == "at most 9 tokens, 11 without a picture, spaced, cut end, EOS on top"


def test_a_split_of_texts_alone_needs_no_prompt():
    empty = Split("x", (), split_of(("", "a")).images)
    assert encode_split(empty, tiny_gpt2(), 4, True).tokens.shape == (0, 0)

"""Claims about the tokenizer's own chat template; the oracle is transformers' apply_chat_template, tokens and all."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import llama_like
from test_text import real, split_of, tiny_gpt2

from eim_jax.config import Config, ConfigError, Data
from eim_jax.data import rows
from eim_jax.data.conversation import message, messages_of, readable, written
from eim_jax.data.datasets import chat_prompt, check, load_split
from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.shard_writer import prepare
from eim_jax.data.tokenize import encode_prompts, encode_split, fingerprint, load_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# LLaMA 2's, which trims, refuses a second question in a row, and ends with EOS behind a space.
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + 'a ' + m['content'].strip() + ' b' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
texts = st.text("ab h\n", max_size=5)
turns = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3)


def chatml():
    tokenizer = tiny_gpt2()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def llama2():
    tokenizer = llama_like()
    tokenizer.chat_template = LLAMA2
    tokenizer.init_kwargs["starts_with_bos"] = True
    return tokenizer


def conversation(pairs, system=""):
    said = [message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    said = [message("system", system), *said] if system else said
    return said[:-1], said[-1]["content"]


@settings(max_examples=80, deadline=None)
@given(turns, st.sampled_from(["", "a b"]))
def test_a_row_is_what_transformers_renders_and_labels_are_what_lies_behind_its_prompt(pairs, system):
    for tokenizer, end in ((chatml(), "<|im_end|>"), (llama2(), "</s>")):
        if system and end == "</s>":
            continue  # that template knows no system turn
        asked, answer = conversation(pairs, system)
        options = {"return_dict": False, "tokenize": True}
        whole = tokenizer.apply_chat_template([*asked, message("assistant", answer)], **options)
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
        end = tokenizer.convert_tokens_to_ids(end)
        last = len(whole) - whole[::-1].index(end)
        drop = int(end == tokenizer.convert_tokens_to_ids("</s>"))  # BOS, which the model puts before the picture
        found = encode_split(split_of((written(asked), answer)), tokenizer, 400, True, seam="tokenizer")
        assert real(found.tokens, found.valid) == [whole[drop:last]]
        assert real(found.tokens, found.supervised) == [whole[len(prompt) : last]]
        assert real(*encode_prompts([written(asked)], tokenizer, 400, "tokenizer")) == [prompt[drop:]]
        assert rows.end_id(Data(seam="tokenizer"), tokenizer) == end


def test_special_tokens_in_a_turns_own_words_are_text():
    """transformers' own oracle for this is sanitize_control_tokens."""
    tokenizer = chatml()
    asked, answer = conversation([("a<|im_end|>b", "h<|im_start|>")])
    found = encode_split(split_of((written(asked), answer)), tokenizer, 400, True, seam="tokenizer")
    said = [*asked, message("assistant", answer)]
    whole = tokenizer.apply_chat_template(said, return_dict=False, sanitize_control_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert whole.count(end) == 3  # the system's, the user's, the assistant's
    assert real(found.tokens, found.valid) == [whole[: len(whole) - whole[::-1].index(end)]]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        (CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>' }}"), "changes what stands"),
        ("{% for m in messages %}{{ m['role'] + 'x' }}{% endfor %}", "leaves out or changes turn 0 .user. of 1"),
        ("{{ raise_exception('no') }}", "refuses the turns user: no"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused_with_the_reason(template, said):
    tokenizer = chatml()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=f"data.template='tokenizer'.*{said}"):
        rows.settled(Data(own={"template": "tokenizer"}), tokenizer)


def test_a_template_that_changes_earlier_turns_or_refuses_one_names_the_sample():
    tokenizer = chatml()
    asked, answer = conversation([("a", "h a"), ("b", "a")])
    encode_split(split_of((written(asked), answer)), tokenizer, 40, True, seam="tokenizer")
    changes = ("m['content'][1:]", "leaves out or changes turn 0"), ("m['content'].title()", "changes turn 0")
    for other, said in changes:
        tokenizer.chat_template = CHATML.replace("m['content']", f"(m['content'] if loop.last else {other})")
        with pytest.raises(ValueError, match=rf"sample .*: the tokenizer's chat template {said} .user"):
            encode_split(split_of((written(asked), answer)), tokenizer, 40, True, seam="tokenizer")
    system, answer = conversation([("a", "b")], system="h")
    with pytest.raises(ValueError, match=r"sample .*refuses the turns system, user.*must alternate"):
        encode_split(split_of((written(system), answer)), llama2(), 40, True, seam="tokenizer")


def test_a_template_with_a_clock_gives_the_same_row_on_every_day():
    tokenizer = chatml()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    [ids] = rows.prompt_ids([written([message("user", "a")])], tokenizer, "tokenizer")
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("26 Jul 2024")) + tokenizer.decode(
        rows.prompt_ids(["a"], chatml(), "tokenizer")[0]
    )


def test_instruction_data_keep_their_turns_and_chat_asks_as_training_did(tmp_path):
    row = {
        "system": "be brief",
        "conversations": [
            {"from": speaker, "value": text}
            for speaker, text in zip(("human", "gpt") * 2, ("Who?", "He.", "Why?", "So."), strict=True)
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps([row, {"instruction": "Add.", "input": "1 2", "output": "3"}]))
    samples = load_instruct(tmp_path / "x.json", None, template="tokenizer", multi_turn=True).split.samples
    said = [(turn["role"], turn["content"]) for turn in messages_of(samples[1].instruction)]
    assert said == [("system", "be brief"), ("user", "Who?"), ("assistant", "He."), ("user", "Why?")]
    assert messages_of(samples[2].instruction) == [message("user", "Add.\n1 2")]
    assert readable(samples[2].instruction) == "user: Add.\n1 2"
    data = Data(kind="instruct", seam="tokenizer", template="tokenizer", multi_turn=True)
    assert chat_prompt(data, "Why?", [("Who?", "He.")]) == written(messages_of(samples[1].instruction)[1:])
    other = Data(kind="scienceqa", seam="tokenizer", template="tokenizer")
    assert messages_of(chat_prompt(other, "Why?")) == [message("user", "Why?")]


def test_prepared_conversations_are_those_of_the_files_and_of_no_other_form(tmp_path):
    rows_ = [{"messages": [message("user", "Who?"), message("assistant", "He.")] * 2}]
    (tmp_path / "x.json").write_text(json.dumps(rows_))
    data = {"kind": "instruct", "sources": (str(tmp_path / "x.json"),), "multi_turn": True, "template": "tokenizer"}
    prepare(Config(data=Data(**data)), tmp_path / "out")
    split = load_split(Config(data=Data(**data, seam="tokenizer")), "train", tmp_path)
    data |= {"prepared": str(tmp_path / "out")}
    assert load_split(Config(data=Data(**data, seam="tokenizer")), "train", tmp_path).samples == split.samples
    with pytest.raises(ConfigError, match=r"config\.data\.template is .* but .* was prepared with tokenizer"):
        load_split(Config(data=Data(**data | {"template": "alpaca"})), "train", tmp_path)
    with pytest.raises(ConfigError, match=r"config\.data\.seam='spaced' with config\.data\.template"):
        check(Config(data=Data(**data, seam="spaced")))


def test_the_form_is_kept_with_a_run_and_its_queues():
    tokenizer, data = chatml(), Data(own={"template": "tokenizer"})
    settled = rows.settled(data, tokenizer, recorded="spaced")
    assert settled.seam == "tokenizer"  # what run.json records
    assert ", tokenizer, " in rows.described(settled)  # what a queue's manifest says
    before = fingerprint(tokenizer, "tokenizer"), fingerprint(tokenizer)
    tokenizer.chat_template += " "
    assert fingerprint(tokenizer, "tokenizer") != before[0] and fingerprint(tokenizer) == before[1]
    assert rows.settled(replace(data, own={"template": "plain"}), tokenizer).seam == "spaced"


def test_a_folders_template_is_read(tmp_path):
    chatml().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_chat_template() == CHATML

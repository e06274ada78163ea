"""The seam: how prompt, earlier turns, answer and end token become one row of ids, and which of them are supervised.

Training, likelihoods, queues, evaluation, chat and a conversation's earlier turns all read their ids from here. A
prompt and its answer are one string, tokenised once, as LaVIN and LLaMA-Adapter do it:

| `data.seam` | the row | "Response:", "The" by LLaMA's SentencePiece | by a byte-level BPE |
|---|---|---|---|
| one_string | prompt + answer | `:` `The` | `:` `The` |
| spaced | prompt + " " + answer | `:` `▁The` | `:` `ĠThe` |
| apart | each tokenised alone, joined as ids (runs of earlier versions) | `:` `▁The` | `:` `The` |
| tokenizer | the tokenizer's chat template writes both (`data.template=tokenizer`, chat_form.py) | | |

Which one a run takes is settled once, by the LM's tokenizer (`seam_of`), and kept in run.json.

What is supervised is what lies behind the prompt. The prompt's own ids are, in nearly every row, the row's first ids,
and the labels begin behind them. Where they are not, a piece straddles the seam ("a" and "b" are one piece "ab"): the
labels then begin at the first piece whose characters reach beyond the prompt, so that the straddling piece, which holds
the answer's first characters, is supervised, and the prompt is what stands before it. A question that is asked is
always read by the prompt's own ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from eim_jax.config import Data
from eim_jax.data.conversation import TOKENIZER

SEAMS = ("one_string", "spaced", "apart")
_CHUNK = 8192  # texts given to the tokenizer at once
_LONG = 50_000  # texts from which on a progress bar is worth its lines (about two seconds)


class Row(NamedTuple):
    """A prompt with its answer as ids; those from `start` on are the answer's."""

    ids: list[int]
    start: int


class RowError(ValueError):
    """Why a prompt and its answer are no row; `row` says which of those that were given."""

    def __init__(self, reason: str, row: int = 0):
        super().__init__(reason)
        self.row = row


class Fitted(NamedTuple):
    """A row as the LM reads it, in its length: the supervised ids are ids[start:stop]."""

    ids: list[int]
    start: int
    stop: int
    cut: bool


def seam_of(tokenizer: Any) -> str:
    """Returns the seam that an LM with this tokenizer is used to.

    Where a word's own ids already begin with the space's mark (SentencePiece's dummy prefix: LLaMA, Vicuna), it is
    LaVIN's and LLaMA-Adapter's: "one_string". Where the space is part of the following word's piece and has to be
    written (byte-level BPE: SmolLM2, LLaMA 3), it is "spaced". A folder may say otherwise, in the field "seam" of its
    tokenizer_config.json: the miniature's LLaMA was trained on answers without a space.

    Raises:
      ValueError: that field is none of SEAMS.
    """
    said = tokenizer.init_kwargs.get("seam")
    if said is not None:
        if said not in SEAMS:
            raise ValueError(f"tokenizer_config.json: seam is {said!r}, none of {', '.join(SEAMS)}")
        return said
    behind, alone = (
        "".join(tokenizer.convert_ids_to_tokens(ids)[-1:]) for ids in ids_of(["a: a", "a"], tokenizer, "the seam")
    )
    return "spaced" if behind != alone and behind.endswith(alone) else "one_string"


def settled(data: Data, tokenizer: Any, recorded: str | None = None) -> Data:
    """Returns `config.data` with its seam: the one it names, else what run.json recorded, else the tokenizer's.

    Raises:
      ConfigError: `data.template=tokenizer`, and this tokenizer's chat template cannot be used.
    """
    if data.own.get("template") == TOKENIZER:
        _chat_form().check_config(tokenizer)
        return replace(data, seam=TOKENIZER)
    return data if data.seam != "auto" else replace(data, seam=recorded or seam_of(tokenizer))


def separator(seam: str) -> str:
    """Returns what stands between a prompt and its answer, in a conversation's earlier turns too.

    A seam that is not settled, where no tokenizer is read (preparing, planning), is "one_string".
    """
    return " " if seam == "spaced" else ""


def earlier_turns(turns: Sequence[tuple[Any, str]], seam: str) -> tuple[tuple[Any, str], ...]:
    """Returns (question, answer) pairs as a prompt holds them: each answer joined to its question as a new one is."""
    between = separator(seam) if turns else ""
    return tuple((asked, answered if answered[:1].isspace() else between + answered) for asked, answered in turns)


def row_options(data: Data) -> dict[str, Any]:
    """Returns the fields of a settled `config.data` that `tokenize.encode_split` takes by name."""
    return {"seam": data.seam, "cut": data.cut, "text_only": data.max_tokens_text_only}


def limit(data: Data, pictured: bool) -> int:
    """Returns the longest text of a row; one without a picture may have the slots that no picture takes."""
    return data.max_tokens if pictured else max(data.max_tokens, data.max_tokens_text_only)


def widest(data: Data) -> int:
    """Returns the longest row's length: an end token that is not supervised comes on top."""
    return limit(data, pictured=False) + (not _counts_end(data.eos, data.seam))


def end_id(data: Data, tokenizer: Any) -> int | None:
    """Returns the token that ends a generated text; None where the model was not taught to write one."""
    return end_of(tokenizer, data.seam) if _counts_end(data.eos, data.seam) else None


def end_of(tokenizer: Any, seam: str) -> int | None:
    """Returns the token at a row's end: EOS, or what ends an answer in the tokenizer's chat template."""
    return _chat_form().end_of_turn(tokenizer) if seam == TOKENIZER else tokenizer.eos_token_id


def described(data: Data) -> str:
    """Returns the words by which a queue says how its texts became ids, behind the tokenizer's fingerprint."""
    said = f"at most {data.max_tokens} tokens"  # as it stands in the queues of earlier versions
    if data.seam == "apart":
        return said
    alone = f", {data.max_tokens_text_only} without a picture" if data.max_tokens_text_only else ""
    return f"{said}{alone}, {data.seam}, cut {data.cut}{'' if data.eos else ', EOS on top'}"


def whole_rows(prompts: Sequence[str], answers: Sequence[str], tokenizer: Any, seam: str, label: str) -> list[Row]:
    """Returns each prompt with its answer as ids, whole and without an end token; see the module for the rule.

    Args:
      prompts: one a row, "" for none: then the row is the answer's own ids.
      answers: as many.
      tokenizer: the LM's.
      seam: one of SEAMS, or TOKENIZER.
      label: of the progress line.
    """
    if seam == TOKENIZER:
        return [Row(*row) for row in _chat_form().rows_of(prompts, answers, tokenizer, label)]
    distinct = list(dict.fromkeys(prompts))  # often one prompt for all
    ids_of_prompt = dict(zip(distinct, ids_of(distinct, tokenizer, "tokenising instructions"), strict=True))
    before = [ids_of_prompt[prompt] for prompt in prompts]
    if seam == "apart":
        behind = ids_of(answers, tokenizer, label)
        return [Row(own + answer, len(own)) for own, answer in zip(before, behind, strict=True)]
    between = separator(seam)
    texts = [
        prompt + ("" if _apart_already(prompt, answer) else between) + answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    rows = [Row(whole, len(own)) for whole, own in zip(ids_of(texts, tokenizer, label), before, strict=True)]
    straddling = [i for i, (row, own) in enumerate(zip(rows, before, strict=True)) if row.ids[: row.start] != own]
    for i, start in zip(straddling, _starts(texts, prompts, before, rows, straddling, tokenizer), strict=True):
        rows[i] = Row(rows[i].ids, start)
    return rows


def prompt_ids(prompts: Sequence[str], tokenizer: Any, seam: str) -> list[list[int]]:
    """Returns the ids of prompts that are to be answered."""
    if seam == TOKENIZER:
        return [ids for ids, _ in _chat_form().rows_of(prompts, [None] * len(prompts), tokenizer, "tokenising prompts")]
    return ids_of(prompts, tokenizer, "tokenising prompts")


def _chat_form() -> Any:
    from eim_jax.data import chat_form  # here: a step's program alone does without transformers' templates

    return chat_form


def _apart_already(prompt: str, answer: str) -> bool:
    """Whether a space between the two would be one too many: one is empty, or brings white space itself."""
    return not prompt or not answer or prompt[-1].isspace() or answer[0].isspace()


def _starts(texts, prompts, before, rows, wanted: Sequence[int], tokenizer) -> list[int]:
    """The first piece that reaches beyond its prompt, in rows that the prompt's own ids do not begin."""
    if not tokenizer.is_fast:  # knows no offsets: the first piece that is not the prompt's own
        pairs = ([a == b for a, b in zip(rows[i].ids, before[i], strict=False)] for i in wanted)
        return [same.index(False) if False in same else len(same) for same in pairs]
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    starts = []
    for i in wanted:
        spans = tokenizer(texts[i], return_offsets_mapping=True, **options)["offset_mapping"]
        beyond = (place for place, (_, stop) in enumerate(spans) if stop > len(prompts[i]))
        starts.append(next(beyond, len(spans)))
    return starts


def fit(row: Row, longest: int, end: int, *, eos: bool, seam: str, cut: str) -> Fitted:
    """Returns a row with its end token, in at most `longest` ids.

    The end token (EOS) is there in any case, unless it is cut off: K_b and loss_LM read the LM at it. Where it is not
    supervised (ClipCap) it comes on top of `longest`, so that a text that is cut keeps as many tokens as theirs.

    Args:
      row: whole.
      longest: the most ids, of which the end token is one where it is supervised.
      end: the end token.
      eos: whether it is supervised.
      seam: as the row's; "apart" counts the end token in any case, as it did.
      cut: "balanced": too long a row loses its answer's end first (EOS stays), down to a quarter, then its prompt's
        beginning, as the answer stands first in a response and next to the prompt's end. "end": everything behind the
        limit goes, EOS and the whole answer perhaps, as in LaVIN and LLaMA-Adapter.
    """
    counted = _counts_end(eos, seam)
    total = longest if counted else longest + 1
    too_long = len(row.ids) + 1 > total
    if cut == "end":
        ids = [*row.ids, end][:total] if counted else [*row.ids[:longest], end]
        ended = not counted or not too_long
        stop = len(ids) - (ended and not eos)
        return Fitted(ids, min(row.start, stop), stop, too_long)
    prompt, answer = row.ids[: row.start], row.ids[row.start :]
    least = max(total - len(prompt), total // 4, 2)
    answer = [*answer[: least - 1], end]
    prompt = prompt[max(len(prompt) - (total - len(answer)), 0) :]
    ids = prompt + answer
    return Fitted(ids, len(prompt), len(ids) if eos else len(ids) - 1, too_long)


def _counts_end(eos: bool, seam: str) -> bool:
    return eos or seam == "apart"


def ids_of(texts: Sequence[str], tokenizer: Any, label: str, special: bool = False) -> list[list[int]]:
    """Returns the ids of each text alone, through the tokenizer's batch path; no special token is added.

    Those written in a text are read as plain text, or with `special` as tokens.
    """

    def ids(chunk: Sequence[str]) -> list[list[int]]:
        return tokenizer(
            list(chunk),
            add_special_tokens=False,
            split_special_tokens=not special,  # "<|endoftext|>" in a caption is text, not the end
            return_attention_mask=False,
            verbose=False,  # long texts are cut, and counted, by the caller
        )["input_ids"]

    if len(texts) < _LONG:
        return ids(texts) if texts else []
    found: list[list[int]] = []
    from eim_jax.utils.console import progress  # here: a step's program alone does without a terminal

    with progress(label, len(texts), "texts") as advance:
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            found.extend(ids(chunk))
            advance(len(chunk))
    return found

"""The form that a tokenizer's own chat template gives a conversation (`data.template=tokenizer`): turns become ids.

transformers renders the template (`apply_chat_template`), with the answer and, as a prompt, without it. The row is what
it renders with the answer, up to the token that ends the answer's turn; the prompt must be its beginning, and what lies
behind is supervised. Turns must stand in it as they were given, but for white space at their ends: a template that
leaves out or rewrites one would train on other texts than the user's, and is refused.

- Special tokens of the template are tokens. One that is written in a turn's own words is text, as elsewhere.
- What the template knows of thinking is switched off (`enable_thinking`), and the date of a template that writes one is
  always the same: a row must not depend on the day.
- BOS stands once: where the model itself puts it before the picture (`pretrained.tokenizer.bos_id`), not in the row.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from eim_jax.config import ConfigError
from eim_jax.data.conversation import Message, message, messages_of
from eim_jax.data.rows import RowError, ids_of
from eim_jax.pretrained.tokenizer import bos_id

_DATE = "26 Jul 2024"  # as in Llama 3.1's template
# Takes the place of the clock that transformers gives a template.
FIXED_CLOCK = "{%- macro strftime_now(form) -%}" + _DATE + "{%- endmacro -%}"
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip, lambda text: text.lstrip("\n"))


class Written(NamedTuple):
    """A conversation as text: the prompt is text[:start]; `own` are the turns' own words in it, as spans."""

    text: str
    start: int
    own: tuple[tuple[int, int], ...]


def check_config(tokenizer: Any) -> None:
    """Refuses an LM's tokenizer by which no conversation can be written.

    Raises:
      ConfigError: it has no chat template, or one that cannot be used for a single question.
    """
    field = "config.data.template='tokenizer'"
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{field}: the tokenizer of config.towers.lm has no chat template (chat_template in tokenizer_config.json, "
            "or chat_template.jinja): take an instruct model, or data.template=plain or alpaca"
        )
    try:
        write([message("user", "a")], "b", tokenizer)
    except RowError as error:
        raise ConfigError(f"{field}: {error}") from error


def write(messages: Sequence[Message], answer: str | None, tokenizer: Any) -> Written:
    """Returns a conversation in the template's words, with its answer up to the token that ends it, or as a prompt.

    Args:
      messages: the turns up to the answer.
      answer: None for the prompt alone.
      tokenizer: the LM's.

    Raises:
      RowError: the template refuses the turns, changes one, or begins an answer otherwise than its prompt says.
    """
    prompt = _render(tokenizer, messages, prompt=True)
    spans = _spans(prompt, messages, tokenizer, prompt=True)
    if answer is None:
        return Written(prompt, len(prompt), spans)
    turns = [*messages, message("assistant", answer)]
    text = _render(tokenizer, turns)
    if not text.startswith(prompt):
        at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
        raise RowError(
            f"the chat template changes what stands before an answer when the answer is there: {prompt[at:][:40]!r} "
            f"becomes {text[at:][:40]!r}; such a template cannot be trained on, take data.template=plain or alpaca"
        )
    spans = _spans(text, turns, tokenizer)
    answered = spans[-1][1]
    end = _control(tokenizer).search(text, answered)
    return Written(text[: end.start() if end else answered], len(prompt), spans)


def end_of_turn(tokenizer: Any) -> int | None:
    """Returns the token that ends an answer in the template: the first special one behind it, else EOS."""
    turns = [message("user", "a"), message("assistant", "b")]
    text = _render(tokenizer, turns)
    end = _control(tokenizer).search(text, _spans(text, turns, tokenizer)[-1][1])
    return tokenizer.convert_tokens_to_ids(end[0]) if end else tokenizer.eos_token_id


def rows_of(
    instructions: Sequence[str], answers: Sequence[str | None], tokenizer: Any, label: str
) -> list[tuple[list[int], int]]:
    """Returns (ids, where the answer's begin) of each conversation with its answer, without the token that ends it.

    Args:
      instructions: see data/conversation.py.
      answers: as many; None for a prompt, whose answer is to be generated.
      tokenizer: the LM's.
      label: of the progress line.

    Raises:
      RowError: a conversation cannot be written; its `row` says which.
    """
    texts = []
    for row, (instruction, answer) in enumerate(zip(instructions, answers, strict=True)):
        try:
            texts.append(write(messages_of(instruction), answer, tokenizer))
        except RowError as error:
            raise RowError(str(error), row) from error
    whole = _ids(texts, tokenizer, label)
    prompts = [text._replace(text=text.text[: text.start]) for text in texts]
    before = _ids(prompts, tokenizer, "tokenising prompts")
    bos, found = bos_id(tokenizer), []
    for text, ids, own in zip(texts, whole, before, strict=True):
        start = len(own) if ids[: len(own)] == own else _straddled(text, ids, own, tokenizer)
        bare = int(bos is not None and ids[:1] == [bos])
        found.append((ids[bare:], max(start - bare, 0)))
    return found


def _render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_CLOCK + template
    options = {"tokenize": False, "add_generation_prompt": prompt, "enable_thinking": False}
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, **options)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise RowError(f"the tokenizer's chat template refuses the turns {roles}: {error}") from error


def _spans(text: str, messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False) -> tuple:
    """Where each turn's own words stand in a rendered text.

    The template's words around them are known from turns of a mark each.

    Raises:
      RowError: a turn is not there as it was given.
    """
    pieces = _around(tokenizer, tokenizer.get_chat_template(), tuple(turn["role"] for turn in messages), prompt)
    place, found = len(pieces[0]), []
    if not text.startswith(pieces[0]):
        raise RowError("the tokenizer's chat template writes other words around these turns than around others")
    for number, (turn, after) in enumerate(zip(messages, pieces[1:], strict=True)):
        tries = {trim(turn["content"]): None for trim in _TRIMS}
        said = [own for own in tries if text.startswith(own + after, place)]
        if not said:
            raise RowError(
                f"the tokenizer's chat template changes turn {number} ({turn['role']}): {turn['content'][:60]!r} "
                f"becomes {text[place:][:60]!r}; take data.template=plain or alpaca"
            )
        found.append((place, place + len(said[0])))
        place += len(said[0]) + len(after)
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _around(tokenizer: Any, template: str, roles: tuple[str, ...], prompt: bool) -> list[str]:
    """The template's words before, between and behind turns of these roles."""
    marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
    turns = [message(role, mark) for role, mark in zip(roles, marks, strict=True)]
    text, pieces = _render(tokenizer, turns, prompt=prompt), []
    for number, mark in enumerate(marks):
        before, found, text = text.partition(mark)
        if not found:
            which = f"turn {number} ({roles[number]}) of {len(roles)}"
            raise RowError(
                f"the tokenizer's chat template leaves out or changes {which}; take data.template=plain or alpaca"
            )
        pieces.append(before)
    return [*pieces, text]


def _control(tokenizer: Any) -> re.Pattern[str]:
    """Finds the special tokens in a text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _control_tokens(frozenset(added.union(tokenizer.all_special_tokens)))


@functools.lru_cache(maxsize=8)
def _control_tokens(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if names else r"(?!)")


def _ids(texts: Sequence[Written], tokenizer: Any, label: str) -> list[list[int]]:
    """The ids of rendered texts; special tokens among the turns' own words are text."""
    control = _control(tokenizer)
    found = ids_of([text.text for text in texts], tokenizer, label, special=True)
    for row, text in enumerate(texts):
        if not any(control.search(text.text, start, stop) for start, stop in text.own):
            continue
        ids, place = [], 0
        for token in control.finditer(text.text):
            if not any(start <= token.start() < stop for start, stop in text.own):
                ids += ids_of([text.text[place : token.start()]], tokenizer, label)[0]
                ids.append(tokenizer.convert_tokens_to_ids(token[0]))
                place = token.end()
        found[row] = ids + ids_of([text.text[place:]], tokenizer, label)[0]
    return found


def _straddled(text: Written, ids: list[int], own: list[int], tokenizer: Any) -> int:
    """Where the answer begins in a row that its prompt's own ids do not begin: at the piece that reaches beyond it."""
    if tokenizer.is_fast:
        spans = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if spans["input_ids"] == ids:
            return next((i for i, (_, stop) in enumerate(spans["offset_mapping"]) if stop > text.start), len(ids))
    same = [a == b for a, b in zip(ids, own, strict=False)]
    return same.index(False) if False in same else len(same)

"""Conversations as rows of instruction files: LLaVA's and ShareGPT's "conversations", OpenAI's and TRL's "messages".

| form | turns | speakers |
|---|---|---|
| LLaVA, ShareGPT | "conversations": [{"from", "value"}, ...] | human or user, gpt or assistant, system |
| OpenAI, TRL | "messages": [{"role", "content"}, ...] | user, assistant, system or developer |

A system turn stands first, then questions and answers alternate. A content is a text, or a list of parts: texts, and at
most one picture, which either names its file or stands for the row's "image".
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eim_jax.data.datasets.instruct_fields import (
    MARKER,
    BadRowError,
    Row,
    answer_text,
    encodable,
    history_of,
    picture_of,
    question_text,
    system_of,
    text_of,
)
from eim_jax.data.datasets.instruct_prompt import Question


class Turns(NamedTuple):
    """How a form writes its turns; `speakers` are the names of (who asks, who answers, the system), the first usual."""

    key: str
    speaker: str
    text: str
    speakers: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


CONVERSATIONS = Turns("conversations", "from", "value", (("human", "user"), ("gpt", "assistant"), ("system",)))
MESSAGES = Turns("messages", "role", "content", (("user",), ("assistant",), ("system", "developer")))
_PICTURE_PARTS = {"image": ("image", "path", "url"), "image_url": ("image_url",)}


def take(record: Mapping[str, Any], form: Turns) -> Row:
    """Returns what a row of conversations holds.

    Raises:
      BadRowError: another form, naming the turn.
    """
    turns = record[form.key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        fields = f'{{"{form.speaker}", "{form.text}"}}'
        raise BadRowError(f'"{form.key}" must be a list of {fields}, with at least one pair')
    turns, named = _plain_contents(turns, form)
    image, system = _one_picture(picture_of(record), named), system_of(record)
    begin = int(turns[0].get(form.speaker) in form.speakers[2])
    if begin:
        at = f'"{form.key}"[0]'
        if system:
            raise BadRowError(f'{at} is a system turn beside the row\'s "system": keep one of the two')
        system = answer_text(text_of(turns[0], form.text, f'{at} "{form.text}"'), at).strip()
    pairs, history = _pairs(turns, begin, form, image), history_of(record, image)
    return Row(image, pairs, dialogue=True, system=system, history=history)


def _pairs(
    turns: Sequence[Mapping[str, Any]], begin: int, form: Turns, image: str | None
) -> tuple[tuple[Question, str], ...]:
    texts = []
    usual = f'"{form.speakers[0][0]}", "{form.speakers[1][0]}"'
    for number, turn in enumerate(turns[begin:], begin):
        at, answers = f'"{form.key}"[{number}]', (number - begin) % 2
        if turn.get(form.speaker) not in form.speakers[answers]:
            raise BadRowError(f"{at} is from {turn.get(form.speaker)!r}: turns must alternate {usual}")
        _no_calls(turn, at)
        value = text_of(turn, form.text, f'{at} "{form.text}"')
        texts.append(answer_text(value, at) if answers else question_text(value, image, at))
        if not texts[-1].strip():
            raise BadRowError(f"{at} has nothing but the marker {MARKER}")
    if len(texts) % 2 or not texts:
        raise BadRowError(f'"{form.key}"[{len(turns) - 1}] has no answer from "{form.speakers[1][0]}"')
    return tuple(zip(map(Question, texts[::2]), texts[1::2], strict=True))


def _no_calls(turn: Mapping[str, Any], at: str) -> None:
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise BadRowError(f'{at} has "{key}": calls of tools are not read')


def _plain_contents(turns: Sequence[Mapping[str, Any]], form: Turns) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The turns with contents that are lists of parts as texts with markers, and the files that the parts name."""
    plain, named = [], []
    for number, turn in enumerate(turns):
        if form is MESSAGES and isinstance(turn.get(form.text), list):
            text, files = _joined(turn[form.text], f'"{form.key}"[{number}] "{form.text}"')
            turn = {**turn, form.text: text}
            named += files
        plain.append(turn)
    return plain, named


def _joined(parts: Sequence[Any], at: str) -> tuple[str, list[str]]:
    texts, named = [], []
    for number, part in enumerate(parts):
        where, kind = f"{at}[{number}]", part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(text_of(part, "text", f'{where} "text"'))
        elif kind in _PICTURE_PARTS:
            texts.append(MARKER)
            named += _named(part, _PICTURE_PARTS[kind], where)
        else:
            raise BadRowError(f"{where} is neither a text nor a picture: its type is {kind!r}")
    return "\n".join(texts), named


def _named(part: Mapping[str, Any], keys: Sequence[str], where: str) -> list[str]:
    for key in keys:
        name = part.get(key)
        name = name.get("url") if isinstance(name, dict) else name
        if name is None:
            continue
        if not isinstance(name, str) or not name.strip():
            raise BadRowError(f'{where} "{key}" must be the name of one file, not {name!r:.60}')
        if name.startswith(("http:", "https:", "data:")):
            raise BadRowError(
                f'{where} "{key}" is {name[:40]!r}: pictures are read from files; save it and give its name'
            )
        return [encodable(name.removeprefix("file://"), f'{where} "{key}"')]
    return []


def _one_picture(own: str | None, named: Sequence[str]) -> str | None:
    names = list(dict.fromkeys([*([own] if own is not None else []), *named]))
    if len(names) > 1:
        raise BadRowError(f"it names {len(names)} pictures, {', '.join(map(repr, names[:3]))}: a row is about one")
    return names[0] if names else None

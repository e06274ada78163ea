"""The rows of instruction files: every form is told by its keys, checked and taken apart; FORMS is the table."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from eim_jax.data.datasets import instruct_dialogue, instruct_lavin, instruct_tables, instruct_vqa
from eim_jax.data.datasets.instruct_fields import (
    MARKER,
    BadRowError,
    Row,
    answer_text,
    encodable,
    history_of,
    no_other_marker,
    picture_of,
    question_text,
    system_of,
    text_of,
)
from eim_jax.data.datasets.instruct_prompt import Question
from eim_jax.data.text_files import parse_json, read_text

# What a row would lose in silence: these are refused where they hold something.
_REFUSED = {
    "video": "videos are not read",
    "videos": "videos are not read",
    "audio": "sounds are not read",
    "audios": "sounds are not read",
}


def read_rows(path: Any, cache: Any = None) -> list[tuple[str, Any]]:
    """Returns (where it stands, row) of every row of a source, unchecked.

    That is a JSON list, JSON Lines, LaVIN's {"all": [...]}, VQAv2's questions, or a table (instruct_tables.py), whose
    pictures `cache` keeps.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not UTF-8 or not JSON; the byte or the line is named.
    """
    if instruct_tables.is_table(path):
        return instruct_tables.read_rows(path, cache)
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no instruction file {path}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    whole = instruct_lavin.is_all_data(text)
    if whole or text.lstrip().startswith("["):
        try:
            records = instruct_lavin.rows(parse_json(text)) if whole else parse_json(text)
            return [(f"{path.name} row {place}", record) for place, record in enumerate(records)]
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
    if instruct_vqa.is_questions(content := _whole(text)):
        return instruct_vqa.rows(path, content)
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            found.append((f"{path.name} line {number}", parse_json(line)))
        except ValueError as error:
            hint = "the file must be a JSON list of rows, or JSON Lines: one row a line"
            raise ValueError(f"{path} line {number} is not JSON: {error}; {hint}") from error
    return found


def _whole(text: str) -> Any:
    """A file's one object over several lines, or on its only one; None where there are rows a line."""
    first, _, rest = text.strip().partition("\n")
    if rest and first.rstrip().endswith("}"):
        return None
    try:
        return parse_json(text)
    except ValueError:
        return None


def unread_keys(record: Any) -> list[str]:
    """Returns the keys of a row that no form has; what they hold is not read.

    >>> unread_keys({"instruction": "a", "output": "b", "text": "ab"})
    ['text']
    """
    if not isinstance(record, dict):
        return []
    form = form_of(record)
    known = set(record) if form is None else form.keys
    return [key for key in record if key not in known and key not in _REFUSED]


def take_apart(record: Any) -> Row:
    """Returns what a row of any of the forms holds.

    Raises:
      BadRowError: it has none of the forms; a text is missing, empty or undecodable; it holds what a sample cannot: a
        video, several pictures, a marker in an answer or without a picture.
    """
    if not isinstance(record, dict):
        raise BadRowError(f"is not an object but {type(record).__name__}")
    for key, remedy in _REFUSED.items():
        if record.get(key):
            raise BadRowError(f'"{key}" is not read: {remedy}, or remove it')
    form = form_of(record)
    if form is None:
        *most, last = (f"{form.asks} ({form.name})" for form in (*FORMS[1:], FORMS[0]))
        keys = ", ".join(map(repr, record)) or "none"
        raise BadRowError(f"has neither {', '.join(most)} nor {last}; its keys are {keys}")
    return form.take(record)


def _lavin(record: Mapping[str, Any]) -> Row:
    """A row of all_data.json, whose instruction is the whole prompt, to the last space."""
    for key in ("system", "history"):
        if record.get(key):
            raise BadRowError(f'"{key}" cannot be put into a prompt that is already made: write it there, or remove it')
    problem, image = instruct_lavin.image_of(record)
    if problem:
        raise BadRowError(problem)
    prompt = text_of(record, "instruction", '"instruction"')
    no_other_marker(prompt, '"instruction"')
    if MARKER in prompt:
        raise BadRowError(f'"instruction" has the marker {MARKER}, which a prompt that is already made cannot place')
    said = answer_text(text_of(record, "answer", '"answer"'), '"answer"')
    return Row(None if image is None else encodable(image, '"image"'), ((Question(prompt), said),), prompted=True)


def _alpaca(record: Mapping[str, Any]) -> Row:
    return Row(picture_of(record), (_pair(record, record, ""),), **_before(record))


def _before(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"system": system_of(record), "history": history_of(record, picture_of(record))}


def _pair(record: Mapping[str, Any], pair: Mapping[str, Any], at: str) -> tuple[Question, str]:
    image = picture_of(record)
    instruction = text_of(record, "instruction", '"instruction"')
    extra = pair.get("input")
    extra = "" if extra is None else extra
    if not isinstance(extra, str):
        raise BadRowError(f'{at}"input" is not a text but {type(extra).__name__}')
    encodable(extra, f'{at}"input"')
    if MARKER in instruction and MARKER in extra:
        raise BadRowError(f'"instruction" and {at}"input" have the marker {MARKER}: a row is about one picture')
    parts = question_text(instruction, image, '"instruction"'), question_text(extra, image, f'{at}"input"')
    if not any(part.strip() for part in parts):
        raise BadRowError(f'"instruction" has nothing but the marker {MARKER}')
    asked = Question(*parts) if parts[0] else Question(parts[1])  # the marker was all that the instruction held
    return asked, answer_text(text_of(pair, "output", f'{at}"output"'), f'{at}"output"')


def _instances(record: Mapping[str, Any]) -> Row:
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(pair, dict) for pair in instances):
        raise BadRowError('"instances" must be a list of {"input", "output"}, with at least one')
    pairs = tuple(_pair(record, pair, f'"instances"[{number}] ') for number, pair in enumerate(instances))
    return Row(picture_of(record), pairs, **_before(record))


class Form(NamedTuple):
    """A form of rows: how it is called, what a row needs to be one, the keys that are read, and how it is read."""

    name: str
    asks: str
    told_by: Callable[[Mapping[str, Any]], bool]
    keys: frozenset[str]
    take: Callable[[Mapping[str, Any]], Row]


# Keys that are read in every form, or of which nothing is lost; others than these and a form's own are noted.
_EVERYWHERE = {"id", "image", "images", "system", "history"}
# The first that a row's keys tell.
FORMS = (
    Form(
        "LaVIN",
        '"instruction" and "answer" with "image_source"',
        instruct_lavin.is_row,
        frozenset(instruct_lavin.KEYS),
        _lavin,
    ),
    Form(
        "LLaVA",
        '"conversations"',
        lambda record: "conversations" in record,
        frozenset({"conversations"} | _EVERYWHERE),
        functools.partial(instruct_dialogue.take, form=instruct_dialogue.CONVERSATIONS),
    ),
    Form(
        "OpenAI",
        '"messages"',
        lambda record: "messages" in record,
        frozenset({"messages"} | _EVERYWHERE),
        functools.partial(instruct_dialogue.take, form=instruct_dialogue.MESSAGES),
    ),
    Form(
        "self-instruct",
        '"instances"',
        lambda record: "instances" in record,
        frozenset({"instruction", "instances", "name", "is_classification"} | _EVERYWHERE),
        _instances,
    ),
    Form(
        "Alpaca",
        '"instruction" and "output"',
        lambda record: "instruction" in record and "output" in record,
        frozenset({"instruction", "input", "output"} | _EVERYWHERE),
        _alpaca,
    ),
    Form(
        "VQA",
        '"question" and "answer" or "answers"',
        instruct_vqa.is_row,
        frozenset(instruct_vqa.KEYS | _EVERYWHERE),
        instruct_vqa.take,
    ),
)


def form_of(record: Mapping[str, Any]) -> Form | None:
    """Returns the form of a row, None for no known one."""
    return next((form for form in FORMS if form.told_by(record)), None)

"""The rows of instruction files: Alpaca's, LLaVA's, self-instruct's and LaVIN's forms, each checked and taken apart."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from eim_jax.data.bad_items import text_problem
from eim_jax.data.datasets import instruct_lavin, instruct_question
from eim_jax.data.datasets.instruct_prompt import Question
from eim_jax.data.text_files import parse_json, read_text

MARKER = "<image>"  # where LLaVA's questions place the image; our models place it themselves
_OTHER_MARKERS = ("<video>", "<audio>")

# Keys of each form that are read, or of which nothing is lost; any other is noted.
_EVERYWHERE = {"id", "image", "images", "system", "history"}
_KNOWN = {
    "conversations": {"conversations"} | _EVERYWHERE,
    "instances": {"instruction", "instances", "name", "is_classification"} | _EVERYWHERE,
    "instruction": {"instruction", "input", "output"} | _EVERYWHERE,
    instruct_question.FORM: instruct_question.KEYS | _EVERYWHERE,
}
# What a row would lose in silence: these are refused where they hold something.
_REFUSED = {
    "video": "videos are not read",
    "videos": "videos are not read",
    "audio": "sounds are not read",
    "audios": "sounds are not read",
}


class BadRowError(ValueError):
    """Why a row cannot be used, naming the field."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's (question, answer) pairs, about an image file or none; the pairs of a `dialogue` follow each other.

    `system` is the row's own system prompt, `history` the turns that precede all of its pairs. `answers` are all that
    count as right where a row of the plain form is scored, `choices` what it lets choose from.
    """

    image: str | None
    pairs: tuple[tuple[Question, str], ...]
    dialogue: bool = False
    system: str = ""
    history: tuple[tuple[Question, str], ...] = ()
    prompted: bool = False  # the questions are prompts already (LaVIN's all_data.json)
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def read_rows(path: pathlib.Path) -> list[tuple[str, Any]]:
    """Returns (where it stands, row) of every row of a JSON list, JSON Lines or of LaVIN's {"all": [...]}, unchecked.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not UTF-8 or not JSON; the byte or the line is named.
    """
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


def unread_keys(record: Any) -> list[str]:
    """Returns the keys of a row that no form has; what they hold is not read.

    >>> unread_keys({"instruction": "a", "output": "b", "text": "ab"})
    ['text']
    """
    if not isinstance(record, dict):
        return []
    if instruct_lavin.is_row(record):
        return [key for key in record if key not in instruct_lavin.KEYS and key not in _REFUSED]
    known = next((keys for form, keys in _KNOWN.items() if form in record), set(record))
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
    if instruct_lavin.is_row(record):
        return _lavin(record)
    image = _image(record)
    before = {"system": _system(record), "history": _history(record, image)}
    if "conversations" in record:
        return Row(image, _llava(record, image), dialogue=True, **before)
    if "instances" in record:
        return Row(image, _instances(record), **before)
    if "instruction" in record and "output" in record:
        return Row(image, (_pair(record, record, ""),), **before)
    if instruct_question.is_row(record):
        return _plain(record, image, before)
    raise BadRowError(
        'has neither "conversations" (LLaVA), "instances" (self-instruct), "instruction" and "output" (Alpaca), '
        '"question" and "answer" or "answers" nor "instruction" and "answer" (LaVIN); '
        f"its keys are {', '.join(map(repr, record)) or 'none'}"
    )


def _image(record: Mapping[str, Any]) -> str | None:
    """The row's one picture, from "image" or a list "images" of one; None where both are absent or null."""
    image, several = record.get("image"), record.get("images")
    if image is not None and (not isinstance(image, str) or not image.strip()):
        raise BadRowError(f'"image" must be the name of one file, not {image!r}')
    listed = [several] if isinstance(several, str) else [] if several is None else several
    if not isinstance(listed, list) or not all(isinstance(name, str) and name.strip() for name in listed):
        raise BadRowError(f'"images" must be a list of the name of one file, not {several!r}')
    names = set(listed) | ({image} - {None})
    if len(names) > 1 or len(listed) > 1:
        raise BadRowError(f'"images" names {max(len(names), len(listed))} pictures: a row is about one')
    found = next(iter(names), None)
    return None if found is None else _encodable(found, '"image"' if image is not None else '"images"')


def _system(record: Mapping[str, Any]) -> str:
    text = record.get("system") or ""
    if not isinstance(text, str):
        raise BadRowError(f'"system" is not a text but {type(text).__name__}')
    return _answer(_encodable(text, '"system"'), '"system"').strip()


def _history(record: Mapping[str, Any], image: str | None) -> tuple[tuple[Question, str], ...]:
    """The turns before a row's own, [[question, answer], ...]."""
    turns = record.get("history") or ()
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BadRowError('"history" must be a list of [question, answer]')
    found = []
    for number, pair in enumerate(turns):
        at, texts = f'"history"[{number}]', dict(enumerate(pair))
        asked, answered = (_text(texts, side, f"{at}[{side}]") for side in (0, 1))
        found.append((Question(_question(asked, image, f"{at}[0]")), _answer(answered, f"{at}[1]")))
        if not found[-1][0].instruction.strip():
            raise BadRowError(f"{at}[0] has nothing but the marker {MARKER}")
    return tuple(found)


def _question(text: str, image: str | None, label: str) -> str:
    """A question without its picture's marker, and where there was one without the line break beside it."""
    _no_other_marker(text, label)
    if text.count(MARKER) > 1:
        raise BadRowError(f"{label} has the marker {MARKER} {text.count(MARKER)} times: a row is about one picture")
    if MARKER in text and image is None:
        raise BadRowError(f'{label} has the marker {MARKER}, but the row has no "image"')
    return text.replace(MARKER, "").strip() if MARKER in text else text


def _answer(text: str, label: str) -> str:
    _no_other_marker(text, label)
    if MARKER in text:
        raise BadRowError(f"{label} has the marker {MARKER}: an answer is text alone")
    return text


def _no_other_marker(text: str, label: str) -> None:
    for marker in _OTHER_MARKERS:
        if marker in text:
            raise BadRowError(f"{label} has the marker {marker}, which is not read")


def _text(record: Mapping[Any, Any], key: Any, label: str) -> str:
    """Returns a text that is there, is not blank, and can be encoded."""
    if key not in record:
        raise BadRowError(f"{label} is missing")
    if not isinstance(record[key], str):
        raise BadRowError(f"{label} is not a text but {type(record[key]).__name__}")
    if not record[key].strip():
        raise BadRowError(f"{label} is empty")
    return _encodable(record[key], label)


def _encodable(text: str, label: str) -> str:
    problem = text_problem(text)
    if problem:
        raise BadRowError(f"{label} {problem}")
    return text


def _lavin(record: Mapping[str, Any]) -> Row:
    """A row of all_data.json, whose instruction is the whole prompt, to the last space."""
    for key in ("system", "history"):
        if record.get(key):
            raise BadRowError(f'"{key}" cannot be put into a prompt that is already made: write it there, or remove it')
    problem, image = instruct_lavin.image_of(record)
    if problem:
        raise BadRowError(problem)
    prompt = _text(record, "instruction", '"instruction"')
    _no_other_marker(prompt, '"instruction"')
    if MARKER in prompt:
        raise BadRowError(f'"instruction" has the marker {MARKER}, which a prompt that is already made cannot place')
    answer = _answer(_text(record, "answer", '"answer"'), '"answer"')
    return Row(None if image is None else _encodable(image, '"image"'), ((Question(prompt), answer),), prompted=True)


def _plain(record: Mapping[str, Any], image: str | None, before: Mapping[str, Any]) -> Row:
    """A row of the plain form: a question with its answers, or with choices."""
    try:
        found = instruct_question.plain(record, _text)
    except BadRowError:
        raise
    except ValueError as problem:
        raise BadRowError(str(problem)) from problem
    asked = _question(found.question, image, '"question"')
    if not asked.strip():
        raise BadRowError(f'"question" has nothing but the marker {MARKER}')
    for number, answer in enumerate((found.answer, *found.answers, *found.choices)):
        _answer(answer, '"answer"' if not number else "an answer or a choice")
    pair = Question(asked, instruct_question.options_text(found.choices)), found.answer
    return Row(image, (pair,), answers=found.answers, choices=found.choices, **before)


def _pair(record: Mapping[str, Any], pair: Mapping[str, Any], at: str) -> tuple[Question, str]:
    image = _image(record)
    instruction = _text(record, "instruction", '"instruction"')
    extra = pair.get("input")
    extra = "" if extra is None else extra
    if not isinstance(extra, str):
        raise BadRowError(f'{at}"input" is not a text but {type(extra).__name__}')
    _encodable(extra, f'{at}"input"')
    if MARKER in instruction and MARKER in extra:
        raise BadRowError(f'"instruction" and {at}"input" have the marker {MARKER}: a row is about one picture')
    parts = _question(instruction, image, '"instruction"'), _question(extra, image, f'{at}"input"')
    if not any(part.strip() for part in parts):
        raise BadRowError(f'"instruction" has nothing but the marker {MARKER}')
    asked = Question(*parts) if parts[0] else Question(parts[1])  # the marker was all that the instruction held
    return asked, _answer(_text(pair, "output", f'{at}"output"'), f'{at}"output"')


def _instances(record: Mapping[str, Any]) -> tuple[tuple[Question, str], ...]:
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(pair, dict) for pair in instances):
        raise BadRowError('"instances" must be a list of {"input", "output"}, with at least one')
    return tuple(_pair(record, pair, f'"instances"[{number}] ') for number, pair in enumerate(instances))


def _llava(record: Mapping[str, Any], image: str | None) -> tuple[tuple[Question, str], ...]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError('"conversations" must be a list of {"from", "value"}, with at least one pair')
    texts = []
    for number, turn in enumerate(turns):
        at, speaker = f'"conversations"[{number}]', ("human", "gpt")[number % 2]
        if turn.get("from") != speaker:
            raise BadRowError(f'{at} is from {turn.get("from")!r}: turns must alternate "human", "gpt"')
        value = _text(turn, "value", f'{at} "value"')
        if speaker == "gpt":
            texts.append(_answer(value, at))
            continue
        texts.append(_question(value, image, at))
        if not texts[-1].strip():
            raise BadRowError(f"{at} has nothing but the marker {MARKER}")
    if len(texts) % 2:
        raise BadRowError(f'"conversations"[{len(texts) - 1}] has no answer from "gpt"')
    return tuple(zip(map(Question, texts[::2]), texts[1::2], strict=True))

"""The rows of instruction files: Alpaca's, LLaVA's and self-instruct's forms, each row checked and taken apart."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from eim_jax.data.bad_items import text_problem
from eim_jax.data.text_files import parse_json, read_text

MARKER = "<image>"  # where LLaVA's questions place the image; our models place it themselves


class BadRowError(ValueError):
    """Why a row cannot be used, naming the field."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's (question, answer) pairs, about an image file or none; the pairs of a `dialogue` follow each other."""

    image: str | None
    pairs: tuple[tuple[str, str], ...]
    dialogue: bool = False


def read_rows(path: pathlib.Path) -> list[tuple[str, Any]]:
    """Returns (where it stands, row) of every row of a JSON list or of JSON Lines, unchecked.

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
    if text.lstrip().startswith("["):
        try:
            return [(f"{path.name} row {place}", record) for place, record in enumerate(parse_json(text))]
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


def take_apart(record: Any) -> Row:
    """Returns what a row of any of the three forms holds.

    Raises:
      BadRowError: it has none of the forms, or a text is missing, empty or undecodable.
    """
    if not isinstance(record, dict):
        raise BadRowError(f"is not an object but {type(record).__name__}")
    if "conversations" in record:
        return _llava(record)
    if "instances" in record:
        return Row(None, _instances(record))
    if "instruction" in record and "output" in record:
        return Row(None, (_pair(record, record, ""),))
    raise BadRowError(
        'has neither "conversations" (LLaVA), "instances" (self-instruct) nor "instruction" and "output" (Alpaca); '
        f"its keys are {', '.join(map(repr, record)) or 'none'}"
    )


def _text(record: Mapping[str, Any], key: str, label: str) -> str:
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


def _pair(record: Mapping[str, Any], pair: Mapping[str, Any], at: str) -> tuple[str, str]:
    instruction = _text(record, "instruction", '"instruction"')
    extra = pair.get("input")
    extra = "" if extra is None else extra
    if not isinstance(extra, str):
        raise BadRowError(f'{at}"input" is not a text but {type(extra).__name__}')
    parts = instruction.strip(), _encodable(extra, f'{at}"input"').strip()
    return " ".join(filter(None, parts)), _text(pair, "output", f'{at}"output"')


def _instances(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(pair, dict) for pair in instances):
        raise BadRowError('"instances" must be a list of {"input", "output"}, with at least one')
    return tuple(_pair(record, pair, f'"instances"[{number}] ') for number, pair in enumerate(instances))


def _llava(record: Mapping[str, Any]) -> Row:
    image, turns = record.get("image"), record["conversations"]
    if image is not None and (not isinstance(image, str) or not image.strip() or "\0" in image):
        raise BadRowError(f'"image" must be the name of one file, not {image!r}')
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError('"conversations" must be a list of {"from", "value"}, with at least one pair')
    texts = []
    for number, turn in enumerate(turns):
        at, speaker = f'"conversations"[{number}]', ("human", "gpt")[number % 2]
        if turn.get("from") != speaker:
            raise BadRowError(f'{at} is from {turn.get("from")!r}: turns must alternate "human", "gpt"')
        value = _text(turn, "value", f'{at} "value"')
        if speaker == "human" and MARKER in value:
            if image is None:
                raise BadRowError(f'{at} has the marker {MARKER}, but the row has no "image"')
            value = value.replace(MARKER, "")
            if not value.strip():
                raise BadRowError(f"{at} has nothing but the marker {MARKER}")
        texts.append(value.strip() if speaker == "human" else value)
    if len(texts) % 2:
        raise BadRowError(f'"conversations"[{len(texts) - 1}] has no answer from "gpt"')
    return Row(image, tuple(zip(texts[::2], texts[1::2], strict=True)), dialogue=True)

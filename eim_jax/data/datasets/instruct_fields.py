"""What the fields of an instruction row may hold, in all forms: texts, a picture, a system prompt, a history."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from eim_jax.data.bad_items import text_problem
from eim_jax.data.datasets.instruct_prompt import Question

MARKER = "<image>"  # where LLaVA's questions place the image; our models place it themselves
_OTHER_MARKERS = ("<video>", "<audio>")


class BadRowError(ValueError):
    """Why a row cannot be used, naming the field."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's (question, answer) pairs, about an image file or none; the pairs of a `dialogue` follow each other.

    `system` is the row's own system prompt, `history` the turns that precede all of its pairs.
    """

    image: str | None
    pairs: tuple[tuple[Question, str], ...]
    dialogue: bool = False
    system: str = ""
    history: tuple[tuple[Question, str], ...] = ()
    prompted: bool = False  # the questions are prompts already (LaVIN's all_data.json)
    answers: tuple[str, ...] = ()  # all that count as right where the one question is scored
    choices: tuple[str, ...] = ()  # what it lets choose from


def picture_of(record: Mapping[str, Any]) -> str | None:
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
    return None if found is None else encodable(found, '"image"' if image is not None else '"images"')


def system_of(record: Mapping[str, Any]) -> str:
    """The row's own system prompt, "" for none."""
    text = record.get("system") or ""
    if not isinstance(text, str):
        raise BadRowError(f'"system" is not a text but {type(text).__name__}')
    return answer_text(encodable(text, '"system"'), '"system"').strip()


def history_of(record: Mapping[str, Any], image: str | None) -> tuple[tuple[Question, str], ...]:
    """The turns before a row's own, [[question, answer], ...]."""
    turns = record.get("history") or ()
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BadRowError('"history" must be a list of [question, answer]')
    found = []
    for number, pair in enumerate(turns):
        at, texts = f'"history"[{number}]', dict(enumerate(pair))
        asked, answered = (text_of(texts, side, f"{at}[{side}]") for side in (0, 1))
        found.append((Question(question_text(asked, image, f"{at}[0]")), answer_text(answered, f"{at}[1]")))
        if not found[-1][0].instruction.strip():
            raise BadRowError(f"{at}[0] has nothing but the marker {MARKER}")
    return tuple(found)


def question_text(text: str, image: str | None, label: str) -> str:
    """A question without its picture's marker, and where there was one without the line break beside it."""
    no_other_marker(text, label)
    if text.count(MARKER) > 1:
        raise BadRowError(f"{label} has the marker {MARKER} {text.count(MARKER)} times: a row is about one picture")
    if MARKER in text and image is None:
        raise BadRowError(f'{label} has the marker {MARKER}, but the row has no "image"')
    return text.replace(MARKER, "").strip() if MARKER in text else text


def answer_text(text: str, label: str) -> str:
    """An answer, which names no picture."""
    no_other_marker(text, label)
    if MARKER in text:
        raise BadRowError(f"{label} has the marker {MARKER}: an answer is text alone")
    return text


def no_other_marker(text: str, label: str) -> None:
    """Refuses a text that places a video or a sound."""
    for marker in _OTHER_MARKERS:
        if marker in text:
            raise BadRowError(f"{label} has the marker {marker}, which is not read")


def text_of(record: Mapping[Any, Any], key: Any, label: str) -> str:
    """Returns a text that is there, is not blank, and can be encoded."""
    if key not in record:
        raise BadRowError(f"{label} is missing")
    if not isinstance(record[key], str):
        raise BadRowError(f"{label} is not a text but {type(record[key]).__name__}")
    if not record[key].strip():
        raise BadRowError(f"{label} is empty")
    return encodable(record[key], label)


def encodable(text: str, label: str) -> str:
    """A text that files and terminals take."""
    problem = text_problem(text)
    if problem:
        raise BadRowError(f"{label} {problem}")
    return text

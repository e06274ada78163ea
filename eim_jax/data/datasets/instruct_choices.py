"""The choices that a question's row may give, and which of them is right."""

from collections.abc import Mapping
from typing import Any

from eim_jax.data.datasets.instruct_fields import BadRowError, answer_text, text_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choices_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the texts of "choices", () where the row has none.

    Raises:
      BadRowError: they are no list of two or more different texts.
    """
    listed = record.get("choices")
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise BadRowError(f'"choices" must be 2 to {len(LETTERS)} texts, not {type(listed).__name__}')
    texts = dict(enumerate(listed))
    found = tuple(answer_text(text_of(texts, place, at := f'"choices"[{place}]'), at) for place in texts)
    if not 2 <= len(found) <= len(LETTERS):
        raise BadRowError(f'"choices" must be 2 to {len(LETTERS)} texts, not {len(found)}')
    if len(set(map(_folded, found))) < len(found):
        raise BadRowError('"choices" has one text twice')
    return found


def right_choice(record: Mapping[str, Any], choices: tuple[str, ...]) -> str:
    """Returns the choice that a row's "answer" names, by its text or its place; without one, its only "answers".

    Raises:
      BadRowError: it names none of them.
    """
    answer = record.get("answer")
    if type(answer) is int:
        if not 0 <= answer < len(choices):
            raise BadRowError(f'"answer" is {answer}, but the places of "choices" are 0 to {len(choices) - 1}')
        return choices[answer]
    if answer is None and isinstance(record.get("answers"), list) and len(record["answers"]) == 1:
        said = text_of(dict(enumerate(record["answers"])), 0, '"answers"[0]')
    else:
        said = text_of(record, "answer", '"answer"')
    right = [choice for choice in choices if _folded(choice) == _folded(said)]
    if not right:
        raise BadRowError(f'"answer" is {said!a:.60}, none of "choices"')
    return right[0]


def options_text(choices: tuple[str, ...]) -> str:
    """Returns the choices as the question shows them, behind it.

    >>> options_text(("red", "dark blue"))
    'Options: (A) red (B) dark blue'
    """
    return "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _folded(words: str) -> str:
    return words.strip().lower()

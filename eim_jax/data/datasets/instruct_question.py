"""The plain form of a row: a question with its answer, with all answers that people gave, or with choices."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

FORM = "question"  # the key by which a row of this form is known
KEYS = {FORM, "answer", "answers", "choices"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Plain(NamedTuple):
    """What a row of the plain form asks; `answer` is what is trained on, `answers` are all that count as right."""

    question: str
    answer: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]


def is_row(record: Mapping[str, Any]) -> bool:
    """Returns whether a row is of this form: it has a "question" and an "answer" or "answers"."""
    return FORM in record and bool({"answer", "answers"} & set(record))


def plain(record: Mapping[str, Any], text: Callable[[Mapping[Any, Any], Any, str], str]) -> Plain:
    """Takes a row of the plain form apart.

    Args:
      record: {"question", "answer" (a text; with choices also the place of the right one), "answers" (texts, or VQA's
        {"answer": text}), "choices" (texts)}.
      text: (mapping, key, name in messages) -> a text that is there, not blank and encodable.

    Returns:
      The question. Without an "answer" what is trained on is the most frequent of "answers", the first of equals.

    Raises:
      ValueError: a field is of another type, or the answer is none of the choices.
    """
    choices = tuple(_texts(record, "choices", text)) if record.get("choices") is not None else ()
    if choices and not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f'"choices" must be 2 to {len(LETTERS)} texts, not {len(choices)}')
    if len(set(map(_folded, choices))) < len(choices):
        raise ValueError('"choices" has one text twice')
    answers = tuple(_texts(record, "answers", text)) if record.get("answers") is not None else ()
    answer = record.get("answer")
    if choices and type(answer) is int:
        if not 0 <= answer < len(choices):
            raise ValueError(f'"answer" is {answer}, but the places of "choices" are 0 to {len(choices) - 1}')
        answer = choices[answer]
    elif answer is not None or not answers:
        answer = text(record, "answer", '"answer"')
    else:
        answer = Counter(answers).most_common(1)[0][0]
    if choices:
        right = [choice for choice in choices if _folded(choice) == _folded(answer)]
        if not right:
            raise ValueError(f'"answer" is {answer!a:.60}, none of "choices"')
        answer, answers = right[0], (right[0],)
    return Plain(text(record, FORM, '"question"'), answer, answers or (answer,), choices)


def options_text(choices: tuple[str, ...]) -> str | None:
    """Returns the choices as the question shows them, behind it; None where there are none.

    >>> options_text(("red", "dark blue"))
    'Options: (A) red (B) dark blue'
    """
    if not choices:
        return None
    return "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _texts(record: Mapping[str, Any], key: str, text: Callable[[Mapping[Any, Any], Any, str], str]) -> list[str]:
    found = record[key]
    if not isinstance(found, list) or not found:
        raise ValueError(f'"{key}" must be a list of texts, with at least one')
    said = dict(enumerate(one.get("answer") if isinstance(one, dict) and key == "answers" else one for one in found))
    return [text(said, place, f'"{key}"[{place}]') for place in said]


def _folded(words: str) -> str:
    return words.strip().lower()

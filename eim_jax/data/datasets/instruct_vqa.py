"""Questions with short answers: {"image", "question", "answer" or "answers", "choices"}, and VQAv2's pair of files.

Several answers are those of several people: the one that most of them gave is learned (the first of those, where there
are several; VQAv2's own "multiple_choice_answer" where there is one), and all of them are the question's references.
Of choices one is right, named by its text or its place.
"""

import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from eim_jax.data.datasets.instruct_choices import choices_of, options_text, right_choice
from eim_jax.data.datasets.instruct_fields import (
    MARKER,
    BadRowError,
    Row,
    answer_text,
    history_of,
    picture_of,
    question_text,
    system_of,
    text_of,
)
from eim_jax.data.datasets.instruct_prompt import Question
from eim_jax.data.text_files import identifier, read_json

_ASKED = {"question", "question_id", "question_type", "image_id"}
KEYS = frozenset(_ASKED | {"answer", "answers", "answer_type", "multiple_choice_answer", "choices"})


def is_row(record: Mapping[str, Any]) -> bool:
    """Returns whether a row is a question with its answer."""
    return "question" in record and ("answer" in record or "answers" in record)


def take(record: Mapping[str, Any]) -> Row:
    """Returns what such a row holds.

    Raises:
      BadRowError: naming the field.
    """
    image = picture_of(record)
    asked = question_text(text_of(record, "question", '"question"'), image, '"question"')
    if not asked.strip():
        raise BadRowError(f'"question" has nothing but the marker {MARKER}')
    before = {"system": system_of(record), "history": history_of(record, image)}
    if choices := choices_of(record):
        said = right_choice(record, choices)
        pair = Question(asked, options_text(choices)), said
        return Row(image, (pair,), answers=(said,), choices=choices, **before)
    answers = _answers(record)
    key = "answer" if record.get("answer") is not None else "multiple_choice_answer"
    if record.get(key) is None:
        said = Counter(answers).most_common(1)[0][0]
    else:
        said = answer_text(text_of(record, key, f'"{key}"'), f'"{key}"')
    return Row(image, ((Question(asked), said),), answers=answers or (said,), **before)


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of "answers", each alone or in an object's "answer"."""
    listed = record.get("answers")
    if listed is None and record.get("answer") is not None:
        return ()
    if not isinstance(listed, list) or not listed:
        raise BadRowError(
            f'"answers" must be a list of texts, or of {{"answer": text}}, with at least one, not {listed!r:.60}'
        )
    found = []
    for number, one in enumerate(listed):
        at = f'"answers"[{number}]'
        one = one if isinstance(one, dict) else {"answer": one}
        found.append(answer_text(text_of(one, "answer", at), at))
    return tuple(found)


def is_questions(content: Any) -> bool:
    """Returns whether a file's content is VQAv2's list of questions (or of annotations)."""
    return isinstance(content, dict) and any(isinstance(content.get(key), list) for key in ("questions", "annotations"))


def rows(path: pathlib.Path, content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns (where it stands, row) of every question of a VQAv2 file, with the answers of the file beside it.

    Args:
      path: the questions' file, "v2_OpenEnded_mscoco_train2014_questions.json", say; the annotations lie in the same
        folder under VQAv2's name for them, "v2_mscoco_train2014_annotations.json".
      content: what it holds.

    Raises:
      ValueError: it is the annotations' file, a question has no id or no annotation, or an annotation no question.
      FileNotFoundError: no annotations.
    """
    if not isinstance(content.get("questions"), list):
        raise ValueError(f'{path} holds "annotations": name the file of the questions, these are found beside it')
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if beside == path or not beside.exists():
        wanted = beside.name if beside != path else "its name must hold 'questions', theirs 'annotations' instead"
        raise FileNotFoundError(f"{path}: no annotations with the answers beside it ({wanted})")
    answers = _by_id(beside, read_json(beside), "annotations")
    found = []
    for number, asked in _by_id(path, content, "questions").items():
        answer = answers.pop(number, None)
        if answer is None:
            raise ValueError(f"{path}: question_id {number} has no annotation in {beside.name}")
        said = {key: answer.get(key) for key in ("answers", "multiple_choice_answer")}
        row = {"id": number, "image": _file(path, content, asked), "question": asked.get("question"), **said}
        found.append((f"{path.name} question_id {number}", row))
    if answers:
        raise ValueError(f"{beside}: question_id {next(iter(answers))} is no question of {path.name}")
    return found


def _by_id(path: pathlib.Path, content: Any, key: str) -> dict[str, Mapping[str, Any]]:
    listed = content.get(key) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise ValueError(f'{path} has no list "{key}"')
    found: dict[str, Mapping[str, Any]] = {}
    for place, one in enumerate(listed):
        number = identifier(one.get("question_id")) if isinstance(one, dict) else None
        if number is None:
            raise ValueError(f'{path}: "{key}"[{place}] has no question_id')
        if number in found:
            raise ValueError(f"{path}: question_id {number} stands twice")
        found[number] = one
    return found


def _file(path: pathlib.Path, content: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The picture's file, as VQA's evaluation code names it."""
    image, subtype = identifier(asked.get("image_id")), content.get("data_subtype")
    if image is None or not image.isdecimal() or not isinstance(subtype, str):
        what = '"data_subtype"' if not isinstance(subtype, str) else f"image_id of question_id {asked['question_id']}"
        raise ValueError(f"{path}: {what} is missing, by which a picture's file is found")
    if content.get("data_type") == "mscoco":
        return f"COCO_{subtype}_{int(image):012d}.jpg"
    return f"{content.get('data_type')}_{subtype}_{int(image):012d}.png"

"""ScienceQA's files as they are read: each problem's fields checked, what is wrong with one named."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from eim_jax.data.bad_items import BadDataError, BadItem, text_problem
from eim_jax.data.datasets.scienceqa_prompt import Problem, fault
from eim_jax.data.text_files import identifier, parse_json, read_text
from eim_jax.utils.files import user_path

PROBLEMS, SPLITS, CAPTIONS = "problems.json", "pid_splits.json", "captions.json"
FILES = (PROBLEMS, SPLITS, CAPTIONS)
_HOME = ("train", "val", "test")  # the splits that name image folders; trainval, minitrain ... draw from them


def read_problems(root: str | os.PathLike[str], split: str) -> dict[str, Problem]:
    """Returns {id: problem} of a split without looking at images or captions; errors as load_scienceqa."""
    problems, bad, _ = read_split(user_path(root), split, {})
    if bad:
        raise BadDataError(f"{root}, split {split!r}", bad)
    return {problem.id: problem for problem in problems}


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Returns a JSON file's object; `what` says what the file is for.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not UTF-8, not JSON, not an object, or a key stands twice (JSON readers silently keep the last).
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: {what}") from None
    try:
        content = parse_json(text, once=True)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: {what}")
    return content


def read_captions(path: pathlib.Path, needed: bool) -> dict[str, Any] | None:
    """Returns captions.json's {id: text}, unchecked, or None where there is no such file."""
    if not path.exists():
        if needed:
            raise FileNotFoundError(
                f"no file {path}, which use_caption needs (the authors keep it one folder above: copy it here)"
            )
        return None
    captions = read_object(path, "the machine captions of the images").get("captions")
    if not isinstance(captions, dict):
        raise ValueError(f'{path}: needs an object "captions" of texts by problem id')
    return captions


def read_split(root: pathlib.Path, split: str, captions: Mapping[str, Any]) -> tuple[list[Problem], list[BadItem], int]:
    """Returns the good problems of a split, the bad items, and how many ids the split lists."""
    records = read_object(root / PROBLEMS, "ScienceQA's problems by id")
    splits = read_object(root / SPLITS, "ScienceQA's ids by split")
    if split not in splits:
        raise ValueError(f"split {split!r}: {root / SPLITS} has {', '.join(splits) or 'none'}")
    if not isinstance(splits[split], list) or not splits[split]:
        raise ValueError(f"{root / SPLITS}: {split!r} needs a list of at least one problem id")
    homes = {
        identifier(listed): home for home in _HOME if isinstance(splits.get(home), list) for listed in splits[home]
    }
    problems: list[Problem] = []
    bad: list[BadItem] = []
    seen: set[str] = set()
    for place, listed in enumerate(splits[split]):
        name = identifier(listed)
        where = f"{SPLITS} {split}[{place}]"
        if name is None:
            bad.append(BadItem("problem", str(listed), where, "an id is a text"))
            continue
        if problem := text_problem(name):
            bad.append(BadItem("problem", name, where, f"the id {problem}"))
        elif name in seen:
            bad.append(BadItem("problem", name, where, "the id is listed twice"))
        elif name not in records:
            bad.append(BadItem("problem", name, where, f"{PROBLEMS} has no such id"))
        else:
            try:
                problems.append(_problem(name, records[name], homes.get(name), captions.get(name, "")))
            except _FieldError as error:
                bad.append(BadItem("problem", name, error.file, str(error)))
        seen.add(name)
    return problems, bad, len(splits[split])


class _FieldError(Exception):
    """What is wrong with a field of a problem, and the file that holds it."""

    def __init__(self, field: str, problem: str, file: str = PROBLEMS):
        super().__init__(f"{field}: {problem}" if field else problem)
        self.file = file


def _problem(identifier: str, record: Any, home: str | None, caption: Any) -> Problem:
    if not isinstance(record, dict):
        raise _FieldError("", f"needs an object of fields, not {_named(record)}")
    missing = [field for field in ("question", "choices", "answer") if record.get(field) is None]
    if missing:
        raise _FieldError(", ".join(missing), "missing")
    question, choices, answer = _text(record, "question"), record["choices"], record["answer"]
    if not isinstance(choices, list):
        raise _FieldError("choices", f"needs a list of texts, not {_named(choices)}")
    choices = tuple(_checked(f"choices[{k}]", choice) for k, choice in enumerate(choices))
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise _FieldError("answer", f"needs the index of a choice, not {_named(answer)}")
    wrong = fault(question, len(choices), answer)
    if wrong is not None:
        raise _FieldError("", wrong)
    image = _text(record, "image") or None
    if image is not None:
        home = _text(record, "split") or home
        if not home:
            raise _FieldError(
                "split", f"missing, and no {SPLITS} list of {', '.join(_HOME)} has it: where its image is"
            )
        image = f"{home}/{identifier}/{image}"
    return Problem(
        id=identifier,
        question=question,
        choices=choices,
        answer=answer,
        hint=_text(record, "hint"),
        image=image,
        subject=_text(record, "subject") or None,
        grade=_text(record, "grade") or None,
        topic=_text(record, "topic") or None,
        category=_text(record, "category") or None,
        skill=_text(record, "skill") or None,
        lecture=_text(record, "lecture"),
        solution=_text(record, "solution"),
        caption=_checked("captions", caption, CAPTIONS).strip(),
    )


def _text(record: Mapping[str, Any], field: str) -> str:
    """Returns a text field; "" where it is absent or null."""
    value = record.get(field)
    return "" if value is None else _checked(field, value)


def _checked(field: str, value: Any, file: str = PROBLEMS) -> str:
    if not isinstance(value, str):
        raise _FieldError(field, f"needs a text, not {_named(value)}", file)
    problem = text_problem(value)
    if problem:
        raise _FieldError(field, problem, file)
    return value


def _named(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

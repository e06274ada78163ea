"""MME's yes/no questions as the official release lays them out: a folder a subtask, two questions an image."""

import dataclasses
import os
import pathlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eim_jax.data.bad_items import BadDataError, BadItem, check_on_bad, text_problem
from eim_jax.data.datasets.instruct_prompt import prompt
from eim_jax.data.image_checks import check_images
from eim_jax.data.samples import FileImages, ImageSource, Sample, Split
from eim_jax.data.text_files import decode
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path

# Subtask: images in the release; each has two questions, 2,374 in all.
PERCEPTION = {
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "posters": 147,
    "celebrity": 170,
    "scene": 200,
    "landmark": 200,
    "artwork": 200,
    "OCR": 20,
}
COGNITION = {"commonsense_reasoning": 70, "numerical_calculation": 20, "text_translation": 20, "code_reasoning": 20}
TASKS = {**PERCEPTION, **COGNITION}

_IMAGES, _QUESTIONS = "images", "questions_answers_YN"
_NOT_TASKS = ("eval_tool",)  # the scoring tool, which people unpack beside the subtasks
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One question about one image: `image` is its file name inside the subtask, `answer` "Yes" or "No"."""

    task: str
    image: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True, eq=False)
class YesNoSplit(Split):
    """A split that also knows the question behind each sample, `questions[sample id]`."""

    questions: Mapping[str, Question] = dataclasses.field(default_factory=dict)
    task: str = dataclasses.field(default="yes_no", kw_only=True)


@dataclasses.dataclass(frozen=True)
class MMEReport:
    """What loading found: bad items, what was left out for them, and notes where this is not the whole release."""

    bad: tuple[BadItem, ...]
    dropped_images: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the notes and the bad items, a line each."""
        lines = [*self.notes, *map(str, self.bad)]
        if self.bad:
            lines.insert(0, f"left out {self.dropped_images} images with their questions")
        return "\n  ".join(lines) or "the whole release"


class YesNo(NamedTuple):
    """A split and what was wrong with its source."""

    split: YesNoSplit
    report: MMEReport


def yes_no_split(name: str, questions: Sequence[Question], images: ImageSource, template: str = "plain") -> YesNoSplit:
    r"""Returns one sample a question, "Instruction: {question}\nResponse:" and the answer, with id task/image/0 or 1.

    Raises:
      ValueError: an image (its id in `images` is "task/image") is not there, or has not one question whose answer is
        Yes and one whose answer is No.
    """
    row_of = {identifier: row for row, identifier in enumerate(images.ids)}
    answers: dict[str, list[str]] = {}
    samples, by_id = [], {}
    for question in questions:
        image = f"{question.task}/{question.image}"
        if image not in row_of:
            raise ValueError(f"split {name!r}: a question asks about the image {image}, which is not there")
        earlier = answers.setdefault(image, [])
        identifier = f"{image}/{len(earlier)}"
        earlier.append(question.answer)
        samples.append(Sample(identifier, row_of[image], prompt(question.question, template=template), question.answer))
        by_id[identifier] = question
    for image, given in answers.items():
        if sorted(given) != ["No", "Yes"]:
            raise ValueError(f"split {name!r}: the answers about {image} are {given}: each image needs one Yes, one No")
    return YesNoSplit(name, tuple(samples), images, questions=by_id)


def load_mme(
    root: str | os.PathLike[str],
    *,
    name: str = "test",
    template: str = "plain",
    on_bad: str = "error",
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
) -> YesNo:
    """Returns the questions of the subtasks under `root` (the official order; in it, by file name), and a report.

    A subtask's folder has its images and {image's stem}.txt side by side, or in images/ and questions_answers_YN/. A
    txt has two lines "question<tab>Yes" or "...<tab>No", one of each; blank lines do not count. Every image is decoded
    once (image_checks.py; `cache` remembers the verdict). `template` words the questions (instruct_prompt). Some
    subtasks are enough: the report notes the others, and where a subtask has another number of images than the release,
    or images without questions.

    Raises:
      BadDataError: a txt is malformed (its line is named), or an image is missing or unreadable; all are listed.
        on_bad="drop" leaves those images out instead, with both questions: the scores are then another benchmark's.
      ValueError: a folder is no subtask (but eval_tool).
    """
    check_on_bad(on_bad)
    root = user_path(root)
    questions: list[Question] = []
    files: dict[str, str] = {}
    bad: list[BadItem] = []
    notes: list[str] = []
    tasks = _tasks(root)
    for task in tasks:
        _read_task(root, task, questions, files, bad, notes)
    listed = FileImages(root, list(files), list(files.values()))
    problems = check_images(listed, threads, cache)
    bad.extend(BadItem("image", listed.ids[row], listed.names[row], problems[row]) for row in sorted(problems))
    if bad and on_bad == "error":
        raise BadDataError(str(root), bad)

    broken = {listed.ids[row] for row in problems}
    kept = [question for question in questions if f"{question.task}/{question.image}" not in broken]
    if not kept:
        raise ValueError(f"{root}: no questions are left; {len(bad)} bad items")
    ids = [identifier for identifier in files if identifier not in broken]
    split = yes_no_split(name, kept, FileImages(root, ids, [files[identifier] for identifier in ids]), template)
    counts = Counter(identifier.partition("/")[0] for identifier in ids)
    for task in tasks:
        if counts[task] != TASKS[task]:
            notes.append(f"{task}: {counts[task]} images, the release has {TASKS[task]}")
    if len(tasks) < len(TASKS):
        notes.append(f"missing subtasks: {', '.join(task for task in TASKS if task not in tasks)}")
    report = MMEReport(tuple(bad), len({item.id for item in bad}), tuple(notes))
    if bad or notes:
        console.print(f"{root}: {report}", soft_wrap=True, markup=False)
    return YesNo(split, report)


def _tasks(root: pathlib.Path) -> list[str]:
    """Returns the subtasks that `root` has, in the official order."""
    if not root.is_dir():
        raise FileNotFoundError(f"no MME folder {root}")
    folders = {
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
    }
    unknown = sorted(folders - set(TASKS) - set(_NOT_TASKS))
    if unknown or not folders & set(TASKS):
        found = f"{unknown[0]!r} is no subtask of MME" if unknown else "no subtask of MME is there"
        raise ValueError(f"{root}: {found}. Give the folder that holds only the subtasks' folders: {', '.join(TASKS)}")
    return [task for task in TASKS if task in folders]


def _read_task(
    root: pathlib.Path,
    task: str,
    questions: list[Question],
    files: dict[str, str],
    bad: list[BadItem],
    notes: list[str],
) -> None:
    """Adds a subtask's questions, its images {task/image: file under root}, bad items and notes."""
    parts = [part for part in (_IMAGES, _QUESTIONS) if (root / task / part).is_dir()]
    if len(parts) == 1:
        raise ValueError(f"{root / task} has {parts[0]}/ alone: it needs {_IMAGES}/ and {_QUESTIONS}/, or neither")
    pictures, texts = (f"{task}/{_IMAGES}", f"{task}/{_QUESTIONS}") if parts else (task, task)
    by_stem = defaultdict(list)
    for file in _files(root / pictures):
        if file.suffix.lower() in _ENDINGS:
            by_stem[_one_form(file.stem)].append(file.name)
    asked = [file for file in _files(root / texts) if file.suffix == ".txt"]
    if not asked:
        raise ValueError(f"{root / texts} has no .txt with questions")
    for file in asked:
        identifier, where = f"{task}/{file.stem}", f"{texts}/{file.name}"
        images = by_stem.pop(_one_form(file.stem), [])
        try:
            pairs = _pairs(file)
        except _BadTextError as error:
            bad.append(BadItem("questions", identifier, where, str(error)))
            continue
        if not images:
            bad.append(
                BadItem("image", identifier, where, f"no such file: {root / pictures / file.stem}.jpg, .png, ...")
            )
        elif len(images) > 1:
            bad.append(BadItem("image", identifier, where, f"more than one image goes by this name: {images}"))
        else:
            questions.extend(Question(task, images[0], text, answer) for text, answer in pairs)
            files[f"{task}/{images[0]}"] = f"{pictures}/{images[0]}"
    unasked = sorted(name for names in by_stem.values() for name in names)
    if unasked:
        shown = ", ".join(unasked[:5]) + (", ..." if len(unasked) > 5 else "")
        notes.append(f"{task}: {len(unasked)} images have no questions and are not used: {shown}")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))


def _one_form(name: str) -> str:
    """A name by which an image and its txt find each other, in whichever Unicode form an archive stored them."""
    return unicodedata.normalize("NFC", name)


class _BadTextError(Exception):
    """Why a txt cannot be used."""


def _pairs(file: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the two (question, "Yes" or "No") of a txt."""
    try:
        lines = decode(file.read_bytes()).split("\n")
    except ValueError as error:
        raise _BadTextError(str(error)) from error
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if problem := text_problem(line):
            raise _BadTextError(f"line {number}: it {problem}")
        if len(pairs) == 2:
            raise _BadTextError(f"line {number}: a third question; an image has two")
        question, *answer = (field.strip() for field in line.strip().split("\t"))
        if len(answer) != 1 or answer[0].capitalize() not in ("Yes", "No"):
            raise _BadTextError(f'line {number}: needs "question<tab>Yes" or "question<tab>No", not {line!r}')
        pairs.append((question, answer[0].capitalize()))
        if len(pairs) == 2 and pairs[0][1] == pairs[1][1]:
            raise _BadTextError(f"line {number}: both answers are {pairs[1][1]}; an image has one Yes and one No")
    if len(pairs) < 2:
        raise _BadTextError(f"line {len(lines)}: the file ends after {len(pairs)} of two questions")
    return pairs

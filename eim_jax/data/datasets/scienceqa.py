"""ScienceQA as its authors lay it out: problems.json, pid_splits.json, captions.json, {split}/{id}/image.png."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eim_jax.data.datasets.scienceqa_prompt import Problem, fault, parse_form, prompt
from eim_jax.data.samples import FileImages, ImageSource, Sample, Split
from eim_jax.data.validation import BadDataError, BadItem, check_images
from eim_jax.utils.console import console

_PROBLEMS, _SPLITS, _CAPTIONS = "problems.json", "pid_splits.json", "captions.json"
FILES = (_PROBLEMS, _SPLITS, _CAPTIONS)
_HOME = ("train", "val", "test")  # the splits that name image folders; trainval, minitrain ... draw from them
_SHOWN = 20  # bad items that a report shows; `bad` holds all


@dataclasses.dataclass(frozen=True, eq=False)
class QASplit(Split):
    """A split that also knows the problem behind each sample, `problems[sample id]`."""

    problems: Mapping[str, Problem] = dataclasses.field(default_factory=dict)
    task: str = dataclasses.field(default="options", kw_only=True)


@dataclasses.dataclass(frozen=True)
class QAReport:
    """What loading found: bad items, problems left out for them (`dropped_images` for their image), and notes."""

    bad: tuple[BadItem, ...]
    dropped_images: int
    dropped_problems: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Returns the notes, and the bad items if there are any, a line each."""
        lines = list(self.notes)
        if self.bad:
            lines.append(f"left out {self.dropped_problems:,} problems, {self.dropped_images:,} for their image:")
            lines += [f"  {item}" for item in self.bad[:_SHOWN]]
            if len(self.bad) > _SHOWN:
                lines.append(f"  ... and {len(self.bad) - _SHOWN:,} more")
        return "\n".join(lines) or "no bad items"


class LoadedQA(NamedTuple):
    """A split and what was wrong with its source."""

    split: QASplit
    report: QAReport


def qa_split(
    name: str,
    problems: Sequence[Problem],
    images: ImageSource,
    form: str = "QCM-ALE",
    *,
    use_caption: bool = False,
) -> QASplit:
    """Returns one sample a problem, in order: `prompt` in the form, the image whose id is `problem.image`.

    The sample's caption, which CLIP.text reads for loss_IE, is the machine caption, or without one the question.
    Errors: ValueError for an unknown form, an image that is not there, and repeated ids.
    """
    row_of = {identifier: row for row, identifier in enumerate(images.ids)}
    samples = []
    for problem in problems:
        if problem.image is not None and problem.image not in row_of:
            raise ValueError(f"split {name!r}: problem {problem.id}: image: {problem.image!r} is not among the images")
        row = None if problem.image is None else row_of[problem.image]
        instruction, response = prompt(problem, form, use_caption)
        samples.append(Sample(problem.id, row, instruction, response, problem.caption or problem.question))
    return QASplit(name, tuple(samples), images, problems={problem.id: problem for problem in problems})


def load_scienceqa(
    root: str | os.PathLike[str],
    split: str,
    *,
    form: str = "QCM-ALE",
    use_caption: bool = False,
    on_bad: str = "error",
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
) -> LoadedQA:
    """Returns the problems of a split of pid_splits.json, in its order, as prompts of the form, and a report.

    `form` is input letters and output letters (scienceqa_prompt.prompt); `use_caption` adds captions.json's text to the
    context. Images lie in {root}/images/{split}/{id}/ or {root}/{split}/{id}/, where split is the problem's own (train,
    val, test), and are decoded once (see checks.py; `cache` remembers the verdict). Question, choices and answer are
    required; a problem without "image" is text only. captions.json is optional: it stands beside problems.json.

    Errors: ValueError for files of another form (not UTF-8, not JSON, a key twice), an unknown split, an unknown form,
    `use_caption` without captions; BadDataError listing every bad item: ids that problems.json does not have or that
    are listed twice, wrong fields, missing or unreadable images. on_bad="drop" leaves these problems out instead.
    """
    if on_bad not in ("error", "drop"):
        raise ValueError(f"on_bad is {on_bad!r}: give 'error' or 'drop'")
    parse_form(form)
    root = pathlib.Path(root)
    captions = _read_captions(root / _CAPTIONS, use_caption)
    problems, bad, listed = _read_split(root, split, captions or {})

    shown = [problem for problem in problems if problem.image is not None]
    names = [problem.image for problem in shown]
    folder = _image_folder(root, names)
    files = FileImages(folder, names, names)
    broken = check_images(files, threads, cache)
    bad += [BadItem("image", shown[row].id, names[row], broken[row]) for row in sorted(broken)]
    if bad and on_bad == "error":
        raise BadDataError(f"{root}, split {split!r}", bad)

    unusable = {names[row] for row in broken}
    kept = [problem for problem in problems if problem.image not in unusable]
    if not kept:
        raise ValueError(f"{root}: no problems of split {split!r} are left; {len(bad)} bad items")
    names = [name for name in names if name not in unusable]
    bare = sum(problem.image is not None and not problem.caption for problem in kept)
    notes = []
    if bare:
        why = f"there is no {_CAPTIONS}" if captions is None else f"{_CAPTIONS} has none"
        notes.append(f"{bare:,} of {len(names):,} images without a machine caption ({why}): the question stands in")
    report = QAReport(tuple(bad), len(broken), listed - len(kept), tuple(notes))
    if bad or notes:
        console.print(f"{root}, split {split!r}: {report}", soft_wrap=True)
    return LoadedQA(qa_split(split, kept, FileImages(folder, names, names), form, use_caption=use_caption), report)


def read_problems(root: str | os.PathLike[str], split: str) -> dict[str, Problem]:
    """Returns {id: problem} of a split without looking at images or captions; errors as load_scienceqa."""
    problems, bad, _ = _read_split(pathlib.Path(root), split, {})
    if bad:
        raise BadDataError(f"{root}, split {split!r}", bad)
    return {problem.id: problem for problem in problems}


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Returns a JSON file's object; `what` says what the file is for.

    Errors: FileNotFoundError, and ValueError for a file that is not UTF-8, not JSON, not an object, or where a key
    stands twice (of which JSON readers silently keep the last).
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
        return found

    try:
        content = json.loads(pathlib.Path(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: {what}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: {what}")
    return content


def _read_captions(path: pathlib.Path, needed: bool) -> dict[str, Any] | None:
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


def _read_split(
    root: pathlib.Path, split: str, captions: Mapping[str, Any]
) -> tuple[list[Problem], list[BadItem], int]:
    """Returns the good problems of a split, the bad items, and how many ids the split lists."""
    records = read_object(root / _PROBLEMS, "ScienceQA's problems by id")
    splits = read_object(root / _SPLITS, "ScienceQA's ids by split")
    if split not in splits:
        raise ValueError(f"split {split!r}: {root / _SPLITS} has {', '.join(splits) or 'none'}")
    if not isinstance(splits[split], list) or not splits[split]:
        raise ValueError(f"{root / _SPLITS}: {split!r} needs a list of at least one problem id")
    homes = {
        str(identifier): home for home in _HOME if isinstance(splits.get(home), list) for identifier in splits[home]
    }
    problems: list[Problem] = []
    bad: list[BadItem] = []
    seen: set[str] = set()
    for place, listed in enumerate(splits[split]):
        identifier = str(listed)
        where = f"{_SPLITS} {split}[{place}]"
        if isinstance(listed, bool) or not isinstance(listed, int | str):
            bad.append(BadItem("problem", identifier, where, "an id is a text"))
        elif identifier in seen:
            bad.append(BadItem("problem", identifier, where, "the id is listed twice"))
        elif identifier not in records:
            bad.append(BadItem("problem", identifier, where, f"{_PROBLEMS} has no such id"))
        else:
            try:
                problem = _problem(identifier, records[identifier], homes.get(identifier), captions.get(identifier, ""))
                problems.append(problem)
            except _FieldError as error:
                bad.append(BadItem("problem", identifier, error.file, str(error)))
        seen.add(identifier)
    return problems, bad, len(splits[split])


class _FieldError(Exception):
    """What is wrong with a field of a problem, and the file that holds it."""

    def __init__(self, field: str, problem: str, file: str = _PROBLEMS):
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
                "split", f"missing, and no {_SPLITS} list of {', '.join(_HOME)} has it: where its image is"
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
        caption=_checked("captions", caption, _CAPTIONS).strip(),
    )


def _text(record: Mapping[str, Any], field: str) -> str:
    """Returns a text field; "" where it is absent or null."""
    value = record.get(field)
    return "" if value is None else _checked(field, value)


def _checked(field: str, value: Any, file: str = _PROBLEMS) -> str:
    if not isinstance(value, str):
        raise _FieldError(field, f"needs a text, not {_named(value)}", file)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a character, which no tokenizer takes
        raise _FieldError(field, f"holds half a character, {value[error.start]!a}, at {error.start}", file) from error
    return value


def _named(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _image_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Returns {root}/images or {root}, whichever holds more of the splits' folders; the first where none does."""
    homes = {name.partition("/")[0] for name in names}
    return max((root / "images", root), key=lambda place: sum((place / home).is_dir() for home in homes))

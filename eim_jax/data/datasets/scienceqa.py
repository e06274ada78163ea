"""ScienceQA as its authors lay it out: problems.json, pid_splits.json, captions.json, {split}/{id}/image.png."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eim_jax.config import ConfigError, Data
from eim_jax.data.bad_items import BadDataError, BadItem, check_on_bad, listed
from eim_jax.data.data_set import DataSet, Published, Shards, exists
from eim_jax.data.datasets.instruct_prompt import single_turn
from eim_jax.data.datasets.scienceqa_files import CAPTIONS, FILES, PROBLEMS, read_captions, read_split
from eim_jax.data.datasets.scienceqa_prompt import Problem, is_official, parse_form, prompt
from eim_jax.data.image_checks import check_images
from eim_jax.data.samples import FileImages, ImageSource, Sample, Split
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path

_ROLES = ("train", "val", "test")  # what the three entries of config.data.splits are for


@dataclasses.dataclass(frozen=True, eq=False)
class QASplit(Split):
    """A split that also knows the problem behind each sample, `problems[sample id]`, and the form of its prompts."""

    problems: Mapping[str, Problem] = dataclasses.field(default_factory=dict)
    form: str = "QCM-ALE"
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
            lines += listed(self.bad)
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
    wording: str = "tidy",
) -> QASplit:
    """Returns one sample a problem, in order: `prompt` in the form and wording, the image of id `problem.image`.

    The sample's caption, which CLIP.text reads for loss_IE, is the machine caption, or without one the question.

    Raises:
      ValueError: an unknown form, an image that is not there, or an id that stands twice.
    """
    row_of = {identifier: row for row, identifier in enumerate(images.ids)}
    samples = []
    for problem in problems:
        if problem.image is not None and problem.image not in row_of:
            raise ValueError(f"split {name!r}: problem {problem.id}: image: {problem.image!r} is not among the images")
        row = None if problem.image is None else row_of[problem.image]
        instruction, response = prompt(problem, form, use_caption, wording)
        samples.append(Sample(problem.id, row, instruction, response, problem.caption or problem.question))
    return QASplit(name, tuple(samples), images, problems={problem.id: problem for problem in problems}, form=form)


def load_scienceqa(
    root: str | os.PathLike[str],
    split: str,
    *,
    form: str = "QCM-ALE",
    use_caption: bool = False,
    wording: str = "tidy",
    on_bad: str = "error",
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
) -> LoadedQA:
    """Returns the problems of a split of pid_splits.json, in its order, as prompts of the form, and a report.

    `form` is input letters and output letters (scienceqa_prompt.prompt); `use_caption` adds captions.json's text to the
    context, `wording` says whose strings they are. Images lie in {root}/images/{split}/{id}/ or {root}/{split}/{id}/,
    where split is the problem's own (train, val, test), and are decoded once (image_checks.py; `cache` remembers the
    verdict). Question, choices and answer are required; a problem without "image" is text only. captions.json is
    optional: it stands beside problems.json.

    Raises:
      BadDataError: bad items, all listed: ids that problems.json does not have or that are listed twice, wrong fields,
        missing or unreadable images. on_bad="drop" leaves these problems out instead.
      ValueError: a file of another form (not UTF-8, not JSON, a key twice), an unknown split or form.
      FileNotFoundError: a file is missing, captions.json among them where `use_caption` asks for it.
    """
    check_on_bad(on_bad)
    parse_form(form)
    is_official(wording)
    root = user_path(root)
    captions = read_captions(root / CAPTIONS, use_caption)
    problems, bad, listed = read_split(root, split, captions or {})

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
        why = f"there is no {CAPTIONS}" if captions is None else f"{CAPTIONS} has none"
        notes.append(f"{bare:,} of {len(names):,} images without a machine caption ({why}): the question stands in")
    report = QAReport(tuple(bad), len(broken), listed - len(kept), tuple(notes))
    if bad or notes:
        console.print(f"{root}, split {split!r}: {report}", soft_wrap=True)
    how = {"use_caption": use_caption, "wording": wording}
    return LoadedQA(qa_split(split, kept, FileImages(folder, names, names), form, **how), report)


def _image_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Returns {root}/images or {root}, whichever holds more of the splits' folders; the first where none does."""
    homes = {name.partition("/")[0] for name in names}
    return max((root / "images", root), key=lambda place: sum((place / home).is_dir() for home in homes))


@dataclasses.dataclass(frozen=True)
class ScienceQAFields:
    """The fields of `config.data` that ScienceQA alone reads."""

    folder: str = ""  # scienceqa: the folder of problems.json, pid_splits.json, captions.json and the images
    splits: tuple = ("train", "val", "test")  # scienceqa: which of pid_splits.json train, validate and test
    form: str = "QCM-ALE"  # scienceqa: question, context, multiple choice -> answer, lecture, explanation
    captions_in_context: bool = False  # scienceqa: the machine caption joins the context
    # scienceqa: official (the authors' and LaVIN's strings to the letter) | tidy (no bare "BECAUSE:", single spaces, L
    # the lecture and E the solution in AL and AE too)
    wording: str = "tidy"


def _load(data: Data, own: ScienceQAFields, name: str, cache: pathlib.Path) -> tuple[Split, Sequence[BadItem]]:
    if not own.folder:
        raise ConfigError(
            "config.data.folder is empty: give the folder that holds problems.json, pid_splits.json and the images"
        )
    if len(own.splits) != len(_ROLES) or not all(isinstance(split, str) for split in own.splits):
        raise ConfigError(f"config.data.splits: {own.splits} is not three names, for train, val and test")
    loaded = load_scienceqa(
        own.folder,
        own.splits[_ROLES.index(name)],
        form=own.form,
        use_caption=own.captions_in_context,
        wording=own.wording,
        on_bad=data.on_bad,
        threads=data.threads,
        cache=cache,
    )
    return loaded.split, loaded.report.bad


def _source_files(own: ScienceQAFields) -> dict[str, pathlib.Path]:
    found = {name: user_path(own.folder) / name for name in FILES} if own.folder else {}
    return {name: path for name, path in found.items() if path.exists()}


def _record(split: QASplit, samples: Sequence[Sample]) -> dict[str, Any]:
    fields = dataclasses.asdict(split.problems[samples[0].id])
    fields.pop("image")  # the picture itself stands in the record
    return {name: "" if value is None else value for name, value in fields.items()}


def _prepared_split(own: ScienceQAFields, name: str, index: Mapping[str, Any], images: ImageSource) -> QASplit:
    problems = [Problem(**{**problem, "choices": tuple(problem["choices"])}) for problem in index["problems"]]
    how = {"use_caption": own.captions_in_context, "wording": own.wording}
    return qa_split(name, problems, images, own.form, **how)


SCIENCEQA = DataSet(
    "scienceqa",
    ScienceQAFields,
    _load,
    published=Published(12726, 6218, "ScienceQA's training questions"),
    at_hand=lambda own: exists(own.folder and user_path(own.folder) / PROBLEMS),
    prompt=single_turn,
    shards=Shards(
        folder="scienceqa",
        features={
            **{field.name: str for field in dataclasses.fields(Problem) if field.name != "image"},
            "choices": [str],
            "answer": int,
        },
        record=_record,
        records=lambda split: [(sample.image, [sample]) for sample in split.samples],  # one problem each, in order
        index=lambda split: {"problems": [dataclasses.asdict(split.problems[s.id]) for s in split.samples]},
        split=_prepared_split,
        settings=lambda own: {"splits": list(own.splits)},
        sources=_source_files,
        needs=lambda own: {"captions_in_context": CAPTIONS} if own.captions_in_context else {},
    ),
)

"""Instruction data in the forms people have it: Alpaca's, LLaVA's and self-instruct's, mixed into one split."""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from eim_jax.data.datasets.instruct_rows import BadRowError, Row, read_rows, take_apart
from eim_jax.data.samples import DrawnImages, FileImages, ImageSource, Sample, Split
from eim_jax.data.validation import BadDataError, BadItem, check_images
from eim_jax.utils.console import console

# LLaVA names COCO's images as train2017 does; the same files of 2014 (LaVIN's) carry a prefix.
_COCO_PREFIXES = ("", "COCO_train2014_", "COCO_val2014_")
_SHOWN = 20  # bad items that the summary lists; `bad` holds all


@dataclasses.dataclass(frozen=True)
class InstructReport:
    """What loading found: bad items, what was left out for them (rows of the files), and samples of each source."""

    bad: tuple[BadItem, ...]
    dropped_images: int
    dropped_rows: int
    samples: Mapping[str, int]

    def __str__(self) -> str:
        """Returns a line on the mix, and several more when something was left out."""
        lines = [", ".join(f"{name}: {count:,} samples" for name, count in self.samples.items())]
        if self.bad:
            lines.append(f"left out {self.dropped_rows:,} rows and {self.dropped_images:,} images; bad items:")
            lines += [f"  {item}" for item in self.bad[:_SHOWN]]
            if len(self.bad) > _SHOWN:
                lines.append(f"  ... and {len(self.bad) - _SHOWN:,} more")
        return "\n".join(lines)


class Instructions(NamedTuple):
    """A split and what was wrong with its sources."""

    split: Split
    report: InstructReport


class _Placed(NamedTuple):
    """A good row, and where it comes from: the start of its samples' ids, its place in words, its source's name."""

    id: str
    where: str
    source: str
    row: Row


def prompt(question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    r"""Returns the instruction text of a question, after the (question, answer) turns before it (LaVIN's chatbot form).

    The answer follows without a space, as in LaVIN's training text.

    >>> prompt("And its shape?", [("Which colour is it?", "Red.")])
    'Instruction: Which colour is it?\nResponse:Red.\nInstruction: And its shape?\nResponse:'
    """
    turns = "".join(f"Instruction: {asked}\nResponse:{answer}\n" for asked, answer in earlier)
    return f"{turns}Instruction: {question}\nResponse:"


def load_instruct(
    sources: Sequence[Any] | str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    *,
    name: str = "train",
    multi_turn: bool = False,
    on_bad: str = "error",
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Instructions:
    """Returns the rows of all sources, one after the other, as one split (its order is the files'), and a report.

    A source is a file, or (file, share) with 0 < share <= 1: that share of its rows, drawn by `seed`; a smaller share
    is a part of a larger one. Rows never repeat: a copy would be its own negative in the queues. A file is a JSON list
    or JSON Lines, and each row tells its form by its keys:
      Alpaca         {"instruction", "input" (may be missing, null or ""), "output"}
      LLaVA          {"id", "image" (missing or null: text only), "conversations": [{"from": human|gpt, "value"}, ...]}
      self-instruct  {"id", "instruction", "instances": [{"input", "output"}, ...]}
    `images` is the folder of LLaVA's images (None if no row has one); for "000000000009.jpg" it may hold
    COCO_train2014_000000000009.jpg. Samples of one image share its row. Every image used is decoded
    once (see checks.py; `cache` remembers the verdict).

    Every (human, gpt) pair and every instance is one sample, "Instruction: {instruction} {input}\\nResponse:" and the
    answer as it stands; "<image>" markers go. LaVIN asks each question of a conversation alone; `multi_turn` puts the
    turns before it in front. Sample ids are "{file stem}/{row's id}/{turn}"; a row without an id has its place in the
    file, counted from 0, a later row with the same id "{id}#{place}", a second file of the same stem "{stem}#2".

    Bad items are rows in no known form, with a missing, empty or undecodable text, conversations that do not alternate
    human, gpt, markers without an image, missing or unreadable images. on_bad="error" raises BadDataError listing
    them; "drop" leaves out the whole row (the published Alpaca-52k has rows with an empty output: it needs "drop").
    Errors: ValueError for a file that is not UTF-8 or JSON, a share outside (0, 1], images without a folder, no rows.
    """
    if on_bad not in ("error", "drop"):
        raise ValueError(f"on_bad is {on_bad!r}: give 'error' or 'drop'")
    folder = None if images is None else pathlib.Path(images)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no image folder {folder}")

    placed: list[_Placed] = []
    bad: list[BadItem] = []
    listed = _sources(sources)
    for number, (path, share, stem) in enumerate(listed):
        records = read_rows(path)
        ids = _row_ids(stem, [record for _, record in records])
        for place in _taken(len(records), share, seed, number):
            where, record = records[place]
            try:
                placed.append(_Placed(ids[place], where, stem, take_apart(record)))
            except BadRowError as problem:
                bad.append(BadItem("row", ids[place], where, str(problem)))
    unread = len(bad)

    file_of = _files(placed, folder)
    broken = _broken_images(placed, file_of, folder, threads, cache, bad)
    where = ", ".join(str(path) for path, _, _ in listed)
    if bad and on_bad == "error":
        raise BadDataError(where, bad)
    kept = [item for item in placed if item.row.image is None or file_of[item.row.image] not in broken]
    if not kept:
        raise ValueError(f"{where}: no rows are left; {len(bad)} bad items")
    split = _build(name, kept, file_of, folder, multi_turn)
    counts = {stem: sum(len(item.row.pairs) for item in kept if item.source == stem) for _, _, stem in listed}
    dropped_images = len(set(file_of.values())) - len(split.images)
    report = InstructReport(tuple(bad), dropped_images, unread + len(placed) - len(kept), counts)
    if bad:
        console.print(f"{name}: {report}", soft_wrap=True, markup=False)
    return Instructions(split, report)


def shares(sources: Sequence[Any] | str | os.PathLike[str]) -> list[list[Any]]:
    """Returns [file name, share] of each source: what a mix of files is, wherever they lie."""
    return [[path.name, share] for path, share, _ in _sources(sources)]


def _sources(sources: Sequence[Any] | str | os.PathLike[str]) -> list[tuple[pathlib.Path, float, str]]:
    """Returns (file, share, stem made unique) of each source."""
    listed: list[tuple[pathlib.Path, float, str]] = []
    seen: Counter[str] = Counter()
    for source in [sources] if isinstance(sources, str | os.PathLike) else sources:
        path, share = (source, 1.0) if isinstance(source, str | os.PathLike) else _path_and_share(source)
        if not 0 < share <= 1:
            raise ValueError(f"source {path}: its share is {share}, but must be above 0 and at most 1")
        stem = pathlib.Path(path).stem
        seen[stem] += 1
        listed.append((pathlib.Path(path), share, stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"))
    if not listed:
        raise ValueError("no sources: give at least one instruction file")
    return listed


def _path_and_share(source: Any) -> tuple[Any, float]:
    if isinstance(source, Sequence) and len(source) == 2:
        path, share = source
        if isinstance(path, str | os.PathLike) and isinstance(share, int | float) and not isinstance(share, bool):
            return path, float(share)
    raise ValueError(f"source {source!r}: give a file, or (file, share)")


def _taken(count: int, share: float, seed: int, number: int) -> list[int]:
    """Returns the places of the rows that a share takes, in the file's order; at least one of a file with rows."""
    if share == 1:
        return list(range(count))
    size = max(1, round(share * count))
    return sorted(np.random.default_rng([seed, number]).permutation(count)[:size].tolist())


def _row_ids(stem: str, records: Sequence[Any]) -> list[str]:
    seen: set[str] = set()
    ids = []
    for place, record in enumerate(records):
        own = record.get("id") if isinstance(record, dict) else None
        known = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
        identifier = str(own) if known else str(place)
        if identifier in seen:  # LLaVA's files ask several rows about one image, with one id
            identifier = f"{identifier}#{place}"
        seen.add(identifier)
        ids.append(f"{stem}/{identifier}")
    return ids


def _files(placed: Sequence[_Placed], folder: pathlib.Path | None) -> dict[str, str]:
    """Returns {image as a row names it: its file in the folder}, in order of first use."""
    found: dict[str, str] = {}
    for item in placed:
        image = item.row.image
        if image is None or image in found:
            continue
        if folder is None:
            raise ValueError(f"{item.where}: the row has the image {image!r}; give the folder of the images")
        head, slash, tail = image.rpartition("/")
        names = [f"{head}{slash}{prefix}{tail}" for prefix in _COCO_PREFIXES]
        found[image] = next((name for name in names if os.path.exists(folder / name)), image)
    return found


def _broken_images(
    placed: Sequence[_Placed],
    file_of: Mapping[str, str],
    folder: pathlib.Path | None,
    threads: int,
    cache: str | os.PathLike[str] | None,
    bad: list[BadItem],
) -> set[str]:
    """Returns the files that cannot be used; each joins `bad` with the first row that asks for it."""
    if folder is None or not file_of:
        return set()
    names = list(dict.fromkeys(file_of.values()))
    problems = check_images(FileImages(folder, names, names), threads, cache)
    user: dict[str, _Placed] = {}
    for item in placed:
        if item.row.image is not None:
            user.setdefault(file_of[item.row.image], item)
    for number in sorted(problems):
        first = user[names[number]]
        bad.append(BadItem("image", names[number], f"{first.where}, {first.id}", problems[number]))
    return {names[number] for number in problems}


def _no_image(row: int) -> Image.Image:
    raise ValueError("this split has texts only")


def _build(
    name: str, placed: Sequence[_Placed], file_of: Mapping[str, str], folder: pathlib.Path | None, multi_turn: bool
) -> Split:
    names = list(dict.fromkeys(file_of[item.row.image] for item in placed if item.row.image is not None))
    source: ImageSource = DrawnImages([], _no_image, []) if folder is None else FileImages(folder, names, names)
    row_of = {file: row for row, file in enumerate(names)}
    samples = []
    for item in placed:
        image = None if item.row.image is None else row_of[file_of[item.row.image]]
        for turn, (question, answer) in enumerate(item.row.pairs):
            earlier = item.row.pairs[:turn] if multi_turn and item.row.dialogue else ()
            samples.append(Sample(f"{item.id}/{turn}", image, prompt(question, earlier), answer))
    return Split(name, tuple(samples), source)

"""What a data set says of itself: one object a kind, and how its samples are kept in prepared shards."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eim_jax.config import Data
from eim_jax.config.conversion import build
from eim_jax.data.bad_items import BadItem
from eim_jax.data.samples import ImageSource, Sample, Split
from eim_jax.utils.files import user_path

Turns = Sequence[tuple[str, str]]  # (question, answer) pairs of a conversation


@dataclasses.dataclass(frozen=True)
class Published:
    """How large a data set is as its authors give it, for `--mode=plan` where its files are not at hand."""

    samples: int
    images: int
    what: str  # which data set that is, as the plan's note says it


def records_by_image(split: Split) -> list[tuple[int | None, list[Sample]]]:
    """Puts all samples of an image into one record, in the images' order, then each sample without one.

    Args:
      split: the split to be written.

    Returns:
      (image row or None, its samples) of each record.
    """
    about: list[list[Sample]] = [[] for _ in range(len(split.images))]
    alone: list[Sample] = []
    for sample in split.samples:
        (alone if sample.image is None else about[sample.image]).append(sample)
    return [*enumerate(about), *((None, [sample]) for sample in alone)]


def sample_index(split: Split) -> dict[str, Any]:
    """Returns what the index of prepared shards holds of plain samples: id, image row, instruction and response."""
    return {"samples": [[s.id, s.image, s.instruction, s.response] for s in split.samples]}


def plain_split(own: Any, name: str, index: Mapping[str, Any], images: ImageSource) -> Split:
    """Returns the split that `sample_index` was taken from, over the prepared images."""
    return Split(name, tuple(Sample(*sample) for sample in index["samples"]), images)


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a data set is kept in prepared shards: what a record and the index hold, and the way back to a split.

    A record is what whoever reads the folder with TFDS sees: the picture's bytes, its id and file name, and `features`.
    The index is what training reads: everything but the pictures, as JSON. The defaults suit samples that are an image,
    an instruction and a response.

    Attributes:
      folder: TFDS's name of the data set, and of the folder that holds it.
      features: the form of a record's fields: {name: str | int | [form of an entry] | {name: form}}.
      record: (split, samples of one record) -> its fields.
      records: split -> (image row or None, samples) of each record.
      index: split -> JSON values.
      split: (own fields, split's name, index, images) -> the split, equal to the one that the files give.
      splits: which splits are written.
      from_files: which splits are read from their own files even where the others are prepared.
      settings: own fields -> {field: value} of those that decide what is written, where they are given.
      sources: own fields -> {what: file} of the text files that the config names.
      needs: own fields -> {field: source} that a field's value asks for, e.g. {"captions_in_context": "captions.json"}.
    """

    folder: str
    features: Mapping[str, Any]
    record: Callable[[Any, Sequence[Sample]], dict[str, Any]]
    records: Callable[[Any], list[tuple[int | None, list[Sample]]]] = records_by_image
    index: Callable[[Any], dict[str, Any]] = sample_index
    split: Callable[[Any, str, Mapping[str, Any], ImageSource], Split] = plain_split
    splits: tuple[str, ...] = ("train", "test")
    from_files: tuple[str, ...] = ()
    settings: Callable[[Any], dict[str, Any]] = lambda own: {}
    sources: Callable[[Any], dict[str, Path]] = lambda own: {}
    needs: Callable[[Any], dict[str, str]] = lambda own: {}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One kind of data set: `config.data.kind` names it, DATASETS holds it.

    Attributes:
      name: what `config.data.kind` says.
      config: a frozen dataclass of the fields that this kind alone reads, each with a default. They stand in
        `config.data` beside the fields that all kinds share; two kinds may share a field of one type and default.
      load: (config.data, own fields, split's name, cache folder) -> the split and the bad items left out of it. The
        name is "train", "val" or "test". The split is None where the config gives nothing to score.
      published: its size as published, for `--mode=plan`; None: `--samples` must say it where the files are missing.
      at_hand: own fields -> whether the training samples can be counted here (by loading them). Drawn data always is.
      scored: the splits that `config.data.scored` may name.
      unscored: why `load` may give no test split.
      free_on_resume: own fields that may change when a run resumes: those of the test alone.
      prompt: (own fields, question, earlier turns) -> the instruction of a question asked in `--mode=chat`. None where
        samples have no instruction: such a model captions pictures (`--mode=caption`).
      shards: how it is prepared; None: it is read as it is, or drawn.
    """

    name: str
    config: type
    load: Callable[[Data, Any, str, Path], tuple[Split | None, Sequence[BadItem]]]
    published: Published | None = None
    at_hand: Callable[[Any], bool] = lambda own: True
    scored: tuple[str, ...] = ("test", "val", "train")
    unscored: str = "this kind of data has no test split"
    free_on_resume: tuple[str, ...] = ()
    prompt: Callable[[Any, str, Turns], str] | None = None
    shards: Shards | None = None

    def settings(self, data: Data) -> Any:
        """Reads the fields that are this kind's own.

        Args:
          data: a run's `config.data`.

        Returns:
          An instance of `config`: what is given, the defaults of what is not. Fields of other kinds are passed over.

        Raises:
          ConfigError: a value has another type than its field.
        """
        known = {field.name for field in dataclasses.fields(self.config)}
        return build(self.config, {name: value for name, value in data.own.items() if name in known}, "config.data")


def exists(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file that the config names is there; an empty name is none."""
    return bool(path) and user_path(path).exists()

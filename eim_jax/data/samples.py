"""Samples, the images they point to, and the split of both: what every data set becomes first."""

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii

import numpy as np
from jaxtyping import Int
from PIL import Image

from eim_jax.data.mixture import Mixture
from eim_jax.data.picture_stamps import Stamp, stamp_of, statuses
from eim_jax.utils.images import load_rgb, to_rgb

_LINES = 1024  # that a fingerprint takes in at once


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One training example: its row in `Split.samples` is its row in every queue.

    `image` is a row of `Split.images` (None: text only), `instruction` may be empty, `response` is supervised.
    `caption` is what CLIP.text reads for loss_IE's key; where it is empty, that is the response.
    """

    id: str
    image: int | None
    instruction: str
    response: str
    caption: str = ""


class ImageSource(abc.ABC):
    """Random access to the images of a split: `source[i]` is the i-th image as a PIL image in mode RGB.

    `ids` are the data set's image ids, `names` what an error message shows (a file name, or the id). Subclasses give
    `_load(i)` and `identity(i)`, a short string that changes when the image does.
    """

    _remedy = "Repair or remove it, or load the data with on_bad='drop'."  # for an image that cannot be read

    def __init__(self, ids: Sequence[str], names: Sequence[str]):
        if len(ids) != len(names):
            raise ValueError(f"{len(ids)} image ids but {len(names)} image names: give one name for each id")
        self.ids = list(ids)
        self.names = list(names)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.ids)

    def __getitem__(self, row: int) -> Image.Image:
        """Returns image `row` (0 <= row < len) in mode RGB; an unreadable one is a ValueError with its id and name."""
        if not 0 <= row < len(self.ids):
            raise IndexError(f"image row {row}: this source has {len(self.ids)} images")
        try:
            return self._load(row)
        except Exception as error:  # PIL's decoders raise many types on damaged files
            raise ValueError(
                f"image id {self.ids[row]} ({self.names[row]}) cannot be read: {error}. {self._remedy}"
            ) from error

    @abc.abstractmethod
    def _load(self, row: int) -> Image.Image:
        """Returns image `row` in mode RGB."""

    @abc.abstractmethod
    def identity(self, row: int) -> str:
        """Returns a short string that differs when image `row` differs."""

    @functools.cached_property
    def _digest(self) -> str:
        return _sha256([self.ids[row], self.identity(row)] for row in range(len(self)))

    def fingerprint(self) -> str:
        """Returns the sha256 over every image's id and identity, in order; computed once."""
        return self._digest

    def contents(self) -> str:
        """Returns what differs when a picture is replaced by another of its size; "" where the identities tell."""
        return ""

    def modified(self) -> str:
        """Returns what differs when a picture's file was written since; "" where there are no files."""
        return ""


def file_in(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the file of that name in a folder, also where the name is written in Unicode's other form.

    An é is one character (NFC) or an e and an accent (NFD): macOS and some archives store the second.
    """
    path = folder / name
    if not name.isascii() and not os.path.exists(path):
        for form in ("NFC", "NFD"):
            other = folder / unicodedata.normalize(form, name)
            if os.path.exists(other):
                return other
    return path


class FileImages(ImageSource):
    """Image files under one folder, decoded on every access; identity = relative name and size in bytes.

    That identity is part of what earlier runs were made from, so it stays; what it cannot tell, `contents` does.
    """

    def __init__(self, folder: str | os.PathLike[str], ids: Sequence[str], files: Sequence[str]):
        super().__init__(ids, files)
        self.folder = pathlib.Path(folder)

    def path(self, row: int) -> pathlib.Path:
        """Returns the file of image `row`."""
        return file_in(self.folder, self.names[row])

    def _load(self, row: int) -> Image.Image:
        return load_rgb(self.path(row))

    def identity(self, row: int) -> str:
        """Returns the name and the size in bytes: cheap for 113k files, and independent of where the folder lies."""
        try:
            return f"{self.names[row]}:{self.path(row).stat().st_size}"
        except OSError as error:
            raise self._unreadable(row, error) from error

    def contents(self) -> str:
        """Returns the sha256 over each picture's id and its file's two ends; independent of where the folder lies."""
        return _sha256([self.ids[row], stamp.ends] for row, stamp in enumerate(self._stamps))

    def modified(self) -> str:
        """Returns the sha256 over the times at which the files were written."""
        return _sha256(stamp.modified for stamp in self._stamps)

    @functools.cached_property
    def _digest(self) -> str:
        sizes = [stamp.size for stamp in self._stamps]  # each file is looked at once for all three
        return _sha256([id_, f"{name}:{size}"] for id_, name, size in zip(self.ids, self.names, sizes, strict=True))

    @functools.cached_property
    def _stamps(self) -> list[Stamp]:
        paths = [os.fspath(self.path(row)) for row in range(len(self))]
        stamps = []
        for row, (path, status) in enumerate(zip(paths, statuses(paths), strict=True)):
            try:
                stamps.append(stamp_of(path, status))
            except OSError as error:
                raise self._unreadable(row, error) from error
        return stamps

    def _unreadable(self, row: int, error: OSError) -> ValueError:
        return ValueError(f"image id {self.ids[row]}: cannot read {self.path(row)}: {error}")


class DrawnImages(ImageSource):
    """Images made by a function of the row; `identities[i]` describes everything that image i is drawn from."""

    def __init__(self, ids: Sequence[str], draw: Callable[[int], Image.Image], identities: Sequence[str]):
        super().__init__(ids, ids)
        if len(identities) != len(self.ids):
            raise ValueError(f"{len(self.ids)} image ids but {len(identities)} identities: give one for each id")
        self._draw = draw
        self._identities = list(identities)

    def _load(self, row: int) -> Image.Image:
        return to_rgb(self._draw(row))

    def identity(self, row: int) -> str:
        """Returns the caller's description of image `row`."""
        return self._identities[row]


class SelectedImages(DrawnImages):
    """Some images of another source, under other ids if there are any; their identities stay."""

    def __init__(self, source: ImageSource, rows: Sequence[int], ids: Sequence[str] | None = None):
        names = [source.ids[row] for row in rows] if ids is None else ids
        super().__init__(names, lambda row: source[rows[row]], [source.identity(row) for row in rows])


class NoImages(DrawnImages):
    """Stands for images that were not loaded: whoever opens one is told `why`."""

    def __init__(self, ids: Sequence[str], identities: Sequence[str], why: str):
        def refuse(row: int) -> Image.Image:
            raise ValueError(why)

        super().__init__(ids, refuse, identities)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A named list of samples with their images and, for evaluation, the reference texts of each image id.

    `task` names what the split asks for when it is scored: an entry of evaluation.tasks.TASKS. A subclass that holds
    what its task needs (the options of a question, say) gives the field its own default.

    Raises:
      ValueError: a sample id or an image id stands twice, or a sample points to an image that is not in `images`.
    """

    name: str
    samples: tuple[Sample, ...]
    images: ImageSource
    references: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    task: str = dataclasses.field(default="captions", kw_only=True)
    mixture: Mixture | None = dataclasses.field(default=None, kw_only=True)  # how often training shows its sources

    def __post_init__(self):
        """Refuses what the class docstring names."""
        _no_duplicates(self.name, "sample", (sample.id for sample in self.samples))
        _no_duplicates(self.name, "image", self.images.ids)
        for sample in self.samples:
            if sample.image is not None and not 0 <= sample.image < len(self.images):
                raise ValueError(
                    f"split {self.name!r}: sample {sample.id} points to image row {sample.image}, "
                    f"but there are {len(self.images)} images"
                )

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.samples)

    @property
    def groups(self) -> Int[np.ndarray, "N"]:
        """Returns for each sample its image's row, so that captions of one image share a group.

        A text-only sample gets a number of its own, above every image row: it never shares a group.
        """
        first_free = len(self.images)
        rows = (first_free + row if s.image is None else s.image for row, s in enumerate(self.samples))
        return np.fromiter(rows, np.int32, len(self.samples))

    @functools.cached_property
    def _digest(self) -> str:
        ids = self.images.ids
        texts = (
            [
                s.id,
                None if s.image is None else ids[s.image],
                s.instruction,
                s.response,
                *([s.caption] if s.caption else []),
            ]
            for s in self.samples
        )
        return _sha256([_sha256(texts)], [self.images.fingerprint()])

    def fingerprint(self) -> str:
        """Returns the sha256 over the samples (id, image id, texts, in order) and the images; computed once.

        Neither the split's name nor the folder's place is part of it.
        """
        return self._digest


def _sha256(*groups) -> str:
    """Returns the hex digest of lists of strings; JSON keeps ["ab", "c"] and ["a", "bc"] apart."""
    digest = hashlib.sha256()
    for group in groups:
        lines = map(_line, group)
        while some := list(itertools.islice(lines, _LINES)):
            digest.update("".join(some).encode())
    return digest.hexdigest()


def _line(item) -> str:
    """An item as JSON, with a line's end; for lists of texts what `json.dumps` gives, in a third of its time."""
    if isinstance(item, list) and all(isinstance(part, str) for part in item):
        return f"[{', '.join(map(encode_basestring_ascii, item))}]\n"
    return json.dumps(item) + "\n"


def _no_duplicates(split: str, kind: str, ids) -> None:
    seen = set()
    for identifier in ids:
        if identifier in seen:
            raise ValueError(f"split {split!r}: {kind} id {identifier!r} occurs more than once; ids must be unique")
        seen.add(identifier)

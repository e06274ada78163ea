"""Whether image files can be used, found before the first step: every file is opened and decoded once."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import PIL

from eim_jax.data.bad_items import name_problem, outside
from eim_jax.data.picture_stamps import Stamp, remember, stamp_of, statuses
from eim_jax.data.samples import FileImages, file_in
from eim_jax.utils.console import console, progress
from eim_jax.utils.files import Damaged, read_json, write_text
from eim_jax.utils.images import check_size, to_rgb
from eim_jax.utils.picture_files import open_picture

_CHUNK = 64  # files a thread checks before it reports
_CACHE_VERSION = 3  # raised when a file that was good may no longer be, or another thing is kept of it
_SAVE_SECONDS = 5.0  # between two saves of the verdicts while files are checked


def file_problem(path: str | os.PathLike[str]) -> str | None:
    """Returns why a picture cannot be used, or None.

    JPEGs are decoded at an eighth of their size: every byte is still read and entropy-decoded, so that a truncated file
    is found, at 1.4 times the speed. All other formats are decoded in full.
    """
    try:
        if os.stat(path).st_size == 0:
            return "the file is empty (0 bytes)"
        with open_picture(path) as picture:
            check_size(picture)
            if picture.format == "JPEG":
                picture.draft(picture.mode, (1, 1))
            to_rgb(picture)
    except FileNotFoundError:
        return f"no such file: {path}"
    except Exception as error:  # PIL's decoders raise many types on damaged files; each of them means "unusable"
        return str(error) or type(error).__name__
    return None


def check_images(
    images: FileImages, threads: int = 4, cache: str | os.PathLike[str] | None = None, *, outside_images: bool = False
) -> dict[int, str]:
    """Returns {row: problem} for the files that cannot be used; decodes each file once, in `threads` threads.

    A name that no file can have, or that leads out of the folder (unless `outside_images`), is such a problem too.
    Where several ids stand for one file the log counts them: their texts are each other's negatives.

    With a folder `cache`, good verdicts are kept by name, size, times and a hash of the file's two ends, and written
    every few seconds: a second start only looks at sizes and times, and a check that was stopped or killed goes on
    where it was. How many pictures are others than those that were checked before is said in the log.
    """
    verdicts = _Verdicts(images.folder, cache)
    problems: dict[int, str] = {}
    named = []
    for row, name in enumerate(images.names):
        if problem := name_problem(name):
            problems[row] = problem
        elif outside(name) and not outside_images:
            problems[row] = (
                f"leads out of the image folder {images.folder}: give a name within it, or a link "
                "there; or set config.data.outside_images=True"
            )
        else:
            named.append(row)
    found = statuses([os.fspath(file_in(images.folder, images.names[row])) for row in named])
    there = {row: status for row, status in zip(named, found, strict=True) if status is not None}
    unknown = [row for row in named if row not in there or not verdicts.known_good(images.names[row], there[row])]
    _note_shared(images, there)
    verdicts.note_replaced()
    if not unknown:
        return problems

    def check(rows: Sequence[int]) -> list[tuple[int, str | None]]:
        return [(row, verdicts.check(images.names[row])) for row in rows]

    chunks = [unknown[start : start + _CHUNK] for start in range(0, len(unknown), _CHUNK)]
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        with progress("checking images", len(unknown), "images") as advance:
            for found in pool.map(check, chunks):
                problems |= {row: problem for row, problem in found if problem is not None}
                advance(len(found))
                verdicts.save_if_due()
    finally:  # an interrupted check keeps what it knows
        pool.shutdown(cancel_futures=True)
        verdicts.save()
    return problems


def _note_shared(images: FileImages, there: Mapping[int, os.stat_result]) -> None:
    """Says how many pictures go by more than one id: as the same name, or as links to one file."""
    rows_of = defaultdict(list)
    for row, status in there.items():  # the check names the others
        rows_of[status.st_dev, status.st_ino].append(row)
    shared = [rows for rows in rows_of.values() if len(rows) > 1]
    if shared:
        ids = ", ".join(images.ids[row] for row in shared[0][:5])
        console.print(
            f"{len(shared):,} pictures go by more than one id ({sum(map(len, shared)):,} ids), the first is "
            f"{images.names[shared[0][0]]} (ids {ids}): what is said of it under one id is a negative of the others",
            soft_wrap=True,
        )


class _Verdicts:
    """The stamps of files known to be good, by name."""

    def __init__(self, folder: pathlib.Path, cache: str | os.PathLike[str] | None):
        self._folder = folder
        self._file = None
        self._good: dict[str, Stamp] = {}
        self._replaced: list[str] = []
        self._saved, self._every, self._news = time.monotonic(), _SAVE_SECONDS, False
        if cache is None:
            return
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._file = pathlib.Path(cache) / f"checked_images_{place}.json"
        self._header = {"version": _CACHE_VERSION, "pillow": PIL.__version__}
        try:
            stored = read_json(self._file, {"header": dict, "good": dict})
            if stored["header"] == self._header:
                self._good = {name: Stamp(*values) for name, values in stored["good"].items()}
        except FileNotFoundError:
            return
        except (Damaged, TypeError):
            console.print(f"{self._file} is damaged: checking the images again")

    def known_good(self, name: str, status: os.stat_result) -> bool:
        """Whether the file is the one that was good; only one that was touched since is read for that."""
        known = self._good.get(name)
        if known is None:
            return False
        path = file_in(self._folder, name)
        remember(path, known)
        try:
            found = stamp_of(path, status)
        except OSError:
            return False
        if found.ends != known.ends:
            self._replaced.append(name)
        same = (found.size, found.modified, found.ends) == (known.size, known.modified, known.ends)
        if same:
            self._good[name] = found
        return same

    def note_replaced(self) -> None:
        """Says which pictures are no longer those that were checked."""
        if self._replaced:
            console.print(
                f"{len(self._replaced):,} pictures in {self._folder} were replaced since they were checked, the first "
                f"is {self._replaced[0]}",
                soft_wrap=True,
            )

    def check(self, name: str) -> str | None:
        """Returns why the file cannot be used, or None; called in threads."""
        path = file_in(self._folder, name)
        try:
            stamp = stamp_of(path)  # before the file is read: one that is replaced meanwhile is looked at again
        except OSError:
            stamp = None
        problem = file_problem(path)
        if problem is None and stamp is not None:
            self._good[name] = stamp
            self._news = True
        return problem

    def save_if_due(self) -> None:
        """Saves from time to time, and never so often that it takes a tenth of the time."""
        if time.monotonic() - self._saved >= self._every:
            begun = time.monotonic()
            self.save()
            self._saved = time.monotonic()
            self._every = max(_SAVE_SECONDS, 10 * (self._saved - begun))

    def save(self) -> None:
        """Writes the verdicts where there are new ones; a check may be under way in threads."""
        if self._file is not None and self._news:
            self._news = False
            write_text(self._file, json.dumps({"header": self._header, "good": dict(self._good)}))

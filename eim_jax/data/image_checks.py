"""Whether image files can be used, found before the first step: every file is opened and decoded once."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import PIL

from eim_jax.data.bad_items import name_problem, outside
from eim_jax.data.samples import FileImages, file_in
from eim_jax.utils.console import console, progress
from eim_jax.utils.files import Damaged, read_json, write_text
from eim_jax.utils.images import check_size, to_rgb
from eim_jax.utils.picture_files import open_picture

_CHUNK = 64  # files a thread checks before it reports
_CACHE_VERSION = 2  # raised when a file that was good may no longer be


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

    With a folder `cache`, good verdicts are kept by name, size and modification time: a second start only looks at the
    files' sizes, and an interrupted check goes on where it was.
    """
    verdicts = _Verdicts(images.folder, cache)
    problems: dict[int, str] = {}
    unknown = []
    for row, name in enumerate(images.names):
        if problem := name_problem(name):
            problems[row] = problem
        elif outside(name) and not outside_images:
            problems[row] = (
                f"leads out of the image folder {images.folder}: give a name within it, or a link "
                "there; or set config.data.outside_images=True"
            )
        elif not verdicts.known_good(name):
            unknown.append(row)
    _note_shared(images, problems)
    if not unknown:
        return problems

    def check(rows: Sequence[int]) -> list[tuple[int, str | None]]:
        return [(row, file_problem(images.path(row))) for row in rows]

    chunks = [unknown[start : start + _CHUNK] for start in range(0, len(unknown), _CHUNK)]
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        with progress("checking images", len(unknown), "images") as advance:
            for found in pool.map(check, chunks):
                for row, problem in found:
                    if problem is None:
                        verdicts.add(images.names[row])
                    else:
                        problems[row] = problem
                advance(len(found))
    finally:  # an interrupted check keeps what it knows
        pool.shutdown(cancel_futures=True)
        verdicts.save()
    return problems


def _note_shared(images: FileImages, problems: Mapping[int, str]) -> None:
    """Says how many pictures go by more than one id: as the same name, or as links to one file."""
    rows_of = defaultdict(list)
    for row in range(len(images)):
        if row not in problems:
            try:
                status = os.stat(images.path(row))
            except OSError:
                continue  # the check names it
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
    """The names, sizes and modification times of files known to be good."""

    def __init__(self, folder: pathlib.Path, cache: str | os.PathLike[str] | None):
        self._folder = folder
        self._file = None
        self._good: dict[str, list[int]] = {}
        if cache is None:
            return
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._file = pathlib.Path(cache) / f"checked_images_{place}.json"
        self._header = {"version": _CACHE_VERSION, "pillow": PIL.__version__}
        try:
            stored = read_json(self._file, {"header": dict, "good": dict})
        except FileNotFoundError:
            return
        except Damaged:
            console.print(f"{self._file} is damaged: checking the images again")
            return
        if stored["header"] == self._header:
            self._good = stored["good"]

    def _stamp(self, name: str) -> list[int] | None:
        try:
            status = os.stat(file_in(self._folder, name))
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns]

    def known_good(self, name: str) -> bool:
        return name in self._good and self._good[name] == self._stamp(name)

    def add(self, name: str) -> None:
        stamp = self._stamp(name)
        if stamp is not None:
            self._good[name] = stamp

    def save(self) -> None:
        if self._file is None:
            return
        write_text(self._file, json.dumps({"header": self._header, "good": self._good}))

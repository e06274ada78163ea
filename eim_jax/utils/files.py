"""State files: written whole or not at all, read by one reader that names a damaged one and says what to delete."""

import errno
import functools
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

SUMS = "sha256.json"  # in a sealed folder: the sha256 of each of its other files

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = tuple(os.strerror(number) for number in _FULL)  # storage libraries hand on the words alone


class Damaged(ValueError):
    """A file is not what was written; the message names it and what to delete."""

    def __init__(self, file: Path, reason: str, delete: Path | None = None):
        super().__init__(f"{file} is damaged ({reason}): delete {delete or file}, the same command makes it again")
        self.what = f"{file} is damaged ({reason})"


class DiskFull(OSError):
    """There is no room; the message names the folder."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path as its user means it: "~" is the home folder, also behind `--flag=`, where no shell expands it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no home folder is known: then it is an ordinary name
        return Path(path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file beside its place and renames it: a kill or a power cut leaves the old file or the new.

    Args:
      path: where the file shall stand; its folder is made.
      text: the whole content.

    Raises:
      DiskFull: naming the folder.
    """
    # Processes that share a folder may write at once.
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    fresh = path.with_name(f"{path.name}.{host}-{os.getpid()}.partial")
    with room_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path, host)
        try:
            fresh.write_text(text, encoding="utf-8")
            flush(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    flush(path.parent)


def _clear(path: Path, host: str) -> None:
    """Removes what processes of this host that are gone left when they were killed in the middle of writing a file."""
    begin = f"{path.name}.{host}-"
    for name in os.listdir(path.parent):
        number = name.removeprefix(begin).removesuffix(".partial")
        if name == f"{begin}{number}.partial" and number.isdecimal():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                path.with_name(name).unlink(missing_ok=True)
            except OSError:
                continue  # another user's


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file as `write_text` does; of several processes, the first one does.

    Args:
      path: where the file shall stand; its folder is made.
      value: what `json.dumps` takes.
      indent: spaces a level; None for one line.
    """
    if jax.process_index() == 0:
        write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(
    path: Path,
    fields: Mapping[str, Any] | None = None,
    optional: Mapping[str, Any] | None = None,
    *,
    form: Any = dict,
    values: type = object,
    delete: Path | None = None,
) -> Any:
    """Reads a JSON file that an earlier run wrote.

    Args:
      path: of the file.
      fields: that it must have, with their types.
      optional: types of fields that it may have.
      form: dict or list, what stands outermost.
      values: the type of every value of a dict.
      delete: what has to be deleted to have it made again; None: the file itself.

    Raises:
      FileNotFoundError: there is none.
      Damaged: it is no JSON (also: empty, cut off), or JSON of another shape.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"no JSON: {error}", delete) from error
    if not isinstance(content, form):
        raise Damaged(path, f"it holds a {type(content).__name__}", delete)
    if missing := [field for field in fields or {} if field not in content]:
        raise Damaged(path, f"no field {missing[0]!r}", delete)
    if isinstance(content, dict):
        kinds = {**dict.fromkeys(content, values), **(fields or {}), **(optional or {})}
        for field, value in content.items():
            if not isinstance(value, kinds[field]) or (kinds[field] is int and isinstance(value, bool)):
                raise Damaged(path, f"field {field!r} is a {type(value).__name__}", delete)
    return content


def new_rows(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Makes a .npy file, mapped for writing, whose room on the disk is its own already.

    A mapping of a file with holes ends the process by SIGBUS when the disk is full.

    Raises:
      DiskFull: naming the folder.
    """
    with room_in(path.parent):
        try:
            rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
            allocate(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return rows


def allocate(path: Path) -> None:
    """Takes the room on the disk for every hole of a file; what is written stays."""
    if hasattr(os, "posix_fallocate") and (size := path.stat().st_size):  # macOS has none
        with room_in(path.parent), open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def read_rows(path: Path, delete: Path | None = None) -> np.ndarray:
    """Maps a .npy file read-only.

    Raises:
      Damaged: it is missing, none, pickled, or of another length than it says.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        size = path.stat().st_size
    except Exception as error:  # NumPy's reader of headers lets Python's tokenizer and parser raise what they like
        raise Damaged(path, str(error) or type(error).__name__, delete) from error
    if not isinstance(rows, np.memmap):
        raise Damaged(path, "no .npy file", delete)
    if rows.offset + rows.nbytes != size:
        raise Damaged(path, f"{size:,} bytes, {rows.offset + rows.nbytes:,} by its header", delete)
    return rows


def sha256(path: Path) -> str:
    """Returns the sha256 of a file; one that has not changed since is not read again."""
    state = path.stat()
    return _sha256(path.absolute(), (state.st_size, state.st_mtime_ns, state.st_ino))


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, state: tuple[int, int, int]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(folder: Path, sums: Mapping[str, str], delete: Path | None = None) -> None:
    """Compares files of a folder with their sha256.

    Raises:
      Damaged: naming the first that is missing or another one.
    """
    for name, wanted in sums.items():
        try:
            found = sha256(folder / name)
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            reason = (error.strerror if isinstance(error, OSError) else None) or f"it lists a file {name!a:.60}"
            raise Damaged(folder / ascii(name)[1:-1], reason, delete or folder) from error
        if found != wanted:
            raise Damaged(folder / name, "its sha256 is not the one that was written", delete or folder)


def seal(folder: Path, without: Collection[str] = ()) -> None:
    """Brings a folder's files to the disk and notes in SUMS the sha256 of each, `without` those names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (SUMS, *without))
    for file in [*files, *{file.parent for file in files}]:
        flush(file)
    write_text(folder / SUMS, json.dumps({str(file.relative_to(folder)): sha256(file) for file in files}, indent=1))


def check_seal(folder: Path, delete: Path) -> None:
    """Checks a folder's files by its SUMS; one without, of an earlier version, passes.

    Raises:
      Damaged: a file is missing or another one; saying to delete `delete`.
    """
    if (folder / SUMS).exists():
        check_sums(folder, read_json(folder / SUMS, delete=delete), delete)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets its name when the body ends: a kill or a power cut leaves none or all of it.

    Its files may be read by whom the umask says, whatever the library that wrote them thought. A `folder` that is
    there has to be empty.

    Raises:
      DiskFull: naming the folder.
    """
    folder = folder.resolve()  # a link is not what gets replaced
    scratch = folder.with_name(folder.name + ".partial")
    with room_in(folder.parent):
        shutil.rmtree(scratch, ignore_errors=True)  # of a command that was killed
        scratch.mkdir(parents=True)
        try:
            yield scratch
            allowed = 0o666 & scratch.stat().st_mode
            for file in [file for file in scratch.rglob("*") if file.is_file()]:
                file.chmod(allowed)
                flush(file)
            for inner in [place for place in scratch.rglob("*") if place.is_dir()]:
                flush(inner)
            flush(scratch)
            scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, would survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:  # some network file systems have it for files alone
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(number)


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Says which folder's disk is full, whoever finds it out.

    Raises:
      DiskFull: in place of an error, of any type, that comes from a full disk, a quota or a limit on a file's size.
    """
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, DiskFull) else full_disk(error)
        if reason is None:
            raise
        raise DiskFull(
            f"{folder} cannot be written: {reason}. Make room there; then the same command continues"
        ) from error


def full_disk(error: BaseException | None, seen: Collection[int] = ()) -> str | None:
    """Returns why there is no room, in the system's words, where that is at the root of an error; else None."""
    if error is None or id(error) in seen:
        return None
    if isinstance(error, DiskFull):
        return str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        return os.strerror(error.errno)
    if said := next((words for words in _FULL_WORDS if words.lower() in str(error).lower()), None):
        return said
    causes = [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
    found = (full_disk(cause, (*seen, id(error))) for cause in causes)
    return next((reason for reason in found if reason), None)

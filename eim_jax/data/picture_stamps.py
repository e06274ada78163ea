"""Whether a picture's file is the one that was read before: its size, its times, and a hash of its two ends.

A picture is replaced by another one of the same size more often than by one of the same first and last kilobytes.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

_END = 16 * 1024  # bytes of each end
_THREADS = 16  # that ask for files' sizes and times: on a disk of the network each answer takes its time
_CHUNK = 512  # files that a thread asks for at once


class Stamp(NamedTuple):
    """What tells a file from another: bytes, times in ns (of its content, of any change to it), its ends' sha256."""

    size: int
    modified: int
    changed: int
    ends: str


_known: dict[str, Stamp] = {}  # by path; one whose times have moved is read again


def statuses(paths: Sequence[str]) -> list[os.stat_result | None]:
    """Returns what `os.stat` says of each file, asked in threads; None where there is none, or it may not be asked."""

    def ask(some: Sequence[str]) -> list[os.stat_result | None]:
        return [_status(path) for path in some]

    if len(paths) <= _CHUNK:
        return ask(paths)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(ask, [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)])
        return [status for part in parts for status in part]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def stamp_of(path: str | os.PathLike[str], status: os.stat_result | None = None) -> Stamp:
    """Returns a file's stamp, reading 32 KiB of it unless that was done before and nothing has touched it since.

    Args:
      path: of the file.
      status: what `os.stat` says of it now, where that is known.

    Raises:
      OSError: it cannot be read.
    """
    name, status = os.fspath(path), status or os.stat(path)
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    found = _known.get(name)
    if found is None or found[:3] != state:
        with open(path, "rb") as file:
            ends = hashlib.sha256(file.read(_END))
            file.seek(max(_END, status.st_size - _END))
            ends.update(file.read(_END))
        found = _known[name] = Stamp(*state, ends.hexdigest()[:32])
    return found


def remember(path: str | os.PathLike[str], stamp: Stamp) -> None:
    """Notes a stamp that an earlier run took, so that a file which nothing has touched since is not read again."""
    _known[os.fspath(path)] = stamp

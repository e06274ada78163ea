"""Whether a picture's file is the one that was read before: its size, its times, and a hash of its two ends.

A picture is replaced by another one of the same size more often than by one of the same first and last kilobytes.
"""

import hashlib
import os
from typing import NamedTuple

_END = 16 * 1024  # bytes of each end


class Stamp(NamedTuple):
    """What tells a file from another: bytes, times in ns (of its content, of any change to it), its ends' sha256."""

    size: int
    modified: int
    changed: int
    ends: str


_known: dict[str, Stamp] = {}  # by path; one whose times have moved is read again


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """Returns a file's stamp, reading 32 KiB of it unless that was done before and nothing has touched it since.

    Raises:
      OSError: it cannot be read.
    """
    name, status = os.fspath(path), os.stat(path)
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

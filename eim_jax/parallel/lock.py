"""One run at a time in a work directory, one command at a time that writes a folder."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from eim_jax.parallel.processes import is_first
from eim_jax.utils.console import console
from eim_jax.utils.files import room_in

FILE = "run.lock"

_POLL = 0.5  # seconds between two looks at a lock that is waited for
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # of some network file systems and buckets


class Holder(NamedTuple):
    """Who works in a directory.

    Attributes:
      described: process, host and since when, in words.
      alive: whether it still runs; None where that cannot be seen from this machine.
      since: seconds of the epoch; None where the note does not say.
    """

    described: str
    alive: bool | None
    since: float | None = None


def holder_of(workdir: Path) -> Holder | None:
    """Looks at who works in a directory, without a lock of its own, which could turn away a run that is about to begin.

    Args:
      workdir: it need not be there.

    Returns:
      None where nobody does, or whoever did has left with a word.
    """
    try:
        number = os.open(workdir / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        holder = _holder(number)
    finally:
        os.close(number)
    if not holder:
        return None
    here = holder.get("host") == socket.gethostname()
    try:
        since = datetime.fromisoformat(holder["since"]).timestamp()
    except (KeyError, TypeError, ValueError):
        since = None
    return Holder(_described(holder), not _is_gone(holder) if here else None, since)


class InUse(OSError):
    """Another run works in the directory, or writes the folder; the message says which."""


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a work directory against other runs while the body runs; of a run's processes, the first holds it.

    The system takes the lock from a process that ends, however it ends. Where the file system has no locks, the note in
    the file decides: a holder on this machine that is gone, or whose process number is now another's, holds nothing.

    Raises:
      InUse: naming the holder's host, process and since when.
    """
    if not is_first():
        yield
        return
    made = not workdir.exists()
    with room_in(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        number = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(workdir / FILE, number, workdir, "--workdir")
        try:
            yield
        finally:
            os.ftruncate(number, 0)
            if {entry.name for entry in workdir.iterdir()} == {FILE}:  # the run was refused before it wrote anything
                (workdir / FILE).unlink()
                if made:
                    workdir.rmdir()
    finally:
        os.close(number)


@contextmanager
def held(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds a folder that the body fills, by a file beside it, FOLDER.lock, which goes away in the end.

    Of a run's processes, the first holds it. As with `locked`, one that a process left behind holds nothing.

    Args:
      folder: it need not be there.
      wait: for another holder to end, with a word in the log: for what two runs may both need, once.

    Raises:
      InUse: another command writes the folder, and `wait` is False.
    """
    if not is_first():
        yield
        return
    folder = folder.absolute()
    file = folder.with_name(f"{folder.name}.lock")
    number = _open_held(file, folder, wait)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is free: whoever has opened it meanwhile finds that it is gone
        os.close(number)


def _open_held(file: Path, folder: Path, wait: bool) -> int:
    """Opens and locks the file that has this name now."""
    said = False
    while True:
        with room_in(folder.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file, number, folder, "--out")
            if file.exists() and os.path.samestat(os.fstat(number), os.stat(file)):
                return number
        except InUse as error:
            if not wait:
                os.close(number)
                raise
            if not said:
                console.print(f"{str(error).partition(':')[0]}: waiting for it", soft_wrap=True)
            said = True
            time.sleep(_POLL)
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def _take(file: Path, number: int, what: Path, flag: str) -> None:
    """Locks the open file and writes this process into it; `flag` is the one by which `what` was chosen."""
    free = True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(what, _holder(number), file, flag) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        free = False
    holder = _holder(number)
    if holder and not free and not _is_gone(holder):
        raise _in_use(what, holder, file, flag)
    if holder:
        said = f"{what}: the run of {_described(holder)} ended without a word; going on from what it saved"
        console.print(said, soft_wrap=True)
    own = psutil.Process()
    note = {
        "host": socket.gethostname(),
        "pid": own.pid,
        "process_started": own.create_time(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with room_in(file.parent):
        os.ftruncate(number, 0)
        os.pwrite(number, (json.dumps(note) + "\n").encode(), 0)


def _holder(number: int) -> dict:
    """Who wrote itself into the file and has not left; {} where nobody has, or half of a note is there."""
    try:
        found = json.loads(os.pread(number, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(holder: dict) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        return psutil.Process(holder["pid"]).create_time() != holder["process_started"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):
        return True


def _described(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"


def _in_use(what: Path, holder: dict, file: Path, flag: str) -> InUse:
    return InUse(
        f"{what} is in use by another run ({_described(holder)}): wait for it or stop it, or choose another "
        f"{flag}. If it is certain that no run is left, delete {file}"
    )

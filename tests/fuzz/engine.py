"""Runs one mutated input against a format's reader, says which outcome it was, and keeps what may not happen."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

from eim_jax.commands import errors
from eim_jax.utils.console import shown

from . import mutations
from .mutations import Files

CORRECT, CLEAR, ELSE = "correct", "clear error", "anything else"
LONGEST = 30  # seconds of the processor that one input may take
LARGEST = 2 * 2**20  # KiB of memory by which one input may raise the process's peak
_SETTINGS = {
    "database": None,
    "deadline": None,
    "phases": [hypothesis.Phase.generate],
    "suppress_health_check": list(hypothesis.HealthCheck),
}
# What Python says of a defect, not of a file.
_PYTHON = re.compile(
    r"object is not|has no attribute|indices must be|invalid literal|could not convert|not supported between|"
    r"embedded null|values to unpack|unhashable|must be real number|expected str instance|"
    r"expected string or bytes|'NoneType'|positional argument"
)
# What stands before another's words: which flag, which file.
_QUOTED = ("damaged", "Flags parsing error:", "transformers says of tokenizer")
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # many small files, each flushed
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
      name: what `--only` says.
      files: makes the valid input: {file's name: content}.
      read: (folder) -> what the program reads there.
      check: (folder, what was read): an AssertionError where a plain reading says otherwise.
      names: files that are changed; all by default.
      most: changes of one input at most.
      quick: inputs in `make test`.
      change: (valid files) -> a strategy of changed ones, where the general one does not fit.
      words: what a message may name in place of a file.
    """

    name: str
    files: Callable[[], Files]
    read: Callable[[pathlib.Path], Any]
    check: Callable[[pathlib.Path, Any], None]
    names: tuple[str, ...] = ()
    most: int = 3
    quick: int = 30
    change: Callable[[Files], st.SearchStrategy[Files]] | None = None
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input; `why` and `where` say more of anything else."""

    kind: str
    why: str = ""
    where: str = ""


@dataclasses.dataclass
class Tally:
    """A format's outcomes, and one kept folder for each place where something else happened."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    kept: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        """All inputs."""
        return self.counts.total()


class TooLongError(BaseException):
    """One input took longer than LONGEST; no reader may catch it."""


class _Enough(KeyboardInterrupt):
    """A turn's time is over; Hypothesis hands on what looks like Ctrl-C at once."""


def _alarm(*_):
    raise TooLongError


@contextlib.contextmanager
def _limited():
    before = signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)  # not the clock's: other work beside makes no input slow
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def lay(files: Files, folder: pathlib.Path) -> None:
    """Writes files into a folder; where two of them cannot stand together, the first one stays."""
    for name, content in files.items():
        with contextlib.suppress(OSError):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            else:
                path.write_bytes(content)


def taken(folder: pathlib.Path) -> Files:
    """The files of a folder, as `lay` writes them."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def outcome(form: Format, files: Files) -> Outcome:
    """Lays an input down, has it read, and judges what comes of it."""
    # A new name each time: sums of files are remembered by path, size and time.
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"fuzz_{form.name}_{next(_numbers)}_", dir=_MEMORY))
    said, before = io.StringIO(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        lay(files, folder)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _judged(form, files, folder, said)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > LARGEST:
            return Outcome(ELSE, f"took {grown / 2**20:.1f} GiB more memory", "memory")
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judged(form: Format, files: Files, folder: pathlib.Path, said: io.StringIO) -> Outcome:
    try:
        with _limited():
            result = form.read(folder)
    except TooLongError:
        return Outcome(ELSE, f"took more than {LONGEST} s:\n{traceback.format_exc()}", "time")
    except SystemExit as stop:
        message = stop.code if isinstance(stop.code, str) else said.getvalue()
        return (
            _named(form, files, folder, message, "exit") if stop.code else Outcome(ELSE, "left without a word", "exit")
        )
    except Exception as error:
        where, whole = _place(error), traceback.format_exc()
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return Outcome(ELSE, f"asked for more memory than there is\n{whole}", where)
        message = errors.in_words(error, str(folder))
        if message is None:
            return Outcome(ELSE, f"a traceback\n{whole}", where)
        return _named(form, files, folder, message, where, whole)
    try:
        with _limited():
            form.check(folder, result)
    except (Exception, TooLongError) as error:
        lines = str(error).splitlines() or [""]
        return Outcome(ELSE, f"wrong\n{traceback.format_exc()}", f"wrong: {lines[0][:80]}")
    return Outcome(CORRECT)


def _named(form: Format, files: Files, folder: pathlib.Path, message: str, where: str, whole: str = "") -> Outcome:
    """A message is clear if a terminal can show it and it names a file or a field."""
    try:
        shown(message).encode(errors="strict" if where != "exit" else "backslashreplace")  # as Python's stderr does
    except UnicodeEncodeError:
        return Outcome(ELSE, f"a message that no terminal shows\n{message!a}\n{whole}", where)
    names = {pathlib.PurePath(name).name for name in files} | {str(folder), *form.words}
    if not any(name in message for name in names if len(name) > 2):
        return Outcome(ELSE, f"a message that names nothing: {message}\n{whole}", where)
    if _PYTHON.search(message) and not any(words in message for words in _QUOTED):
        return Outcome(ELSE, f"Python's own words: {message}\n{whole}", where)
    return Outcome(CLEAR, message)


def _place(error: BaseException) -> str:
    """The innermost line of ours that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/eim_jax/" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {pathlib.PurePath(last.filename).name}:{last.name}"


def explore(
    form: Format, examples: int, seed: int | None, tally: Tally, keep: pathlib.Path, seconds: float = math.inf
) -> None:
    """Tries so many mutations, or as many as the seconds allow; seed None: always the same ones."""
    began = time.monotonic()
    valid = form.files()
    strategy = form.change(valid) if form.change else mutations.changed(valid, form.names, form.most)

    @hypothesis.settings(max_examples=examples, derandomize=seed is None, **_SETTINGS)
    @hypothesis.given(strategy)
    def one(files: Files) -> None:
        if time.monotonic() - began > seconds:
            raise _Enough
        found = outcome(form, files)
        tally.counts[found.kind] += 1
        if found.kind == ELSE and found.where not in tally.kept:
            tally.kept[found.where] = _keep(form, files, found, keep)

    with contextlib.suppress(_Enough):
        (hypothesis.seed(seed)(one) if seed is not None else one)()
    tally.seconds += time.monotonic() - began


def _keep(form: Format, files: Files, found: Outcome, keep: pathlib.Path) -> pathlib.Path:
    name = hashlib.sha256(found.where.encode("utf-8", "replace")).hexdigest()[:8]
    folder = keep / form.name / name
    shutil.rmtree(folder, ignore_errors=True)
    lay(files, folder / "input")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.txt").write_text(f"{found.where}\n{found.why}\n", encoding="utf-8", errors="backslashreplace")
    return folder


def table(tallies: dict[str, Tally]) -> str:
    """The figures of all formats, a line each."""
    rows = [
        (name, t.tried, *(t.counts[kind] for kind in (CORRECT, CLEAR, ELSE)), round(t.seconds))
        for name, t in tallies.items()
    ]
    rows.append(("all", *(sum(row[place] for row in rows) for place in range(1, 6))))
    head = ("format", "tried", CORRECT, CLEAR, ELSE, "seconds")
    lines = [
        f"{row[0]:<22}" + "".join(f"{cell:>15}" if isinstance(cell, str) else f"{cell:>15,}" for cell in row[1:])
        for row in (head, *rows)
    ]
    kept = [f"{where}: {folder}" for t in tallies.values() for where, folder in t.kept.items()]
    return "\n".join([*lines, *(["", "kept:", *kept] if kept else [])])

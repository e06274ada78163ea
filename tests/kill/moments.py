"""Moments at which a process is struck: after a random time, or when a file or a word appears."""

import pathlib
import random
import signal
import time
from dataclasses import dataclass

READY = 1 << (signal.SIGTERM - 1)
PAUSE = 3.0  # seconds that a halted process waits at most


@dataclass(frozen=True)
class Moment:
    """`files`: a pattern in the command's folder; `words`: in what the process says; neither: any time of the run."""

    name: str
    files: str = ""
    words: str = ""

    def come(self, process, folder: pathlib.Path, rng: random.Random, seconds: float) -> bool:
        """Waits for it; False where the process ended before.

        Of several files it is a random one's appearance, and half of the time a little later.

        Args:
          process: a mains.Main.
          folder: the command's.
          rng: draws which, and how much later.
          seconds: how long the whole command takes when nobody disturbs it.
        """
        if not self.files and not self.words:
            return _passes(process, rng.uniform(0, seconds))
        wanted, seen = rng.choice((1, 1, 2, 3, 5)), self._found(process, folder)
        new = set()
        while len(new) < wanted:
            if process.poll() is not None:
                return False
            time.sleep(0.002)
            new |= self._found(process, folder) - seen
        return _passes(process, rng.choice((0, rng.uniform(0, 0.5))))

    def _found(self, process, folder: pathlib.Path) -> set[str]:
        if self.words:
            return {f"{i}" for i in range(process.said().count(self.words))}
        return {str(path) for path in folder.glob(self.files)}


def _passes(process, seconds: float) -> bool:
    """Whether the process still runs after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        time.sleep(min(0.02, max(0.0, end - time.monotonic())))
    return process.poll() is None


def listens(process) -> bool:
    """Waits until the process has taken SIGTERM over; False where it ended before.

    Earlier it is an interpreter that starts, which a signal ends as it ends any.
    """
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return process.poll() is None  # no Linux
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & READY:
            return True
        time.sleep(0.01)
    return False

"""A campaign: commands are struck at random moments and started again; what they leave is compared with the whole."""

import collections
import os
import pathlib
import random
import shutil
import signal
import time
from dataclasses import dataclass, field

import mains

from .commands import Command, commands, finer_steps, make_data
from .compare import differences, left_by, litter
from .moments import PAUSE, listens

HOWS = {"killed": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "halted": signal.SIGSTOP}
WEIGHTS = (6, 2, 2, 1)  # how often each
TIMEOUT = 900  # seconds after which a command hangs


class Wrong(Exception):
    """A command did what it should not; the message says what."""


@dataclass
class Tally:
    """{(what, how): [struck, equal, else]}, and a line for each trial that went wrong."""

    rows: dict[tuple[str, str], list[int]] = field(default_factory=lambda: collections.defaultdict(lambda: [0, 0, 0]))
    wrong: list[str] = field(default_factory=list)

    @property
    def struck(self) -> int:
        """How many strikes there were."""
        return sum(row[0] for row in self.rows.values())

    def add(self, strikes: list[tuple[str, str]], fault: str = "") -> None:
        """Counts a trial's strikes."""
        for strike in strikes:
            row = self.rows[strike]
            row[0] += 1
            row[2 if fault else 1] += 1
        if fault:
            self.wrong.append(fault)

    def table(self) -> str:
        """The counts by what was struck, and in all."""
        names = sorted({what for what, _ in self.rows})
        lines = [f"{'what was struck':34}" + "".join(f"{how:>9}" for how in HOWS) + f"{'equal':>9}{'else':>6}"]
        for name in [*names, "all"]:
            rows = {how: [r for (w, h), r in self.rows.items() if h == how and name in (w, "all")] for how in HOWS}
            counts = "".join(f"{sum(r[0] for r in rows[how]):>9}" for how in HOWS)
            every = [r for how in HOWS for r in rows[how]]
            lines.append(f"{name:34}{counts}{sum(r[1] for r in every):>9}{sum(r[2] for r in every):>6}")
        return "\n".join([*lines, *self.wrong])


class Campaign:
    """Everything lies in `folder`; what was made undisturbed is in `folder`/whole, a failed trial stays there too."""

    def __init__(self, folder: pathlib.Path, seed: int, programs: pathlib.Path | None = None):
        self.folder, self.rng, self.tally, self._trials = folder, random.Random(seed), Tally(), 0
        data = make_data(folder / "data")
        self.commands = commands(data, folder / "whole-train")
        # Compiled once for all trials: restarts are quick. JAX reads it at its import, in the server of `mains`.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs or folder / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._seconds: dict[str, float] = {}
        self._whole: dict[str, dict[str, object]] = {}

    def prepare(self) -> None:
        """Lets each command run undisturbed, twice: equal results; the second one's time holds no compilation.

        Raises:
          Wrong: a command fails, or two runs of it differ.
        """
        for command in self.commands:
            for place in (f"whole-{command.name}", f"again-{command.name}"):
                folder = self.folder / place
                folder.mkdir()
                command.begin(folder)
                begun = time.monotonic()
                process = self._start(command, folder)
                if process.wait(TIMEOUT):
                    raise Wrong(f"{command.name} fails undisturbed:\n{process.said()[-4000:]}")
                self._seconds[command.name] = time.monotonic() - begun
                found = left_by(command.name, folder)
                if different := differences(self._whole.setdefault(command.name, found), found):
                    raise Wrong(f"two undisturbed runs of {command.name} differ in {', '.join(different[:5])}")
            print(f"{command.name}: {self._seconds[command.name]:.0f} s undisturbed", flush=True)

    def trial(self) -> None:
        """One command, struck a few times, finished and compared."""
        (command,) = self.rng.choices(self.commands, [command.share for command in self.commands])
        self._trials += 1
        place = self.folder / f"trial-{self._trials:04d}-{command.name}"
        place.mkdir()
        command.begin(place)
        strikes: list[tuple[str, str]] = []
        try:
            self._strike(command, place, strikes)
            different = differences(self._whole[command.name], left_by(command.name, place))
            if different:
                raise Wrong(f"{len(different)} differ: {', '.join(different[:5])}")
            if left := litter(place):
                raise Wrong(f"left behind: {', '.join(left[:5])}")
        except Exception as error:  # whatever it is, it is a finding: the campaign goes on
            said = " ".join(f"{what} ({how})," for what, how in strikes)
            self.tally.add(strikes, f"{place}: {said} then {type(error).__name__}: {error}")
            return
        self.tally.add(strikes)
        shutil.rmtree(place)

    def _strike(self, command: Command, place: pathlib.Path, strikes: list[tuple[str, str]]) -> None:
        """Starts, strikes and starts again; the last process is left to finish."""
        process = self._start(command, place)
        for _ in range(self.rng.randint(1, 6)):
            moment = self.rng.choice(command.moments)
            (how,) = self.rng.choices(list(HOWS), WEIGHTS)
            if not moment.come(process, place, self.rng, self._seconds[command.name]):
                break
            if how in ("SIGTERM", "SIGINT") and not listens(process):
                break
            strikes.append((f"{command.name}: {moment.name}", how))
            process.signal(HOWS[how])
            if how == "halted":
                time.sleep(self.rng.uniform(0.1, PAUSE))
                process.signal(signal.SIGCONT)
                continue
            code = process.wait(TIMEOUT)
            if how != "killed":
                self._check_stop(process, code)
            if code == 0:
                break
            process = self._start(command, place)
        if process.wait(TIMEOUT):
            raise Wrong(f"the same command failed:\n{process.said()[-3000:]}")

    @staticmethod
    def _check_stop(process, code: int) -> None:
        """A signal ends a command with one line, unless it is done."""
        said = process.said()
        last = (said.strip().splitlines() or [""])[-1]
        if "Traceback" in said or (code and "the same command" not in last):
            raise Wrong(f"a signal ended it with {code} and:\n{said[-3000:]}")

    def _start(self, command: Command, place: pathlib.Path) -> mains.Main:
        number = len(list(place.glob("said-*.txt")))
        return mains.Main(
            command.flags(place),
            place / f"said-{number:02d}.txt",
            before=finer_steps,
        )

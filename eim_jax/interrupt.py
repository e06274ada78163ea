"""Stopping a run: what a signal does, and how the run ends."""

import signal

from eim_jax.console import console


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived; the state is saved and the same command continues."""


class Signals:
    """SIGTERM and SIGINT: between steps the run stops at once, in a step after it; a second SIGINT always at once."""

    def __init__(self):
        self.stepping = self.arrived = False

    def __enter__(self) -> "Signals":
        """Takes the two signals over."""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.arrived:
            raise Interrupted("stopped between two stages: the same command continues")

    def _note(self, number, _):
        if self.arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = True
        if not self.stepping:
            self.check()
        console.print("stopping after this step; the state will be saved", soft_wrap=True)

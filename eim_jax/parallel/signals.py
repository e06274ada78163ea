"""Stopping a run: what a signal does at any moment, and how the run ends."""

import collections
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eim_jax.utils.console import console

_DELAY = 2  # steps after which the processes read what they agreed on: by then it is there, and no step waits for it
_AGAIN = 0.05  # seconds after which a signal that was dropped comes once more
_PATIENCE = 3.0  # seconds that a compilation, which no Python handler can stop, may go on after a signal


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived; the state is saved and the same command continues.

    `together`: every process stops here; else this one alone, in the middle of something.
    """

    def __init__(self, message: str, *, together: bool):
        super().__init__(message)
        self.together = together


class _State:
    """What this process is doing, and whether a signal has asked it to stop."""

    def __init__(self):
        self.arrived = self.stepping = self.handled = False
        self.doing, self.then = "starting", "the same command continues"
        self.since, self.spent = time.monotonic(), []  # of what is done, and (activity, seconds) before it

    def message(self) -> str:
        return f"stopped while {self.doing}: {self.then}"


_state = _State()


@contextmanager
def handled(then: str = "the same command continues") -> Iterator[None]:
    """Takes SIGTERM and SIGINT over, where they are not yet, while the body runs in the main thread.

    The first raises Interrupted in the body, except while steps of training run (`Signals`). A program that XLA
    compiles returns to Python only when it is done: there the process ends after a few seconds all the same, as every
    file is written whole or not at all. A second SIGINT ends the process at once.

    Args:
      then: what the message says of the next start.
    """
    if _state.handled:
        yield
        return
    _state.arrived, _state.stepping, _state.handled, _state.then = False, False, True, then
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _note) for number in (signal.SIGTERM, signal.SIGINT)}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, hook)
    threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread
        _state.handled = False
        doing("starting")


def doing(what: str) -> None:
    """Notes what the process is about, for the message of a signal that stops it there and for `spent`."""
    now = time.monotonic()
    if what != _state.doing:
        _state.spent.append((_state.doing, now - _state.since))
        _state.doing, _state.since = what, now


def began(seconds: float) -> None:
    """Counts the time from so many seconds ago, when the process began: loading packages is a part of starting."""
    _state.spent, _state.since = [], time.monotonic() - seconds


def spent() -> list[tuple[str, float]]:
    """Returns the activities since the last call, in order, each with its seconds; counts anew."""
    now = time.monotonic()
    found = [*_state.spent, (_state.doing, now - _state.since)]
    _state.spent, _state.since = [], now
    return found


def activity() -> str:
    """What the process is about, as `doing` was told."""
    return _state.doing


def _note(number: int, _: object) -> None:
    """The handler: Python calls it in the main thread, between two of its instructions."""
    if _state.arrived:
        return  # a second SIGINT is `_watch`'s
    _state.arrived = True
    if not _state.stepping:
        raise Interrupted(_state.message(), together=False)
    console.print("stopping after this step; the state will be saved", soft_wrap=True)


def _unraisable(before: Callable, lost: Any) -> None:
    """Python drops what is raised in a finaliser or by the garbage collector: then the signal comes once more."""
    if not issubclass(lost.exc_type, Interrupted):
        before(lost)
        return
    _state.arrived = False
    timer = threading.Timer(_AGAIN, _once_more)
    timer.daemon = True
    timer.start()


def _once_more() -> None:
    if _state.handled and not _state.arrived:
        os.kill(os.getpid(), signal.SIGTERM)  # a second SIGINT would mean at once


def _watch(reader: int) -> None:
    """Hears of each signal at once, whatever the main thread is in."""
    arrived = False
    while numbers := os.read(reader, 64):
        for number in numbers:
            if arrived and number == signal.SIGINT:
                _end("stopped at once: the same command goes on from what was saved before", 128 + signal.SIGINT)
            arrived |= number in (signal.SIGINT, signal.SIGTERM)
        while not _state.arrived and not _state.stepping:
            if select.select([reader], [], [], _PATIENCE)[0]:
                break
            if not _state.arrived and not _state.stepping:
                _end(_state.message(), 1)
    os.close(reader)


def _end(message: str, code: int) -> None:
    console.show_cursor()  # a progress bar hides it
    print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(code)


class Signals:
    """SIGTERM and SIGINT in training: in a step the run stops after it and saves, elsewhere at once.

    With several processes, a signal to any of them stops all after the same step: each step they exchange one bit.
    """

    def __init__(self):
        self._pending: collections.deque[jax.Array] = collections.deque()
        if jax.process_count() > 1:
            devices = np.array(jax.devices())
            mesh = Mesh(devices, ("all",))
            self._by_device = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "Signals":
        """Takes the two signals over."""
        self._handled = handled()
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        _state.stepping = False
        self._handled.__exit__(None, None, None)

    @property
    def stepping(self) -> bool:
        """Whether a stop has to wait for the end of a step, because there is something to save."""
        return _state.stepping

    @stepping.setter
    def stepping(self, value: bool) -> None:
        _state.stepping = value

    def stop(self) -> bool:
        """Whether to stop after this step: the same answer, at the same step, on every process; call it each step."""
        if jax.process_count() == 1:
            return _state.arrived
        self._pending.append(self._tell())
        return len(self._pending) > _DELAY and bool(self._pending.popleft())

    def check(self) -> None:
        """Raises Interrupted, on every process, if a signal has arrived at any."""
        arrived = _state.arrived if jax.process_count() == 1 else bool(self._tell())
        if arrived:
            raise Interrupted("stopped between two stages: the same command continues", together=True)

    def _tell(self) -> jax.Array:
        here = _state.arrived  # read once: every device of the process tells the same
        bits = jax.make_array_from_callback((jax.device_count(),), self._by_device, lambda _: np.array([here]))
        return self._any(bits)

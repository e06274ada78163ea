"""Stopping a run: what a signal does, and how the run ends."""

import collections
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eim_jax.utils.console import console

_DELAY = 2  # steps after which the processes read what they agreed on: by then it is there, and no step waits for it


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived; the state is saved and the same command continues.

    `together`: every process stops here; else this one alone, in the middle of something.
    """

    def __init__(self, message: str, *, together: bool):
        super().__init__(message)
        self.together = together


class Signals:
    """SIGTERM and SIGINT: between steps the run stops at once, in a step after it; a second SIGINT always at once.

    With several processes, a signal to any of them stops all after the same step: each step they exchange one bit.
    """

    def __init__(self):
        self.stepping = self.arrived = False
        self._pending: collections.deque[jax.Array] = collections.deque()
        if jax.process_count() > 1:
            devices = np.array(jax.devices())
            mesh = Mesh(devices, ("all",))
            self._by_device = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "Signals":
        """Takes the two signals over."""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self) -> bool:
        """Whether to stop after this step: the same answer, at the same step, on every process; call it each step."""
        if jax.process_count() == 1:
            return self.arrived
        self._pending.append(self._tell())
        return len(self._pending) > _DELAY and bool(self._pending.popleft())

    def check(self) -> None:
        """Raises Interrupted, on every process, if a signal has arrived at any."""
        arrived = self.arrived if jax.process_count() == 1 else bool(self._tell())
        if arrived:
            raise Interrupted("stopped between two stages: the same command continues", together=True)

    def _tell(self) -> jax.Array:
        here = self.arrived  # read once: every device of the process tells the same
        bits = jax.make_array_from_callback((jax.device_count(),), self._by_device, lambda _: np.array([here]))
        return self._any(bits)

    def _note(self, number, _):
        if self.arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = True
        if not self.stepping:
            raise Interrupted("stopped between two stages: the same command continues", together=False)
        console.print("stopping after this step; the state will be saved", soft_wrap=True)

"""What a stage measures of itself: means of its metrics, speed, waiting, and whether all is finite."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.data.records import Split
from eim_jax.logs import StageInfo
from eim_jax.partition import Flat


class NonFinite(FloatingPointError):
    """A loss became NaN or infinite; names the term, the step and the samples."""


class Meter:
    """Means of the metrics since the last read, the finite check, and the share of time spent waiting for data."""

    def __init__(self, info: StageInfo, split: Split):
        self._info, self._split = info, split
        self._pending: list[tuple[int, np.ndarray, dict]] = []
        self._latest: tuple[int, np.ndarray] = (0, np.zeros(0, np.int32))
        self._wait = self._total_wait = 0.0
        self._start = self._first = time.monotonic()

    def restart(self) -> None:
        """Leaves the compilation out of the speed."""
        self._wait, self._start, self._first = 0.0, time.monotonic(), time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that gets a batch: its time is waiting for data."""
        if len(self._pending) > 1:  # at most two steps in flight: while the device is busy, nothing waits for data
            jax.block_until_ready(self._pending[-2][-1])
        begun = time.monotonic()
        yield
        self._wait += time.monotonic() - begun

    def rows(self, number: int, index: np.ndarray) -> None:
        """The sample rows of the step that comes, for messages."""
        self._latest = (number, np.asarray(index))

    def add(self, metrics: dict) -> None:
        """The step's metrics, still on the device."""
        self._pending.append((*self._latest, metrics))

    def check(self) -> list[dict]:
        """Waits for the pending steps; raises NonFinite for the first one with a loss that is not a number."""
        fetched = jax.device_get([metrics for *_, metrics in self._pending])
        for (number, rows, _), metrics in zip(self._pending, fetched, strict=True):
            watched = {name: value for name, value in metrics.items() if name.startswith("loss") or name == "grad_norm"}
            bad = [name for name, value in watched.items() if not np.isfinite(value)]
            if bad:
                ids = ", ".join(self._split.samples[row].id for row in rows)
                terms = ", ".join(f"{name} = {metrics[name]}" for name in bad)
                raise NonFinite(
                    f"stage {self._info.name}, step {number + 1}: {terms}. Samples of this batch: {ids}. Nothing "
                    "was saved since. Try a lower lr, clip_norm or towers.dtype=float32, in a new --workdir."
                )
        return fetched

    def read(self) -> dict[str, float]:
        """The means since the last read, examples/s and the share of time spent waiting; raises as `check`."""
        fetched = self.check()
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-9)
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        ordered = {"loss": means.pop("loss"), **means}
        ordered["examples_per_second"] = len(fetched) * self._info.batch / elapsed
        ordered["data_wait"] = min(self._wait / elapsed, 1.0)
        self._total_wait += self._wait
        self._pending, self._wait, self._start = [], 0.0, now
        return ordered

    def wait_share(self) -> float:
        """Time spent waiting for data, as a share of the stage."""
        return min(self._total_wait / max(time.monotonic() - self._first, 1e-9), 1.0)


@jax.jit
def _all_finite(flat: Flat) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in flat.items()}


def check_finite(trained: Flat, name: str, step: int) -> None:
    """Raises NonFinite, naming the leaves, before a parameter that is not a number is saved."""
    bad = [path for path, fine in jax.device_get(_all_finite(trained)).items() if not fine]
    if bad:
        raise NonFinite(
            f"stage {name}, step {step}: the update made {', '.join(bad[:5])} not finite. Nothing was saved since. Try "
            "a lower lr, clip_norm or towers.dtype=float32, in a new --workdir."
        )

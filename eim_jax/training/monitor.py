"""What a stage measures of itself: means of its metrics, speed, where its time goes, and whether all is finite."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.data.samples import Split
from eim_jax.models.batch import Batch
from eim_jax.training.log import StageInfo
from eim_jax.training.partition import Flat


class NonFinite(FloatingPointError):
    """A loss became NaN or infinite; names the term, the step and the samples."""


class Meter:
    """Means of the metrics since the last read, the finite check, and the shares of time and of padding.

    Time is "data_wait" (no batch was ready), "device" (the loop waited for the devices; on CPUs also the call of the
    step, which computes there) or "host" (all else: dispatch, logs, saving). Compiling counts as none of them.

    "mfu" is the model's FLOP utilisation: the matrix products of the steps (utils/flops.py, what is recomputed for
    memory's sake included) over what the chips could have done in that time.
    """

    def __init__(self, info: StageInfo, split: Split, peak: float = 0.0):
        self._info, self._split, self._peak = info, split, peak  # FLOP/s of all devices together; 0: not known
        self._pending: list[tuple[int, np.ndarray, dict]] = []
        self._latest: tuple[int, np.ndarray] = (0, np.zeros(0, np.int32))
        self._spent: dict[str, float] = defaultdict(float)  # since the last read: seconds by kind, tokens
        self._total: dict[str, float] = defaultdict(float)  # in the stage
        self._restored = 0  # of the pending steps, those that were done before this process began
        self._here = [0.0, 0]  # seconds and steps of this process up to the last read
        self._start = time.monotonic()
        self._calls_compute = jax.default_backend() == "cpu"

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._spent[kind] += time.monotonic() - begun

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no part of the steps, compilation and scores: leaves it out of the speed."""
        begun = time.monotonic()
        yield
        self._start += time.monotonic() - begun

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that gets a batch: its time is waiting for data."""
        if len(self._pending) > 1:  # at most two steps in flight: while the device is busy, nothing waits for data
            with self._timed("device"):
                jax.block_until_ready(self._pending[-2][-1])
        with self._timed("data_wait"):
            yield

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the call of the compiled step."""
        with self._timed("device" if self._calls_compute else "host"):
            yield

    def rows(self, number: int, batch: Batch) -> None:
        """The batch of the step that comes, as NumPy arrays: its rows for messages, its padding."""
        self._latest = (number, np.asarray(batch.index))
        if batch.valid is not None:
            real, empty = int(batch.valid.sum()), int(batch.valid.size - batch.valid.sum())
            if batch.packing is not None:  # once for each time that the language model reads the texts
                real *= len(batch.packing)
                empty = sum(int((packing.segment < 0).sum()) for packing in batch.packing.values())
            self._spent["tokens"] += real + empty
            self._spent["padded"] += empty

    def add(self, metrics: dict, flops: float = 0.0) -> None:
        """The step's metrics, still on the device, and its FLOPs."""
        self._spent["flops"] += flops
        self._pending.append((*self._latest, metrics))

    def check(self) -> list[dict]:
        """Waits for the pending steps; raises NonFinite for the first one with a loss that is not a number."""
        with self._timed("device"):
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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: a run that continues then logs what it would have logged; as `check`."""
        steps = [{name: float(value) for name, value in metrics.items()} for metrics in self.check()]
        padding = {kind: self._spent[kind] for kind in ("tokens", "padded")}
        return {"steps": steps, "padding": padding, "total": dict(self._total)}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from a checkpoint's `state`; None: one written before there was any."""
        if state is None:
            return
        nobody = np.zeros(0, np.int32)  # these steps were checked before they were saved
        self._pending = [(0, nobody, {k: np.float32(v) for k, v in metrics.items()}) for metrics in state["steps"]]
        self._restored = len(self._pending)
        self._spent.update(state["padding"])
        self._total.update(state["total"])

    def read(self) -> dict[str, float]:
        """The means since the last read, examples/s and the shares; raises as `check`."""
        fetched = self.check()
        now = time.monotonic()
        self._spent["elapsed"] = now - self._start
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        ordered = {"loss": means.pop("loss"), **means}
        timed, elapsed = len(fetched) - self._restored, max(self._spent["elapsed"], 1e-9)
        ordered["examples_per_second"] = timed * self._info.batch / elapsed
        if timed:
            ordered["seconds_per_step"] = elapsed / timed
        if self._peak:
            ordered["mfu"] = self._spent["flops"] / elapsed / self._peak
        self._here = [self._here[0] + elapsed, self._here[1] + timed]
        ordered |= _shares(self._spent)
        for kind, amount in self._spent.items():
            self._total[kind] += amount
        self._pending, self._start, self._restored = [], now, 0
        self._spent.clear()
        return ordered

    def so_far(self) -> tuple[float, int]:
        """Seconds and steps of this process so far, compilation and scores apart; waits for the pending steps."""
        self.check()
        seconds, steps = self._here
        return seconds + time.monotonic() - self._start, steps + len(self._pending) - self._restored

    def shares(self) -> dict[str, float]:
        """The shares of the stage up to the last read: of its time, and of padding among its text tokens."""
        return _shares(self._total)


def _shares(spent: dict[str, float]) -> dict[str, float]:
    """data_wait, device and host, which add to 1; "padding" of the tokens where there are any."""
    elapsed = max(spent["elapsed"], spent["data_wait"] + spent["device"], 1e-9)
    found = {kind: spent[kind] / elapsed for kind in ("data_wait", "device")}
    found["host"] = 1.0 - found["data_wait"] - found["device"]
    return found | ({"padding": spent["padded"] / spent["tokens"]} if spent["tokens"] else {})


@jax.jit
def _all_finite(flat: dict[str, Any]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in flat.items()}


def check_finite(trained: Flat, name: str, step: int) -> None:
    """Raises NonFinite, naming the leaves, before a parameter that is not a number is saved."""
    bad = [path for path, fine in jax.device_get(_all_finite(trained)).items() if not fine]
    if bad:
        raise NonFinite(
            f"stage {name}, step {step}: the update made {', '.join(bad[:5])} not finite. Nothing was saved since. Try "
            "a lower lr, clip_norm or towers.dtype=float32, in a new --workdir."
        )

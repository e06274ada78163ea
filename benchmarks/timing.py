"""Times of asynchronous work on one device, the device's own rates, and the memory that JAX and PyTorch took."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Side(NamedTuple):
    """Work that may return before it is done, and what waits for its result."""

    run: Callable[[], object]
    wait: Callable[[object], object] = jax.block_until_ready


def measure(sides: dict[str, Side], rounds: int = 5, least: float = 0.2) -> dict[str, list[float]]:
    """Returns seconds a call, one figure a round: in every round each side has its turn, of at least `least` seconds.

    Each side runs twice before. Calls of a turn are issued one after another and waited for at its end.
    """
    number = {}
    for name, side in sides.items():
        side.wait(side.run())
        number[name] = max(1, min(100, round(least / max(_turn(side, 1), 1e-6))))
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(_turn(side, number[name]))
    return found


def _turn(side: Side, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        result = side.run()
    side.wait(result)
    return (time.perf_counter() - start) / number


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """How many times as long `theirs` takes: the median of the rounds' own ratios."""
    return statistics.median(t / o for o, t in zip(times[ours], times[theirs], strict=True))


def rates(matmul: int, copy: int, dtype) -> dict[str, float]:
    """The device's best FLOP/s on a square product of side `matmul`, and bytes/s on a copy of `copy` bytes.

    Random numbers, since a product of zeros can run faster; a copy's bytes are counted read and written.
    """

    def best(work, x, per, number):
        jax.block_until_ready(work(x))
        return per / min(_turn(Side(lambda: work(x)), number) for _ in range(5))

    square = jax.random.normal(jax.random.key(0), (matmul, matmul), dtype)
    line = jax.random.normal(jax.random.key(1, impl="rbg"), (copy // jnp.dtype(dtype).itemsize,), dtype)
    return {
        "matmul_flops_per_s": best(jax.jit(lambda x: x @ x), square, 2 * matmul**3, 20),
        "copy_bytes_per_s": best(jax.jit(lambda x: -x), line, 2 * line.nbytes, 5),
    }


class DevicePeak:
    """The most bytes that JAX's allocator held in a `with` block; None where it does not say.

    JAX's counter is never reset: None too where an earlier case had held more.
    """

    bytes: int | None = None

    def __enter__(self) -> "DevicePeak":
        """Notes the counter."""
        gc.collect()
        self._before = _peak()
        return self

    def __exit__(self, *_: object) -> None:
        """Notes how far it rose."""
        after = _peak()
        self.bytes = after if after is not None and after > (self._before or 0) else None


def _peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

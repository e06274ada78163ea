"""What the sections of benchmarks/gpu.py share: sizes, the setting of a run, the sides, what a row holds."""

import gc
import math
import statistics
from typing import Any, NamedTuple

import jax
from step_case import Case, Updates, nbytes
from timing import DevicePeak, Side, measure, ratio

from eim_jax.parallel.chips import Chip, chip_of, platform_of
from eim_jax.planning.expected import expected_seconds, lower_bounds
from eim_jax.utils.flops import work

try:  # one answer for all that the other side needs
    import torch
    import torch_lavin  # noqa: F401
    import torch_steps
    import transformers  # noqa: F401
except ImportError as error:  # the other side's columns stay empty
    torch, NO_TORCH = None, str(error)
else:
    if not torch.cuda.is_available():  # its threads would wait for JAX's
        torch.set_num_threads(1)

FULL = {
    "matmul": 8192,
    "copy": 1 << 32,
    "keys": (566_747, 12_726, 10_000_000),
    "queue": (40, 768),
    "clipcap": (40, 256),
    "lavin": (
        ("adapter", "none", "full", 1, "softmax"),
        ("adapter", "none", "full", 1, "cudnn"),
        ("adapter", "nf4", "full", 1, "softmax"),
        ("adapter", "none", "dots", 2, "softmax"),
        ("ie", "none", "full", 1, "softmax"),
        ("st", "none", "full", 1, "softmax"),
        ("lm", "none", "full", 1, "softmax"),
        ("ie", "nf4", "full", 1, "softmax"),
        ("lm", "nf4", "full", 1, "softmax"),
    ),
    "lavin_size": "7b",
    "lavin_batch": 32,
    "decode": (40, 50, 40),
    "rounds": 5,
    "least": 0.3,
}
TINY = {
    "matmul": 256,
    "copy": 1 << 22,
    "keys": (700, 300),
    "queue": (4, 64),
    "clipcap": (4,),
    "lavin": (
        ("adapter", "none", "full", 1, "softmax"),
        ("adapter", "nf4", "full", 2, "xla"),
        ("st", "none", "full", 1, "softmax"),
    ),
    "lavin_size": "smallest",
    "lavin_batch": 4,
    "decode": (2, 4, 6),
    "rounds": 2,
    "least": 0.0,
}


class Setting(NamedTuple):
    """What all sections share; `modes` are PyTorch's: of "compiled" and "eager"."""

    size: str
    dtype: str
    modes: tuple[str, ...]
    peak: dict[str, float]  # timing.rates' figures; empty until they are measured
    attention: str = "softmax"  # of ClipCap's towers where no weight drops out, as config.towers.attention

    @property
    def numbers(self) -> dict[str, Any]:
        """The sizes of every section."""
        return FULL if self.size == "full" else TINY

    @property
    def device(self) -> "torch.device":
        """Where PyTorch works."""
        return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")

    def measure(self, sides: dict[str, Side]) -> dict[str, list[float]]:
        """timing.measure with this size's rounds."""
        return measure(sides, self.numbers["rounds"], self.numbers["least"])

    def target(self, words: str, value: float, met: bool) -> dict | None:
        """A target's verdict; at other sizes than the full one there is none."""
        return {"words": words, "value": value, "met": bool(met)} if self.size == "full" else None


def jax_step(case: Case, name: str) -> tuple[dict[str, Side], dict]:
    """The compiled step with random arguments, one update done, and the row that says what it is."""
    with DevicePeak() as peak:
        step = Updates(case)
        loss = float(step.run())
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: the loss of random weights is {loss}")
    ours = {"loss": loss, "compile_seconds": step.compile_seconds, **memory(step.buffers, peak)}
    ours["trained"] = sum(leaf.size for leaf in case.arguments[0].values())
    device = jax.devices()[0]
    if (chip := chip_of(device.device_kind)) is not None:
        ours["expected_seconds"] = expected_of(case, chip, platform_of(device))
    return {"ours": Side(step.run)}, {"case": name, "ours": ours, "torch": {}}


def expected_of(case: Case, chip: Chip, platform: str) -> float:
    """What --mode=plan would expect of the step on one such chip, in seconds."""
    done = work(case.step.trace(*case.arguments).jaxpr)
    state = {"trained": nbytes(case.arguments[0]), "optimizer": nbytes(case.arguments[1])}
    return expected_seconds(lower_bounds(done, chip, 1, sent={}, **state), platform)


def modes_of(setting: Setting) -> tuple[str, ...]:
    """PyTorch's modes that are asked for and possible."""
    return setting.modes if torch is not None else ()


def memory(held: dict[str, int], peak: DevicePeak) -> dict:
    """Bytes that the compiler states, and that the device held."""
    return {"compiled_bytes": held["peak"], "device_peak_bytes": peak.bytes}


def torch_side(setting: Setting, run) -> Side:
    """PyTorch's work as a side of a measurement."""
    return Side(run, lambda _: torch_steps.wait(setting.device))


class TorchPeak:
    """The most bytes that PyTorch's allocator held in a `with` block above what it held before."""

    def __init__(self, setting: Setting):
        self.cuda, self.found = setting.device.type == "cuda", {}

    def __enter__(self) -> "TorchPeak":  # noqa: D105
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:  # noqa: D105
        if self.cuda:
            torch.cuda.synchronize()
            self.found = {"device_peak_bytes": torch.cuda.max_memory_allocated() - self.before}


def fill(row: dict, times: dict[str, list[float]], samples: int) -> None:
    """Adds medians, rates and the ratio to PyTorch's first mode."""
    for name, seconds in times.items():
        part = row["ours"] if name == "ours" else row["torch"][name]
        median = statistics.median(seconds)
        part |= {"seconds": median, "seconds_all": seconds, "samples_per_s": samples / median}
    others = [name for name in times if name != "ours"]
    if others and "ours" in times:
        row["ratio"], row["ratio_to"] = ratio(times, "ours", others[0]), others[0]


def fill_share(row: dict, flops: float, setting: Setting) -> None:
    """Adds the share of the matmul peak that `flops` in the measured time are."""
    share = flops / row["ours"]["seconds"] / setting.peak["matmul_flops_per_s"]
    row["ours"] |= {"flops": flops, "share": share, "share_of": "matmul peak"}

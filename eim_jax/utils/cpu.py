"""Which processor this is, and which units it multiplies matrices with."""

import functools
import pathlib
import platform

# What of a processor decides the rate of its matrix products, as Linux names it; the last two multiply bfloat16.
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BF16_UNITS = UNITS[2:]


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def vector_units() -> tuple[str, ...]:
    """Which of UNITS the processor has, by the system's flags; () where it lists none."""
    flags = _cpuinfo("flags").split()
    return tuple(unit for unit in UNITS if unit in flags)


@functools.cache
def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; "" where there is none."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")

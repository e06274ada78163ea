"""Accelerators with their published figures, and which of them a device is."""

import re
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One device: bytes of memory, bf16 FLOP/s, bytes/s from memory, bytes/s out to other chips (one direction)."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    source: str


_TPU = "cloud.google.com/tpu/docs/"
_NVIDIA = "nvidia.com/en-us/data-center/"
# Interconnect is published for both directions together (TPU v5e, v5p, v6e; NVLink): half of it here.
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 275e12, 1200e9, 300e9, _TPU + "v4"),
    "v5e": Chip("TPU v5e", 16 * GIB, 197e12, 819e9, 200e9, _TPU + "v5e"),
    "v5p": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9, 600e9, _TPU + "v5p"),
    "v6e": Chip("TPU v6e", 32 * GIB, 918e12, 1638e9, 400e9, _TPU + "v6e"),
    "a100": Chip("A100 SXM 80 GB", 80 * 10**9, 312e12, 2039e9, 300e9, _NVIDIA + "a100"),
    "h100": Chip("H100 SXM", 80 * 10**9, 989e12, 3350e9, 450e9, _NVIDIA + "h100"),
    "h200": Chip("H200 SXM", 141 * 10**9, 989e12, 4800e9, 450e9, _NVIDIA + "h200"),
    # No NVLink: what is sent goes over PCIe 4.0 x16, 32 GB/s in one direction.
    "l4": Chip("L4", 24 * 10**9, 121e12, 300e9, 32e9, _NVIDIA + "l4"),
    "rtx4090": Chip("RTX 4090", 24 * 10**9, 165.2e12, 1008e9, 32e9, "NVIDIA's Ada architecture whitepaper"),
}
KINDS = {  # a pattern in a device's own name -> the chip
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "A100": "a100",
    "H100": "h100",
    "H200": "h200",
    "L4": "l4",
    "RTX 4090$": "rtx4090",  # not the D, nor the Laptop's
}


def chip_of(kind: str) -> Chip | None:
    """Returns the chip that a device is, by its own name; None for one without figures.

    >>> chip_of("NVIDIA H100 80GB HBM3").name, chip_of("cpu")
    ('H100 SXM', None)
    """
    ordered = sorted(KINDS.items(), reverse=True)
    return next((CHIPS[name] for words, name in ordered if re.search(rf"\b{words}\b", kind)), None)


def platform_of(device: Any) -> str:
    """Returns a JAX device's platform, "cuda" where JAX says "gpu" of an NVIDIA GPU that computes in bfloat16.

    Those are of compute capability 8.0 (Ampere) or later: what is written for them alone, cuDNN's attention, is chosen
    by this word.
    """
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return device.platform
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return "cuda" if int(major or 8) >= 8 else "gpu"

"""NVIDIA GPUs for XLA's GPU compiler to compile for, none of which need be here.

The compiler is JAX's CUDA plugin with NVIDIA's libraries (extra `plan-gpu`); it needs a description of the chip.
"""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

from eim_jax.config import ConfigError

INSTALL = "pip install '.[plan-gpu]' in eim_jax's folder, in an environment of its own where no GPU is"
# Triton's matrix products are chosen by timing them on the GPU: where none is, cuBLAS's are taken.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Description(NamedTuple):
    """What decides a GPU program, by NVIDIA's data sheets and the CUDA programming guide's table of capabilities.

    Attributes:
      name: by which the device calls itself.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      threads: the most that one holds.
      shared: bytes of shared memory of each.
      cache: bytes of the second-level cache.
      clock: at most, in GHz.
      bandwidth: bytes per second from memory.
      memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    cache: int
    clock: float
    bandwidth: int
    memory: int


_KIB, _MIB = 1 << 10, 1 << 20
DESCRIPTIONS = {
    "a100": Description(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * _KIB, 40 * _MIB, 1.41, 2039 * 10**9, 81157 * _MIB)
    ),
    "h100": Description(
        *("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98, 3352 * 10**9, 80995 * _MIB)
    ),
    "h200": Description(
        *("NVIDIA H200", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98, 4800 * 10**9, 143771 * _MIB)
    ),
    "l4": Description(*("NVIDIA L4", (8, 9), 58, 128, 1536, 100 * _KIB, 48 * _MIB, 2.04, 300 * 10**9, 23034 * _MIB)),
    "rtx4090": Description(
        *("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100 * _KIB, 72 * _MIB, 2.52, 1008 * 10**9, 24564 * _MIB)
    ),
}


@functools.cache
def has_gpu_compiler() -> bool:
    """Whether a CUDA plugin of JAX is installed, with or without a GPU."""
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12))
    except ModuleNotFoundError:  # no plugin at all
        return False


def target_config(chip: str) -> str:
    """Returns the chip's description as XLA reads it (stream_executor.GpuTargetConfigProto, as text)."""
    c = DESCRIPTIONS[chip]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * _KIB,
        "shared_memory_per_core": c.shared,
        "threads_per_core_limit": c.threads,
        "core_count": c.cores,
        "fpus_per_core": c.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": c.bandwidth,
        "l2_cache_size": c.cache,
        "clock_rate_ghz": c.clock,
        "device_memory_size": c.memory,
        "shared_memory_per_block_optin": c.shared - _KIB,  # one KiB of each block is the system's
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    major, minor = c.capability
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 } '
        f'device_description_str: "{c.name}"'
    )


def devices_of(topology: str, chip: str, hosts: int, each: int) -> list[Any]:
    """Returns the devices of so many hosts with so many GPUs each, to compile for.

    Raises:
      ConfigError: the plugin is there and does not work.
    """
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to ask
    options = {"target_config": target_config(chip), "topology": f"{hosts}x1x{each}"}  # a process a host
    try:
        found = topologies.get_topology_desc(platform="cuda", topology_name=chip, **options)
    except Exception as error:  # XLA raises its own kinds
        why = str(error).splitlines()[0]
        raise ConfigError(f"--topology={topology}: the GPU compiler does not start ({why}): {INSTALL}") from error
    return list(found.devices)

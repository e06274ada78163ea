"""What a plan is for: chips with their published figures, topologies by name, and the devices to compile for.

`v5e:4x4` and its like need no TPU: libtpu compiles for a topology that is not here, and so does JAX's CUDA plugin for
`gpu:h100x8`. Where neither is installed, as many fake CPU devices stand in.
"""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
import psutil

from eim_jax.config import ConfigError
from eim_jax.parallel.chips import CHIPS, GIB, Chip, chip_of, platform_of
from eim_jax.planning import gpus

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")  # v4 and v5p, and larger
FORMS = (
    f"v5e: or v6e: and {', '.join(FLAT)}; v4: or v5p: and {', '.join(SOLID)} (larger ones too); "
    f"gpu: and {', '.join(f'{chip}xN' for chip in gpus.DESCRIPTIONS)}, on several hosts h100xHOSTSxN; cpu:N"
)

# configs/NAME.py -> the smallest v5e slice that its heaviest stage fits, at the batch of the paper; and that stage.
SMALLEST = {
    "clipcap_small_coco": ("v5e:1x1", "base"),
    "clipcap_large_coco": ("v5e:2x2", "base"),
    "clipcap_eim_coco": ("v5e:1x1", "ie"),
    "llama_adapter_scienceqa": ("v5e:2x2", "base"),
    "llama_adapter_eim_scienceqa": ("v5e:2x2", "ie"),
    "lavin7b_scienceqa": ("v5e:2x2", "base"),
    "lavin7b_eim_scienceqa": ("v5e:2x2", "ie"),
    "lavin7b_eim_chat": ("v5e:2x2", "ie"),
    "lavin13b_scienceqa": ("v5e:2x2", "base"),
    "llava_lora": ("v5e:4x4", "ie"),
}

_GPU = re.compile(rf"({'|'.join(gpus.DESCRIPTIONS)})x(?:([1-9]\d*)x)?([1-9]\d*)")  # chip, hosts, of each


class Target(NamedTuple):
    """Where the planned program would run. `exact`: its own compiler made it; else fake CPU devices stand in."""

    name: str
    chip: Chip
    devices: list
    platform: str
    exact: bool
    note: str


def parse(topology: str) -> tuple[str, str, int]:
    """Returns (tpu | gpu | cpu, chip, number of devices); raises ConfigError with the valid forms."""
    kind, _, size = topology.partition(":")
    if kind in ("v5e", "v6e", "v4", "v5p") and re.fullmatch(r"\d+(x\d+){1,2}", size):
        sides = [int(n) for n in size.split("x")]
        number = 1
        for side in sides:
            number *= side
        if number and len(sides) == (2 if kind in ("v5e", "v6e") else 3):
            return "tpu", kind, number
    if kind == "gpu" and (found := _GPU.fullmatch(size)):
        return "gpu", found[1], int(found[2] or 1) * int(found[3])
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return "cpu", "cpu", int(size)
    raise ConfigError(f"--topology={topology}: no such topology. Valid: {FORMS}")


def prepare(topology: str) -> None:
    """Before JAX looks for devices: a named topology needs the CPU alone, and maybe more fake devices of it."""
    if not topology:
        return
    _, _, number = parse(topology)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(number, 1))


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def target(topology: str) -> Target:
    """The devices of a named topology, or with "" those that are here.

    Raises ConfigError for a name that does not exist, and where fewer fake devices can be had.
    """
    if not topology:
        devices = jax.devices()
        chip, note = _here(devices)
        return Target("the devices here", chip, devices, platform_of(devices[0]), True, note)
    platform, kind, number = parse(topology)
    if platform == "cpu":
        chip, note = _host(number)
        return Target(topology, chip, _fake(number, topology), "cpu", True, note)
    if platform == "tpu" and has_libtpu():
        from jax.experimental import topologies

        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        cores = {"chip_config_name": "megacore"} if kind == "v4" else {}  # both cores of a chip as one device
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **cores)
        except Exception as error:  # libtpu raises its own kinds
            raise ConfigError(f"--topology={topology}: {str(error).splitlines()[0]}. Valid: {FORMS}") from error
        return Target(topology, CHIPS[kind], list(found.devices), "tpu", True, "compiled by libtpu for this topology")
    if platform == "gpu" and gpus.has_gpu_compiler():
        hosts = int(_GPU.fullmatch(topology.partition(":")[2])[2] or 1)
        found = gpus.devices_of(topology, kind, hosts, number // hosts)
        note = "compiled by XLA's GPU compiler for this topology, all matrix products by cuBLAS"
        return Target(topology, CHIPS[kind], found, "cuda", True, note)
    stand_in = "fake CPU devices stand in: arguments and shardings are exact, temporaries an upper bound"
    compiler = {"tpu": "libtpu is not installed (EXTRAS=tpu, or pip install libtpu)"}
    missing = compiler.get(platform, f"XLA's GPU compiler is not installed ({gpus.INSTALL})") + ": "
    platform = "cuda" if platform == "gpu" else platform
    return Target(topology, CHIPS[kind], _fake(number, topology), platform, False, missing + stand_in)


def _fake(number: int, topology: str) -> list:
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise ConfigError(
            f"--topology={topology}: {number} CPU devices are needed and this process began with {len(devices)}: "
            f"set jax_num_cpu_devices before JAX starts, or use python -m eim_jax.main --mode=plan"
        )
    return devices[:number]


def _host(number: int) -> tuple[Chip, str]:
    """A share of this machine's memory and cores; its rates are assumed, not published."""
    memory, cores = psutil.virtual_memory().total, os.cpu_count() or 1
    chip = Chip("CPU", memory // number, 50e9 * cores / number, 20e9 / number, 20e9 / number, "assumed")
    return chip, f"{number} device(s) share {memory / GIB:.0f} GiB and {cores} cores; 50 GFLOP/s a core is assumed"


def _here(devices: list) -> tuple[Chip, str]:
    if devices[0].platform == "cpu":
        return _host(len(devices))
    kind = devices[0].device_kind
    chip = chip_of(kind)
    if chip is None or "40GB" in kind:  # an A100 with half the memory
        raise ConfigError(f"no figures for the device {kind!r}: name a --topology. Valid: {FORMS}")
    return chip, f"compiled for the {len(devices)} {kind} here"

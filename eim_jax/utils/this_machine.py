"""Which packages and which hardware a run has, for its records."""

import os
import platform
import time
from importlib import metadata

import jax
import psutil


def versions() -> dict[str, str]:
    """The packages that decide a run's numbers."""
    names = ("eim_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def machine() -> dict[str, str | int]:
    """What the run ran on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def seconds_alive() -> float:
    """How long ago this process began, the loading of its packages included."""
    return time.time() - psutil.Process().create_time()

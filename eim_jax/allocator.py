"""The C library's allocator, told to keep what XLA's programs on the CPU free after every step."""

import ctypes
import importlib.util
from importlib import metadata

# mallopt's parameters, from malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc hold on to freed blocks until the process ends; True if it does so from now on.

    XLA's CPU programs allocate their temporaries anew in every step. As it comes, glibc gives large freed blocks back,
    and the system clears all their pages again in the next step; a small model's step takes a quarter longer for that
    (benchmarks/allocator.py). One heap that is never given back avoids it, and never shrinks.

    Call it before JAX starts its threads, which would have heaps of their own. Does nothing where JAX has a plugin for
    an accelerator, as this is not measured there, and without glibc.
    """
    if metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
    return mallopt is not None and all([mallopt(*pair) for pair in settings])

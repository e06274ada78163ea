"""Python's collector of circular garbage, switched off where many objects are made and none is thrown away."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Makes no search for circular garbage in its body: half a million new objects set off searches over all of them.

    >>> with collector_paused():
    ...     gc.isenabled()
    False
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()

"""An error whose cause lies outside the program, as a message that says what to do."""

import traceback

import jax

from eim_jax.parallel import signals
from eim_jax.utils.files import DiskFull, full_disk

_MEMORY = (
    "What takes less in training: --config.stages.NAME.accumulate=2 (the same batch in two parts), "
    "--config.towers.remat=full (more computation), a smaller config.stages.NAME.batch (in a new workdir). "
    "In scoring and captions: a smaller --config.decode.batch. --mode=plan says what each stage takes."
)


def in_words(error: Exception, place: str | None) -> str | None:
    """Returns what a user is told of an error whose cause lies outside the program; None for one of the program's own.

    Args:
      error: a full disk, exhausted memory, bad input, a program that stopped on the devices.
      place: what the run writes into, for a full disk that names no file.
    """
    shows = f"({type(error).__name__}; --traceback shows where)"
    if (reason := full_disk(error)) is not None:
        if not isinstance(error, DiskFull):
            what = place or "a file of this run"
            reason = f"{what} cannot be written: {reason}. Make room there; then the same command continues"
        return f"error: {reason}\n{shows}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        words = next(iter(str(error).splitlines()), "")[:300]
        return f"error: out of memory while {signals.activity()}: {words}\n{_MEMORY}\n{shows}"
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return f"error: {error}\n{shows}"
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized():
        return (
            f"error: a program stopped on the devices: {error}\nIf another process was lost, the same command on "
            f"every host continues from the last checkpoint.\n{traceback.format_exc()}"
        )
    return None

"""A stage's step, compiled for each shape of its batches: one width of texts, or one shape of packed rows."""

import time
from typing import Any, NamedTuple

from eim_jax.models.batch import Batch
from eim_jax.parallel.signals import doing
from eim_jax.utils.console import console, duration
from eim_jax.utils.flops import work


class Program(NamedTuple):
    """A stage's step for one width of texts or shape of packed rows, and its matrix products' FLOPs on all devices."""

    compiled: Any
    flops: float


def shape_of(batch: Batch) -> tuple:
    """Returns what tells a stage's programs apart.

    Args:
      batch: tokens [b, width], or none; packed readings as [parts, rows, length].

    Returns:
      (width, 0 without texts, then for each packed reading (its name, rows, length)).
    """
    width = 0 if batch.tokens is None else batch.tokens.shape[1]
    packed = batch.packing or {}
    return (width, *((name, *packed[name].segment.shape[1:]) for name in sorted(packed)))


def compile_step(stage: str, step: Any, arguments: tuple, shape: tuple, before: int, most: int) -> Program:
    """Compiles a stage's step for one shape of batches, and says so in the log.

    Args:
      stage: its name.
      step: the jitted step.
      arguments: what it is called with, or their shapes.
      shape: of the batch, by `shape_of`.
      before: how many programs of its sort, packed or not, the stage has.
      most: how many it may have.

    Raises:
      RuntimeError: it has as many already.
    """
    width, *packed = shape
    if before == (most if width else 1):
        raise RuntimeError(
            f"stage {stage}: texts of {width} tokens are a width beyond the {before} that config.data.buckets allows: "
            "this is a defect of eim_jax, please report it"
        )
    texts = f" for texts of {width} tokens" if width and (most > 1 or packed) else ""
    if packed:
        rows = ", ".join(f"{name} {count} x {length} slots" for name, count, length in packed)
        texts = f" for packed texts ({rows})"
    console.print(f"compiling {stage}{texts}", soft_wrap=True)
    doing(f"compiling {stage}")
    begun = time.monotonic()
    traced = step.trace(*arguments)
    program = Program(traced.lower().compile(), work(traced.jaxpr).flops)
    console.print(f"compiled {stage}{texts} in {duration(time.monotonic() - begun)}", soft_wrap=True)
    doing(f"training {stage}")
    return program


def peak_memory(compiled) -> int | None:
    """Returns the bytes that a compiled step holds on each device: arguments, temporaries and outputs not aliased.

    None where the platform does not say.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return int(held + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)

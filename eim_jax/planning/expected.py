"""What a step takes at least, and what it can be expected to take.

At least: at the published peak rates. Expected: at the shares of these that training reaches. The shares were measured
by others or, the memory's, assumed; none was measured here, and none is fitted to this project's steps.
"""

from collections.abc import Mapping
from typing import NamedTuple

from eim_jax.parallel.chips import Chip
from eim_jax.utils.flops import Work


class Shares(NamedTuple):
    """What is reached of each peak rate.

    Attributes:
      compute: of the arithmetic, recomputation counted, over a whole training step: what lies between the products,
        and the collectives behind them, is in it.
      memory: of the memory's bandwidth; assumed, no publication stands behind it.
      links: of the links' bandwidth.
      source: where the shares come from.
    """

    compute: float
    memory: float
    links: float
    source: str


SHARES = {
    # LLM Foundry, 0.76 to 13 billion parameters on 8 H100 at 512 to 2,048 tokens: 0.35 to 0.59, recomputation counted.
    # NCCL, on NVLink: 370 of 450 GB/s.
    "cuda": Shares(0.5, 0.8, 0.8, "LLM Foundry's H100 table and NCCL's 370 of 450 GB/s"),
    # MaxText, Llama 2 70B: 0.57 on v4 and v5e, 0.65 on v5p, recomputation not counted.
    "tpu": Shares(0.6, 0.8, 0.8, "MaxText's table for Llama 2"),
    # A CPU's rates are themselves assumed (targets.py).
    "cpu": Shares(1.0, 1.0, 1.0, "the rates are assumed as they stand"),
}
SHARES["gpu"] = SHARES["cuda"]  # other makers' and older ones


def lower_bounds(
    done: Work, chip: Chip, devices: int, *, sent: Mapping[str, float], trained: int, optimizer: int
) -> dict[str, float]:
    """Returns the seconds of a step at the chip's peak rates, by "compute", "memory" and "links".

    Args:
      done: of all devices.
      chip: which each of them is.
      devices: their number.
      sent: bytes that each sends, by kind of collective.
      trained: bytes of trained parameters that each holds.
      optimizer: bytes of the optimizer's state that each holds.
    """
    # Products read and write their share; gathered leaves are written and read again; the state is read and written.
    traffic = done.bytes / devices + 2 * sent.get("all-gather", 0.0) + 3 * trained + 2 * optimizer
    seconds = {"compute": done.flops / devices / chip.flops, "memory": traffic / chip.bandwidth}
    return seconds | {"links": sum(sent.values()) / chip.link}


def expected_seconds(seconds: Mapping[str, float], platform: str) -> float:
    """Returns the seconds that a step can be expected to take.

    Args:
      seconds: lower bounds by "compute", "memory" and "links", each at its peak rate.
      platform: "cuda", "tpu", "cpu" or "gpu".

    >>> round(expected_seconds({"compute": 0.08, "memory": 0.01, "links": 0.05}, "cuda"), 3)
    0.16
    """
    shares = SHARES[platform]
    return max(bound / getattr(shares, rate) for rate, bound in seconds.items())

"""Which mesh a run should take: of those on which every stage fits, the one that sends the least."""

import dataclasses
import math
from typing import NamedTuple

from eim_jax.config import Config
from eim_jax.parallel.sharding import AXES
from eim_jax.planning.plan import StagePlan, plan
from eim_jax.planning.targets import Target
from eim_jax.utils.console import console


class MeshPlan(NamedTuple):
    """All planned stages on one mesh (data, fsdp, tensor)."""

    mesh: tuple[int, ...]
    stages: tuple[StagePlan, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)

    @property
    def peak(self) -> int:
        """Bytes on a device in the stage that needs most."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all steps of all stages."""
        return math.fsum(sum(stage.sent.values()) * stage.steps for stage in self.stages)


def candidates(devices: int) -> list[tuple[int, ...]]:
    """Returns the meshes (data, fsdp, 1) of so many devices, data parallelism first.

    The axis "tensor" is left out: it is for a batch of fewer rows than there are devices, which these meshes refuse.

    >>> candidates(4)
    [(4, 1, 1), (2, 2, 1), (1, 4, 1)]
    """
    return [(devices // fsdp, fsdp, 1) for fsdp in range(1, devices + 1) if devices % fsdp == 0]


def compare(config: Config, target: Target, **options) -> tuple[list[MeshPlan], list[str]]:
    """Plans the stages on every candidate; also the notes. `options` are those of `plan`, which raises as there."""
    found, notes = [], []
    for mesh in candidates(len(target.devices)):
        console.print(f"mesh ({', '.join(AXES)}) = {mesh}", soft_wrap=True)
        stages, notes = plan(dataclasses.replace(config, mesh=mesh), target, **options)
        found.append(MeshPlan(mesh, tuple(stages)))
    return found, notes


def best(plans: list[MeshPlan]) -> MeshPlan | None:
    """Returns the mesh that sends least of those that fit, of equals the first; None where none fits."""
    return min((p for p in plans if p.fits), key=lambda p: p.sent, default=None)

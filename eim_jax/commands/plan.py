"""`--mode=plan`: what a config's stages cost, before anything is read or allocated."""

from collections.abc import Sequence
from pathlib import Path

from eim_jax.config import Config


def plan(
    config: Config,
    topology: str,
    *,
    command: str,
    arms: Sequence[str] = (),
    stages: Sequence[str] = (),
    samples: int = 0,
    out: Path | None = None,
    table: bool = False,
    meshes: bool = False,
) -> None:
    """Prints the stages' costs on a topology; reads no data, allocates no weight, writes nothing but `out`.

    Args:
      config: whose stages are planned.
      topology: "v5e:4x4", "gpu:h100x8", "cpu:8", ...; "" is what is here.
      command: the command line, which `out` records.
      arms: plans these alone; all by default.
      stages: plans these alone; all by default.
      samples: training samples N; 0 is what the data hold.
      out: a JSON file to write the costs to.
      table: prints where every parameter lies instead of the costs.
      meshes: compiles the stages for every mesh (data, fsdp, 1) in place of config.mesh and recommends one.
    """
    from eim_jax.planning import targets

    targets.prepare(topology)
    # Imported only now: a topology of CPUs is a number of devices, which has to be set before JAX starts.
    from eim_jax.planning import meshes as comparison
    from eim_jax.planning import plan as planning
    from eim_jax.planning import table as tables

    target = targets.target(topology)
    if table:
        tables.print_table(config, target)
        return
    options = {"samples": samples, "arms": arms, "only": stages}
    compared = []
    if meshes:
        compared, notes = comparison.compare(config, target, **options)
        shown = comparison.best(compared) or compared[-1]
        mesh, plans = shown.mesh, list(shown.stages)
    else:
        mesh = config.mesh
        plans, notes = planning.plan(config, target, **options)
    tables.print_plan(target, mesh, plans, notes)
    if compared:
        tables.print_meshes(target, compared)
    if out is not None:
        tables.write(out, command, target, mesh, plans, notes)

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
    """
    from eim_jax.planning import targets

    targets.prepare(topology)
    # Imported only now: a topology of CPUs is a number of devices, which has to be set before JAX starts.
    from eim_jax.planning import plan as planning
    from eim_jax.planning import table as tables

    target = targets.target(topology)
    if table:
        tables.print_table(config, target)
        return
    plans, notes = planning.plan(config, target, samples=samples, arms=arms, only=stages)
    tables.print_plan(target, config.mesh, plans, notes)
    if out is not None:
        tables.write(out, command, target, plans, notes)

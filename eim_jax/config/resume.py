"""Which fields a resumed run must share with the run that began, and the config that a work directory holds."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eim_jax.config.conversion import flatten, from_config_dict
from eim_jax.config.fields import Config
from eim_jax.utils.files import read_json

# Fields that may differ when a run resumes. The mesh, micro-batches, packed rows and recomputation change the order of
# sums, so parameters to rounding only (with dropout, micro-batches and packed rows also draw other noise).
# data.eval_limit is the test's.
FREE_ON_RESUME = {
    "arms",
    "log_every",
    "logging",
    "mesh",
    "profile",
    "towers.remat",
    "data.cache",
    "data.pack",
    "data.prepared",
    "data.threads",
    "data.eval_limit",
    "data.scored",
}
FREE_GROUPS = ("decode.", "checkpoint.", "eval.")
# With checkpoint.keep="best" these decide after all: which step is kept, and by what.
CHOOSING = ("checkpoint.keep", "checkpoint.metric", "eval.")
FREE_OF_ENTRIES = (".description", ".accumulate")  # of arm.*, of stages.*


def read_saved(workdir: Path) -> Config | None:
    """Reads the config that a work directory was trained with.

    Args:
      workdir: a run's work directory.

    Returns:
      The config in its run.json, or None for a fresh directory.

    Raises:
      ConfigError: run.json holds a config of another form.
      Damaged: it holds none.
    """
    path = workdir / "run.json"
    if not path.exists():
        return None
    values = read_json(path, {"config": dict})["config"]
    data = values.get("data")
    if isinstance(data, dict) and data.get("seam", "auto") == "auto":
        data["seam"] = recorded_seam(workdir)
    return from_config_dict(values)


def recorded_seam(workdir: Path) -> str | None:
    """Reads how a work directory's run joins prompt and answer (`data.seam`), as its tokenizer settled it.

    Args:
      workdir: a run's work directory.

    Returns:
      The seam in its run.json, "apart" for a run of an earlier version, None for a fresh directory.

    Raises:
      Damaged: run.json holds no text there.
    """
    path = workdir / "run.json"
    return read_json(path, optional={"seam": str}).get("seam", "apart") if path.exists() else None


def differences(old: Config, new: Config, free: Collection[str] = ()) -> list[str]:
    """Lists the fields whose change would make a resumed run another run.

    Args:
      old: what the work directory was trained with.
      new: what is asked for. Arms that only one of the two has are not compared.
      free: further fields that may change, by dotted name: those that data sets name (`datasets.free_on_resume()`).

    Returns:
      A line for each such field, with both values.
    """
    common = [name for name in new.arms if name in old.arms]
    if new.data.seam == "auto":  # as the work directory has it
        new = replace(new, data=replace(new.data, seam=old.data.seam))
    before, after = deciding(old, common, free), deciding(new, common, free)
    return [
        f"{name}: {before.get(name)!r} in the workdir, {after.get(name)!r} asked for"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def deciding(config: Config, arms: Sequence[str], free: Collection[str] = ()) -> dict[str, Any]:
    """Picks the fields that decide the parameters of some arms.

    Args:
      config: a run's config.
      arms: names of entries of `config.arm`.
      free: further fields that decide nothing, by dotted name.

    Returns:
      {dotted name: value}, without other arms and without stages that none of these reaches.
    """
    reached = {stage for name in arms for stage in config.arm[name].sequence}
    # The parts of a batch decide nothing but where each of them has a mean of its own.
    parts = {f"stages.{name}.accumulate" for name, stage in config.stages.items() if stage.loss_mean == "microbatch"}
    choosing = CHOOSING if config.checkpoint.keep == "best" else ()
    kept = {}
    for name, value in flatten(config).items():
        group, _, rest = name.partition(".")
        entry = rest.partition(".")[0]
        unreached = (group == "arm" and entry not in arms) or (group == "stages" and entry not in reached)
        decides_nothing = (
            name in FREE_ON_RESUME or name in free or name.startswith(FREE_GROUPS) or rest.endswith(FREE_OF_ENTRIES)
        )
        if not unreached and (not decides_nothing or name in parts or name.startswith(choosing)):
            kept[name] = value
    return kept

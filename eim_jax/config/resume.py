"""Which fields a resumed run must share with the run that began, and the config that a work directory holds."""

import json
from pathlib import Path
from typing import Any

from eim_jax.config.conversion import flatten, from_config_dict
from eim_jax.config.fields import Config

# Fields that may differ when a run resumes. The mesh, micro-batches and recomputation change the order of sums, so
# parameters to rounding only (with dropout, micro-batches also draw other noise). The last three are the test's.
FREE_ON_RESUME = {
    "arms",
    "log_every",
    "mesh",
    "profile",
    "towers.remat",
    "data.cache",
    "data.prepared",
    "data.threads",
    "data.eval_limit",
    "data.eval_annotations",
    "data.eval_images",
    "data.mme",
}
FREE_GROUPS = ("decode.", "checkpoint.")
FREE_OF_ENTRIES = (".description", ".accumulate")  # of arm.*, of stages.*


def read_saved(workdir: Path) -> Config | None:
    """The config that a workdir was trained with, None for a fresh one."""
    path = workdir / "run.json"
    return from_config_dict(json.loads(path.read_text())["config"]) if path.exists() else None


def differences(old: Config, new: Config) -> list[str]:
    """The fields, one line each, whose change would make a resumed run another run."""
    common = [name for name in new.arms if name in old.arms]
    before, after = deciding(old, common), deciding(new, common)
    return [
        f"{name}: {before.get(name)!r} in the workdir, {after.get(name)!r} asked for"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def deciding(config: Config, arms: list[str]) -> dict[str, Any]:
    """The flat fields that decide the parameters of these arms."""
    reached = {stage for name in arms for stage in config.arm[name].sequence}
    kept = {}
    for name, value in flatten(config).items():
        group, _, rest = name.partition(".")
        entry = rest.partition(".")[0]
        unreached = (group == "arm" and entry not in arms) or (group == "stages" and entry not in reached)
        free = name in FREE_ON_RESUME or name.startswith(FREE_GROUPS) or rest.endswith(FREE_OF_ENTRIES)
        if not unreached and not free:
            kept[name] = value
    return kept

"""A row of a table, and the cell that it is for one scale, budget and seed: a config file, overrides, one command.

A row is defined once (rows.py) and may stand in several tables. A cell is known by a hash of what decides its numbers,
so that it is run once however many tables, or rows, ask for it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import ml_collections

from configs import (
    clipcap_eim_coco,
    clipcap_large_coco,
    lavin7b_eim_chat,
    lavin7b_eim_scienceqa,
    lavin13b_scienceqa,
    llama_adapter_eim_scienceqa,
    miniature,
    miniature_chat,
    miniature_lavin,
    miniature_llama_adapter,
)
from eim_jax.config import Arm, Config, Stage, deciding, flatten, from_config_dict
from eim_jax.data import datasets
from eim_jax.losses.table import weights
from experiments import related

SCALES = ("miniature", "full")
BUDGETS = ("steps", "time", "paper")
DEFAULT = {"miniature": "steps", "full": "paper"}


@dataclass(frozen=True)
class Family:
    """Rows that start from one config: its file at each scale, and the budget that each of its rows gets.

    `steps` is the number of optimizer steps of a whole row, `warmup` the share of a stage that warms up (both the
    baseline's own); `settings` are overrides that make cells comparable and cheap. `rates` are the learning rates of
    the stages with loss_base, by what the ST receives (`Arm.features`; any other: "*"): chosen on the
    validation split (tuning.py).
    """

    configs: dict[str, ModuleType]
    steps: dict[str, int]
    warmup: dict[str, float]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[str, dict[str, float]] = field(default_factory=dict)


CHEAP = {"decode.methods": ("greedy",), "decode.java": False}
CLIPCAP = Family(
    {"miniature": miniature, "full": clipcap_eim_coco},
    {"miniature": 900, "full": 141_680},
    {"miniature": 1 / 12, "full": 5000 / 141_680},
    {"miniature": CHEAP},
    {"miniature": {"cls": 1e-3, "*": 4e-3}},
)
# A third of the steps on three eighths of the scenes: what two rows of seeds cost is an hour of a core.
PILOT = replace(
    CLIPCAP,
    configs={"miniature": miniature},
    steps={"miniature": 300},
    settings={"miniature": {**CHEAP, "data.scenes": 600}},
)
FAMILIES = {
    "clipcap": CLIPCAP,
    "clipcap_pilot": PILOT,
    # Both with two losses of related work in their config.
    "clipcap_viral": replace(CLIPCAP, configs={"miniature": related}),
    "clipcap_related": replace(PILOT, configs={"miniature": related}),
    "clipcap_large": Family({"full": clipcap_large_coco}, {"full": 141_680}, {"full": 5000 / 141_680}),
    "llama_adapter": Family(
        {"miniature": miniature_llama_adapter, "full": llama_adapter_eim_scienceqa},
        {"miniature": 600, "full": 7_940},
        {"miniature": 0.1, "full": 0.1},
        {"miniature": CHEAP},
    ),
    "lavin": Family(
        {"miniature": miniature_lavin, "full": lavin7b_eim_scienceqa},
        {"miniature": 600, "full": 7_940},
        {"miniature": 0.1, "full": 0.1},
        {"miniature": CHEAP},
    ),
    "lavin_lite": Family({"full": lavin7b_eim_scienceqa}, {"full": 7_940}, {"full": 0.1}),
    "lavin13b": Family({"full": lavin13b_scienceqa}, {"full": 7_940}, {"full": 0.1}),
    "chat": Family(
        {"miniature": miniature_chat, "full": lavin7b_eim_chat},
        {"miniature": 600, "full": 65_000},
        {"miniature": 0.1, "full": 0.02},
        {"miniature": CHEAP},
    ),
    "chat_lite13b": Family({"full": lavin7b_eim_chat}, {"full": 65_000}, {"full": 0.02}),
}


@dataclass(frozen=True)
class Row:
    """One model and the way it is trained.

    `overrides` hold for both scales, relative to the family's config: "sequence", "prompts", ... are fields of the
    arm, dotted names fields of the config. `paper` maps a score's key to the paper's value, in the paper's unit.
    `shares` are the parts of the row's steps that its stages get, where they are not `share`'s. `seeds` is how many
    a design gives it, where one does; `base` the row whose time it gets in budget "time" (pace.py), if not its
    family's.
    """

    name: str
    title: str
    family: str
    arm: str = "eim"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    scales: tuple[str, ...] = SCALES
    seeds: int = 0
    base: str = ""

    def at(self, scale: str, budget: str = "") -> bool:
        """Whether the row exists at this scale, with this budget.

        The miniature has no larger language model. In budget "paper" stages have their own epochs: there a row that
        changes the shares alone would be another row.
        """
        same = budget == "paper" and self.shares and not self.overrides
        return not same and scale in self.scales and scale in FAMILIES[self.family].configs


@dataclass(frozen=True)
class Cell:
    """A row at one scale, budget and seed. `overrides` are relative to the config file `file`."""

    row: Row
    scale: str
    budget: str
    seed: int
    file: str
    overrides: dict[str, Any]
    config: Config

    @property
    def hash(self) -> str:
        """What the cell is known by."""
        return hash_of(self.config, self.row.arm)

    @property
    def name(self) -> str:
        """For people and for files: row, seed and hash."""
        return f"{self.row.name}-s{self.seed}-{self.hash}"

    def flags(self) -> list[str]:
        """What `python -m eim_jax.main` is given, besides --workdir."""
        shown = {k: v if isinstance(v, str) else repr(v) for k, v in self.overrides.items()}
        return [f"--config={self.file}", *(f"--config.{name}={value}" for name, value in shown.items())]


def hash_of(config: Config, arm: str) -> str:
    """The hash of every field that decides the arm's numbers.

    One at its default is left out, so that new fields change nothing.
    """
    kept = deciding(config, [arm], datasets.free_on_resume())
    tests = {"data.eval_limit", "data.scored", *datasets.free_on_resume()}
    kept |= {k: value for k, value in flatten(config).items() if k.startswith("decode.") or k in tests}
    plain = flatten(datasets.complete(Config()))
    plain |= {f"arm.{arm}.{name}": value for name, value in vars(Arm()).items()}
    for stage in config.arm[arm].sequence:
        plain |= {f"stages.{stage}.{name}": value for name, value in vars(Stage()).items()}
    kept = {name: value for name, value in kept.items() if name not in plain or plain[name] != value}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def share(config: Config, stage: str) -> float:
    """A stage's part of its row's steps: 1 with loss_base, else 1/4.

    The paper gives every stage the same epochs; loss_ST and loss_LM are down within a hundred steps (README), and a
    budget that is equal for all rows would otherwise halve what a row trains on loss_base.
    """
    return 1.0 if "base" in weights(config.stages[stage]) else 0.25


def cell(row: Row, scale: str, seed: int, budget: str = "steps", pace: float = 1.0) -> Cell:
    """The row's cell. `pace` (budget "time") multiplies all its steps: the baseline's seconds over the row's own.

    Raises KeyError for a row that this scale has not, ConfigError for overrides that cannot be meant.
    """
    family = FAMILIES[row.family]
    module = family.configs[scale]
    overrides = {"arms": (row.arm,), **family.settings.get(scale, {}), "seed": seed}
    overrides |= {k if "." in k else f"arm.{row.arm}.{k}": v for k, v in row.overrides.items()}
    config = resolve(module, overrides)
    if scale in family.rates:
        rates = family.rates[scale]
        rate = rates.get(config.arm[row.arm].features, rates["*"])
        for stage in config.arm[row.arm].sequence:
            if "base" in weights(config.stages[stage]):
                overrides.setdefault(f"stages.{stage}.lr", rate)
        config = resolve(module, overrides)
    if budget != "paper":
        sequence = config.arm[row.arm].sequence
        parts = {stage: row.shares.get(stage, share(config, stage)) for stage in sequence}
        for stage, part in parts.items():
            steps = max(round(pace * family.steps[scale] * part / sum(parts.values())), 2)
            overrides[f"stages.{stage}.steps"] = steps
            overrides[f"stages.{stage}.warmup_steps"] = round(steps * family.warmup[scale])
            overrides[f"stages.{stage}.warmup_epochs"] = 0.0
        config = resolve(module, overrides)
    folder = "experiments" if module.__name__.startswith("experiments.") else "configs"
    file = f"{folder}/{module.__name__.rpartition('.')[2]}.py"
    return Cell(row, scale, budget, seed, file, overrides, config)


def resolve(module: ModuleType, overrides: Mapping[str, Any]) -> Config:
    """The checked config of a file with overrides, as the command line would make it."""
    values: ml_collections.ConfigDict = module.get_config()
    values.update_from_flattened_dict(dict(overrides))
    return from_config_dict(values)

"""Where a run's scalars go besides metrics.jsonl: TRACKERS, the table of what `config.logging` may name.

One of your own is an entry: TRACKERS["mine"] = Kind("mine_package", open_mine), in a script or in the config file.
"""

import importlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from eim_jax.config import ConfigError
from eim_jax.utils.files import write_text

PROJECT = "eim_jax"  # of wandb and trackio, where WANDB_PROJECT or TRACKIO_PROJECT names no other


@runtime_checkable
class Tracker(Protocol):
    """What takes an arm's scalars."""

    def write(self, values: Mapping[str, int | float], step: int) -> None:
        """Takes the scalars of a step; steps count over the arm's stages."""
        ...

    def close(self) -> None:
        """Ends the arm's run."""
        ...


@dataclass(frozen=True)
class Arm:
    """What a tracker is opened for.

    Attributes:
      directory: the arm's, WORKDIR/NAME.
      first: the first step that will be written; what an interrupted run wrote from there on is done again.
      config: the run's, as plain values.
    """

    directory: Path
    first: int
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The arm's name behind its work directory's."""
        return f"{self.directory.absolute().parent.name}-{self.directory.name}"


@dataclass(frozen=True)
class Kind:
    """A tracker by name: the package that it needs, and how it is opened."""

    package: str
    open: Callable[[Arm], Tracker]


class _Board:
    def __init__(self, arm: Arm):
        from tensorboardX import SummaryWriter  # here, because a run may do without it

        # purge_step hides from TensorBoard what the interrupted run wrote past the checkpoint; the suffix keeps a quick
        # resume from overwriting the events of the same second.
        folder, count = arm.directory / "tb", len(list((arm.directory / "tb").glob("events*")))
        self._writer = SummaryWriter(str(folder), purge_step=arm.first, flush_secs=10, filename_suffix=f".{count}")

    def write(self, values: Mapping[str, int | float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """A run of wandb's form, which trackio shares: init, log, finish."""

    def __init__(self, package: str, arm: Arm, **more: Any):
        module = importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", PROJECT)
        self._run = module.init(project=project, config=dict(arm.config), resume="allow", **more)

    def write(self, values: Mapping[str, int | float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(arm: Arm, package: str) -> str:
    """The id of the arm's run, which one that goes on shares with the one before; new for a new run."""
    file = arm.directory / f"{package}.id"
    if arm.first and file.exists():
        return file.read_text(encoding="utf-8").strip()
    write_text(file, identity := secrets.token_hex(8))
    return identity


def _wandb(arm: Arm) -> Tracker:
    return _Hosted("wandb", arm, id=_identity(arm, "wandb"), name=arm.name, dir=str(arm.directory))


def _trackio(arm: Arm) -> Tracker:  # which knows a run by its name
    return _Hosted("trackio", arm, name=f"{arm.name}-{_identity(arm, 'trackio')}")


TRACKERS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboardX", _Board),
    "wandb": Kind("wandb", _wandb),
    "trackio": Kind("trackio", _trackio),
}


def check(names: Sequence[str], installed: bool = False) -> None:
    """Checks `config.logging`.

    Args:
      names: the field.
      installed: whether the packages have to be here.

    Raises:
      ConfigError: a name is none of TRACKERS, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"config.logging: {name!a:.60} is none of {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        if installed and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"config.logging names {name!r}, and {package} is not installed: pip install {package}, or leave it out"
            )

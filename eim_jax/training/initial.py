"""The checkpoint that a run's arms start from (config.init): checked against an arm, and read into its leaves."""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from eim_jax.config import Arm, Config, ConfigError, flatten
from eim_jax.losses.table import OWN
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.parallel.sharding import param_shardings
from eim_jax.pretrained import checkpoints
from eim_jax.training.partition import Flat
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path

if TYPE_CHECKING:
    from eim_jax.training.setup import Inputs


def fingerprint(config: Config) -> str:
    """Returns 16 hex digits of SHA-256 over the checkpoint's bytes, for the run's identity.

    Raises:
      WeightsError: there is no such file.
    """
    with checkpoints.file_of(user_path(config.init)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check(inputs: "Inputs", arm: Arm, vlm: VLM, shapes: Mapping[str, Any]) -> None:
    """Compares every key and shape of config.init with the arm's leaves; nothing is read.

    Raises:
      WeightsError: they do not fit; one message says all.
      ConfigError: an export of ours belongs to other towers.
    """
    if inputs.config.init:
        with contextlib.ExitStack() as stack:
            _open(inputs, arm, vlm, shapes, stack)


def read(inputs: "Inputs", arm: Arm, vlm: VLM, params: Flat, held: Mapping[str, jnp.dtype]) -> Flat:
    """Returns the leaves that config.init gives the arm, {} where there is none; says what they are.

    Args:
      inputs: the run's.
      arm: one of its arms.
      vlm: the arm's modules.
      params: all of its leaves.
      held: each leaf's dtype.

    Raises:
      As `check`.
    """
    if not inputs.config.init:
        return {}
    with contextlib.ExitStack() as stack:
        found = _open(inputs, arm, vlm, params, stack)
        leaves = found.read(held, param_shardings(params, inputs.mesh))
    if processes.is_first():
        left = f"; it has no {found.lacking}*, which stays as it is drawn" if found.lacking else ""
        console.print(f"{found.path} ({found.form.title}) fills {len(leaves)} leaves{left}", soft_wrap=True)
        fields = flatten(inputs.config)
        others = [f"config.{name}={value!r}" for name, value in found.form.made_with.items() if fields[name] != value]
        if others:
            console.print(f"such files were made with {', '.join(others)}, unlike this config", soft_wrap=True)
    return {**leaves}


def given(inputs: "Inputs", arm: Arm, vlm: VLM, shapes: Mapping[str, Any]) -> set[str]:
    """Returns the paths that config.init fills; empty where there is none."""
    if not inputs.config.init:
        return set()
    with contextlib.ExitStack() as stack:
        return set(_open(inputs, arm, vlm, shapes, stack).leaves)


def blind(inputs: "Inputs", arm: Arm, vlm: VLM, shapes: Mapping[str, Any]) -> str:
    """Says that config.init has no part that sees, so that a picture would be read by drawn numbers; "" if it has."""
    with contextlib.ExitStack() as stack:
        found = _open(inputs, arm, vlm, shapes, stack)
    if not found.lacking:
        return ""
    return (
        f"config.init={found.path} ({found.form.title}) was trained on text alone: it has no {found.lacking}*, and "
        "sees no picture. Ask it without one (--mode=chat), or train that part first (--mode=train)"
    )


def _open(
    inputs: "Inputs", arm: Arm, vlm: VLM, shapes: Mapping[str, Any], stack: contextlib.ExitStack
) -> checkpoints.Checkpoint:
    config = inputs.config
    target = checkpoints.Target(
        name=next((name for name in config.arms if config.arm[name] == arm), "*"),
        arm=arm,
        # No file holds what a loss has of its own: it stays as it is drawn.
        shapes={
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in shapes.items()
            if not path.startswith(OWN)
        },
        towers=inputs.towers.keys(),
        visual=vlm.visual.config,
        lm=vlm.lm.config,
    )
    found = checkpoints.open_checkpoint(user_path(config.init), target, stack)
    ours = inputs.fingerprints
    others = [name for name in ("clip", "lm") if name in found.identity and found.identity[name] != ours.get(name)]
    if others and ours:  # a plan has no weights
        raise ConfigError(
            f"config.init={found.path} was trained on another {' and another '.join(others)}: set "
            f"config.towers to what {found.path.parent / checkpoints.RECORD} names"
        )
    return found

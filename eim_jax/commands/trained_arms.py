"""What a finished run left in its work directory: the arms' parameters, and what they were trained from."""

from collections.abc import Iterator
from pathlib import Path

from eim_jax.config import Config, ConfigError
from eim_jax.models.vlm import VLM
from eim_jax.training import partition, setup
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.files import read_json


def load_finished(config: Config, workdir: Path) -> Inputs:
    """Loads towers and tokenisers of a finished run, without its training data.

    Raises:
      ConfigError: the run was trained from other weights, tokenisers or data.
    """
    inputs = setup.load(config, workdir, data=False)
    check_identity(inputs)
    return inputs


def trained(inputs: Inputs, arm: str) -> tuple[VLM, Flat]:
    """Returns an arm's model with the parameters that its last stage left.

    Raises:
      ConfigError: a stage is not finished.
    """
    *_, (_, vlm, params) = after_stages(inputs, arm)
    return vlm, params


def after_stages(inputs: Inputs, arm: str) -> Iterator[tuple[str, VLM, Flat]]:
    """Yields (stage, model, parameters) as training starts ("start") and as each stage left them.

    Raises:
      ConfigError: a stage is not finished.
    """
    vlm, params = setup.start(inputs, inputs.config.arm[arm])
    yield "start", vlm, params
    for i, name in enumerate(inputs.config.arm[arm].sequence):
        with StageCheckpoints(inputs.workdir / arm / "checkpoints" / f"{i}-{name}") as store:
            if not store.finished:
                raise ConfigError(
                    f"stage {name} of arm {arm} is not finished in {inputs.workdir}: run --mode=train first"
                )
            leaves, _ = partition.split(params, partition.groups(inputs.config.stages[name], params))
            params = {**params, **store.result(leaves)[0]}
        yield name, vlm, params


def check_identity(inputs: Inputs) -> None:
    """Refuses a work directory whose results were trained from other weights, tokenisers or data.

    Raises:
      ConfigError: names which.
    """
    saved, found = read_record(inputs.workdir).get("identity", {}), inputs.identity()
    changed = [name for name in found if name in saved and saved[name] != found[name]]
    if changed:
        kinds = [("other " if name.endswith("pictures") else "another ") + name.replace("_", " ") for name in changed]
        raise ConfigError(
            f"{inputs.workdir} was trained with {' and '.join(kinds)}: put the old files back, or choose another "
            "--workdir"
        )


def read_record(workdir: Path) -> dict:
    """Returns the work directory's run.json, {} for a fresh one."""
    path = workdir / "run.json"
    return read_json(path, optional={"identity": dict, "seconds": int | float}) if path.exists() else {}

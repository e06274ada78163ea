"""What a finished run left in its work directory: the arms' parameters, and what they were trained from.

In place of them a checkpoint may be used as it is (`--init`): then the work directory need not be there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eim_jax.config import Config, ConfigError
from eim_jax.losses import table as losses
from eim_jax.models.vlm import VLM
from eim_jax.training import arm_model, initial, partition, setup
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.files import Damaged, read_json

AS_GIVEN = "scored_as_given"  # in run.json: the scores are those of config.init as it is, of nothing trained here


def load_finished(config: Config, workdir: Path | None) -> Inputs:
    """Loads towers and tokenisers of a finished run, without its training data.

    Args:
      config: the run's.
      workdir: of the run; None for config.init alone.

    Raises:
      ConfigError: the run was trained from other weights, tokenisers or data.
    """
    inputs = setup.load(config, workdir or Path(), data=False)
    if workdir is not None:
        check_identity(inputs)
    return inputs


def trained(inputs: Inputs, arm: str, *, init: bool = False) -> tuple[VLM, Flat]:
    """Returns an arm's model with the parameters that its last stage left.

    Args:
      inputs: the run's.
      arm: one of its arms.
      init: the parameters are those of config.init, as it holds them.

    Raises:
      ConfigError: a stage is not finished.
    """
    if init:
        return arm_model.start(inputs, inputs.config.arm[arm])
    *_, (_, vlm, params) = after_stages(inputs, arm)
    return vlm, params


def why_blind(inputs: Inputs, arm: str, vlm: VLM, params: Flat) -> str:
    """Says why an arm that is used as config.init holds it cannot be shown a picture; "" where it can."""
    return initial.blind(inputs, inputs.config.arm[arm], vlm, params)


def after_stages(inputs: Inputs, arm: str) -> Iterator[tuple[str, VLM, Flat]]:
    """Yields (stage, model, parameters) as training starts ("start") and as each stage left them.

    Raises:
      ConfigError: a stage is not finished.
    """
    with _losses_known(inputs, arm):
        vlm, params = arm_model.start(inputs, inputs.config.arm[arm])
    yield "start", vlm, params
    for i, name in enumerate(inputs.config.arm[arm].sequence):
        with StageCheckpoints(_folder(inputs.workdir, arm, i, name)) as store:
            if not store.finished:
                raise ConfigError(
                    f"stage {name} of arm {arm} is not finished in {inputs.workdir}: run --mode=train first"
                )
            with _losses_known(inputs, arm):
                leaves, _ = partition.split(params, partition.groups(inputs.config.stages[name], params))
                params = {**params, **store.result(leaves)[0]}
        yield name, vlm, params


@contextmanager
def _losses_known(inputs: Inputs, arm: str) -> Iterator[None]:
    """Where a result does not fit since a loss with parameters of its own is not known here: nothing is damaged."""
    try:
        yield
    except (partition.PartitionError, Damaged) as error:
        strangers = losses.unknown(*(inputs.config.stages[name] for name in inputs.config.arm[arm].sequence))
        if not strangers:
            raise
        raise ConfigError(
            f"{inputs.workdir}: arm {arm} was trained on a loss {strangers[0]!r}, which this process does not know and "
            "which may have parameters of its own: enter it in eim_jax.losses.table.LOSSES first (import the file that "
            "does so), or name that file as --config"
        ) from error


def unfinished_stage(config: Config, workdir: Path, arm: str) -> str | None:
    """Returns the first stage of an arm that is not finished, None where all are; loads nothing."""
    for i, name in enumerate(config.arm[arm].sequence):
        with StageCheckpoints(_folder(workdir, arm, i, name)) as store:
            if not store.finished:
                return name
    return None


def _folder(workdir: Path, arm: str, number: int, stage: str) -> Path:
    return workdir / arm / "checkpoints" / f"{number}-{stage}"


def check_untrained(config: Config, workdir: Path) -> None:
    """Refuses to use config.init as it is beside what was trained from it in the same work directory.

    Raises:
      ConfigError: names the arm.
    """
    for arm in config.arms:
        if (workdir / arm / "checkpoints").exists():
            raise ConfigError(
                f"--init={config.init} is used as it is, and {workdir} holds training of arm {arm}: leave --init out "
                "to use what was trained, or choose another --workdir"
            )


def check_trainable(workdir: Path) -> None:
    """Refuses to train where config.init was scored as it is: those scores would be taken for the trained arm's.

    Raises:
      ConfigError: says so.
    """
    if read_record(workdir).get(AS_GIVEN):
        raise ConfigError(
            f"{workdir} holds the scores of a checkpoint as it is (--mode=eval --init): choose another --workdir"
        )


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

"""`--mode=eval`: scores trained arms again, with the decoding settings given now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eim_jax.commands.score_report import report_scores
from eim_jax.commands.trained_arms import AS_GIVEN, check_untrained, load_finished, trained, why_blind
from eim_jax.config import Config, ConfigError
from eim_jax.data.datasets import data_set, load_split
from eim_jax.evaluation import scoring
from eim_jax.parallel import processes
from eim_jax.parallel.lock import locked
from eim_jax.parallel.signals import doing
from eim_jax.utils.console import console
from eim_jax.utils.files import write_json


def evaluate(config: Config, workdir: Path, record: Mapping[str, Any] | None = None) -> None:
    """Scores the trained arms again, with the decoding settings given now, and renews the report.

    Scores of other settings are never written over: these stand in ARM/evals/NAME, on the page in rows of their own.
    So do those on another split (config.data.scored) or on files of the run's kind (its fields of the test data); the
    page, which shows the run's own test items, is then left as it is.

    Args:
      config: the run's.
      workdir: of the finished run.
      record: what run.json is to say where config.init is scored as it is, in place of a run's result.

    Raises:
      ConfigError: there is no test split, or a stage is not finished.
      InUse: another run works in the workdir.
    """
    with locked(workdir):
        _evaluate(config, workdir, record)


def _evaluate(config: Config, workdir: Path, record: Mapping[str, Any] | None) -> None:
    doing("checking the test data")
    with processes.first_alone("test data"):
        test = load_split(config, "test", workdir)
    if test is None:
        raise ConfigError(f"nothing to score: {data_set(config.data).unscored}")
    if record is not None:
        check_untrained(config, workdir)
    inputs = load_finished(config, workdir)
    if record is not None:
        write_json(workdir / "run.json", {**record, "identity": inputs.identity(), AS_GIVEN: True})
    table = {}
    for arm in config.arms:
        vlm, params = trained(inputs, arm, init=record is not None)
        if record is not None and len(test.images) and (reason := why_blind(inputs, arm, vlm, params)):
            raise ConfigError(reason)
        doing(f"scoring arm {arm}")
        folder = scoring.place(inputs, workdir / arm, test)
        if folder != workdir / arm:
            console.print(f"{arm} was scored by other settings, which stay: writing to {folder}", soft_wrap=True)
        table[arm] = scoring.evaluate(inputs, vlm, params, test, folder)
    other = any(scoring.is_other_split(workdir / arm, test) for arm in config.arms)
    report_scores(workdir, test, config.data.eval_limit, table, renew=not other)

"""`--mode=train`: trains every arm in turn, scores it on the test split, and writes the page."""

import time
from datetime import UTC, datetime
from pathlib import Path

from eim_jax.commands.score_report import report_scores
from eim_jax.commands.trained_arms import check_identity, check_trainable, read_record
from eim_jax.config import Config
from eim_jax.data.datasets import data_set, load_split
from eim_jax.data.samples import Split
from eim_jax.evaluation import scoring
from eim_jax.evaluation.tasks import task_of
from eim_jax.evaluation.while_training import while_training
from eim_jax.parallel import processes
from eim_jax.parallel.lock import locked
from eim_jax.parallel.signals import doing
from eim_jax.training import setup, trackers
from eim_jax.training.arm import examples, plan_arm, run_arm
from eim_jax.utils.console import console
from eim_jax.utils.files import write_json


def train(config: Config, workdir: Path, record: dict) -> None:
    """Trains every arm in turn, scores it on the test split, and writes workdir/report.html.

    Args:
      config: the run's.
      workdir: keeps everything that the run writes; one of an interrupted run is continued.
      record: what run.json says of the run from outside: command, config, versions, machine, started.

    Raises:
      ConfigError: the workdir was trained from other files, or an arm cannot run.
      InUse: another run works in the workdir.
      ValueError: the test split names no task.
    """
    with locked(workdir):
        _train(config, workdir, record)


def _train(config: Config, workdir: Path, record: dict) -> None:
    begun = time.monotonic()
    check_trainable(workdir)
    trackers.check(config.logging, installed=True)
    inputs = setup.load(config, workdir)
    check_identity(inputs)
    doing("checking the test data")
    with processes.first_alone("test data"):
        test = load_split(inputs.config, "test", workdir)
    doing("checking the stages")
    plans = {arm: plan_arm(inputs, arm) for arm in config.arms}  # what cannot run is said before anything has
    if test is not None:
        task_of(test)
    scorer = while_training(inputs)
    saved = read_record(workdir)
    spent = saved.get("seconds", 0.0)
    kept = {key: saved[key] for key in ("started", "finished", "seconds") if key in saved}
    identity = inputs.identity() | _test_pictures(config, workdir, test, saved.get("identity", {}))
    # What is ahead, for whoever follows the run from outside (reporting/progress.py).
    ahead_of = {arm: [{"name": stage.name, "steps": stage.steps} for stage in plan] for arm, plan in plans.items()}
    record = {**record, "seam": inputs.config.data.seam, "identity": identity, "plan": ahead_of, **kept}
    write_json(workdir / "run.json", record)
    news, table = False, {}
    for number, arm in enumerate(config.arms):
        ahead = sum(examples(plans[other]) for other in config.arms[number + 1 :])
        console.rule(f"{arm}: {config.arm[arm].description or ' -> '.join(config.arm[arm].sequence)}")
        try:
            vlm, params = run_arm(inputs, arm, scorer, ahead)
        except BaseException:
            write_json(workdir / "run.json", record | {"seconds": spent + time.monotonic() - begun})
            raise
        if test is None:
            continue
        scores = scoring.read_scores(inputs, workdir / arm, test)
        if processes.agreed(scores is None):
            news = True
            doing(f"scoring arm {arm}")
            scores = scoring.evaluate(inputs, vlm, params, test, workdir / arm)
        table[arm] = scores
    if news or test is None or "finished" not in record:  # --mode=eval may have scored a run that was stopped
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        record |= {"finished": finished, "seconds": round(spent + time.monotonic() - begun, 1)}
        write_json(workdir / "run.json", record)
    if test is None:
        console.print(f"trained, not scored: {data_set(config.data).unscored}", soft_wrap=True)
    else:
        report_scores(workdir, test, config.data.eval_limit, table)


def _test_pictures(config: Config, workdir: Path, test: Split | None, before: dict) -> dict[str, str]:
    """What tells the test pictures from others of the same names and sizes, for run.json.

    Scores of pictures that were replaced are removed, before run.json says so: a run killed in between scores again.
    """
    contents = "" if test is None else test.images.contents()
    if test is None or not contents:
        return {}
    data, pictures = before.get("test pictures", " ").split(" ")
    if data == test.fingerprint() and pictures != contents:
        console.print("test pictures were replaced by others of the same size: scoring again", soft_wrap=True)
        if processes.is_first():
            for arm in config.arms:
                (workdir / arm / scoring.SCORES).unlink(missing_ok=True)
    return {"test pictures": f"{test.fingerprint()} {contents}"}

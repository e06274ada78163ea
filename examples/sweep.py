"""Searches three fields of a run by its validation NLL (optuna). Stopped or killed, the same command goes on.

python examples/sweep.py --config=miniature --trials=20 --out=runs/sweep [--config.any.field=... for every run]
    needs the extra `sweep`. A trial is a work directory of its own; one that is worse than the others were is stopped.
"""

import argparse
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from eim_jax.parallel.lock import locked
from eim_jax.training.log import read_metrics

SPACE = {  # what is searched: any fields of the config
    "stages.ie.lr": FloatDistribution(1e-4, 3e-3, log=True),
    "stages.ie.losses.ie": FloatDistribution(0.03, 3.0, log=True),
    "losses.tau": FloatDistribution(0.02, 0.3, log=True),
}
# By the validation split alone, so that the test split has not been seen by the setting that is chosen.
SCORED = ("eval.every_epochs=1", "eval.limit=0", "eval.method=none", "data.scored=val", "decode.methods=('greedy',)")


def nlls(workdir: Path) -> list[tuple[int, float]]:
    """Returns (step, validation NLL) of the last arm's last stage, as far as it has come."""
    if not (workdir / "run.json").exists():
        return []
    config = json.loads((workdir / "run.json").read_text())["config"]
    arm = config["arms"][-1]
    rows = read_metrics(workdir / arm / "metrics.jsonl")
    last = config["arm"][arm]["sequence"][-1]
    return [(row["step"], row["eval/nll"]) for row in rows if row["stage"] == last and "eval/nll" in row]


def train(params: dict, workdir: Path, flags: list[str], trial: optuna.Trial | None) -> tuple[TrialState, float | None]:
    """Runs one setting to its end, or until it should be pruned; returns how it ended, and its NLL."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "run.lock").open("a") as lock:  # a run that outlived a killed sweep ends first
        fcntl.flock(lock, fcntl.LOCK_EX)
    fields = [f"--config.{field}" for field in (*SCORED, *(f"{name}={value}" for name, value in params.items()))]
    command = [sys.executable, "-m", "eim_jax.main", *flags, *fields, f"--workdir={workdir}"]
    with (workdir / "log.txt").open("a") as log:
        run, reported = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), 0
        try:
            while run.poll() is None:
                time.sleep(0.5)
                for step, nll in nlls(workdir)[reported:] if trial else ():
                    trial.report(nll, step)
                    reported += 1
                if trial and reported and trial.should_prune():
                    return TrialState.PRUNED, None
        finally:
            run.terminate()  # nothing to one that has ended; another saves its state
            run.wait()
    found = nlls(workdir)
    return (TrialState.COMPLETE, found[-1][1]) if found and run.returncode == 0 else (TrialState.FAIL, None)


def main(arguments: list[str] | None = None) -> optuna.Study:
    """Adds trials to the study in --out until it has --trials; a begun one is finished first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    options, further = parser.parse_known_args(arguments)
    flags = [f"--config={options.config}", *further]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with locked(options.out):
        store = f"sqlite:///{options.out.absolute()}/study.db"
        study = optuna.create_study(storage=store, study_name="sweep", load_if_exists=True)
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # going on, it draws other settings
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        if study.user_attrs.get("flags", flags) != flags:
            sys.exit(f"error: {options.out} was begun with {' '.join(study.user_attrs['flags'])}: choose another --out")
        study.set_user_attr("flags", flags)
        begun = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
        while begun or len(study.trials) < options.trials:
            trial = begun.pop(0) if begun else study.ask(SPACE)
            if set(trial.params) != set(SPACE):  # killed while it was drawn
                study.tell(trial.number, state=TrialState.FAIL)
                continue
            workdir = options.out / f"trial-{trial.number:03}"
            state, nll = train(trial.params, workdir, flags, trial if isinstance(trial, optuna.Trial) else None)
            study.tell(trial.number, nll, state)
            why = f", see {workdir}/log.txt" if state == TrialState.FAIL else f"  NLL {nll:.4f}" if nll else ""
            print(f"trial {trial.number} {state.name.lower()}{why}  {trial.params}", flush=True)
        if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
            sys.exit(f"error: no trial came to its end; {options.out}/trial-*/log.txt say why")
        print(f"best: trial {study.best_trial.number}, NLL {study.best_value:.4f}, {study.best_params}")
        return study


if __name__ == "__main__":
    main()

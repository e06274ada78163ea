"""examples/sweep.py: begun trials are finished, finished ones stay, failed ones are named, bad ones are stopped."""

import importlib.util
import json
import signal
import subprocess
import sys
import textwrap

import mains
import optuna
import pytest
from optuna.trial import TrialState
from test_examples import FOLDER

# In place of a run: writes what a run writes. Its NLL is (lr - 0.001)^2 + tau, which is known; FAIL, WAIT and SLOW say
# what else it does. Every start leaves a line.
STUB = """
import json, pathlib, sys, time
given = dict(word.removeprefix("--").removeprefix("config.").split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["workdir"])
(folder.parent / "starts.txt").open("a").write(folder.name + chr(10))
config = {"arms": ["baseline", "eim"], "arm": {"eim": {"sequence": ["st", "ie"]}}}
(folder / "run.json").write_text(json.dumps({"config": config}))
(folder / "eim").mkdir(exist_ok=True)
number, resumed = int(folder.name[-3:]), (folder / "eim" / "metrics.jsonl").exists()
if given.get("fail") == str(number):
    sys.exit("error: no such luck")
rows = [{"stage": "st", "step": 9, "eval/nll": -5.0}, {"stage": "ie", "step": 1, "eval/nll": 9.0 + 9 * (number == 5)}]
(folder / "eim" / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
while given.get("wait") == str(number) and not resumed or given.get("slow") == str(number):
    time.sleep(0.05)
nll = (float(given["stages.ie.lr"]) - 1e-3) ** 2 + float(given["losses.tau"])
rows.append({"stage": "ie", "step": 2, "eval/nll": nll})
(folder / "eim" / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep_example", FOLDER / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "eim_jax_stub.py").write_text(textwrap.dedent(STUB))
    started = subprocess.Popen

    def popen(command, **options):
        return started([sys.executable, "-S", tmp_path / "eim_jax_stub.py", *command[3:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", popen)
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


def starts(out):
    return (out / "starts.txt").read_text().split()


def test_finished_trials_stay_a_failed_one_is_named_and_the_best_is_the_least_nll(sweep, tmp_path, capsys):
    out = tmp_path / "sweep"
    study = sweep.main(["--config=miniature", "--trials=2", f"--out={out}", "--fail=1"])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert f"trial 1 fail, see {out}/trial-001/log.txt" in capsys.readouterr().out
    assert "no such luck" in (out / "trial-001" / "log.txt").read_text()
    study = sweep.main(["--config=miniature", "--trials=4", f"--out={out}", "--fail=1"])
    assert starts(out) == [f"trial-{n:03}" for n in range(4)]
    values = {t.number: (t.params["stages.ie.lr"] - 1e-3) ** 2 + t.params["losses.tau"] for t in study.trials}
    del values[1]
    assert len(set(values.values())) == 3  # going on, it does not draw the same settings again
    assert study.best_trial.number == min(values, key=values.get)
    assert study.best_value == pytest.approx(min(values.values()))
    with pytest.raises(SystemExit, match="was begun with --config=miniature --fail=1"):
        sweep.main(["--config=photos", f"--out={out}"])


def test_a_trial_that_was_stopped_is_continued_in_its_own_folder_with_its_own_setting(sweep, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    flags = ["--config=miniature", "--trials=2", f"--out={out}", "--wait=1"]
    real, looks = sweep.nlls, []

    def stopped(workdir):
        found = real(workdir)
        looks.extend(found if workdir.name == "trial-001" else ())
        if looks:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(sweep, "nlls", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(flags)
    store = f"sqlite:///{out}/study.db"
    left = optuna.load_study(study_name="sweep", storage=store).trials
    assert [trial.state for trial in left] == [TrialState.COMPLETE, TrialState.RUNNING]
    monkeypatch.setattr(sweep, "nlls", real)
    study = sweep.main(flags)
    assert starts(out) == ["trial-000", "trial-001", "trial-001"]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert study.trials[1].params == left[1].params


def test_a_trial_worse_than_the_median_at_the_same_step_is_stopped(sweep, tmp_path):
    study = sweep.main(["--config=miniature", "--trials=6", f"--out={tmp_path / 'sweep'}", "--slow=5"])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED]


def test_nothing_that_came_to_its_end_is_an_error(sweep, tmp_path):
    with pytest.raises(SystemExit, match="no trial came to its end"):
        sweep.main(["--config=miniature", "--trials=1", f"--out={tmp_path / 'sweep'}", "--fail=0"])


class Forked(mains.Main):
    """A run as subprocess.Popen starts it, imports aside."""

    def __init__(self, command, stdout, stderr):
        super().__init__(command[3:], stdout.name)

    def terminate(self):
        self.signal(signal.SIGTERM)

    returncode = property(mains.Main.poll)


@pytest.mark.exhaustive
def test_a_real_run_is_scored_on_the_validation_split_alone(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", Forked)
    short = {"steps": 2, "warmup_steps": 1, "batch": 8}
    flags = [f"--config.stages.ie.{name}={value}" for name, value in short.items()]
    flags += ["--config.arms=('eim',)", "--config.arm.eim.sequence=('ie',)", "--config.data.scenes=16"]
    out = tmp_path / "sweep"
    study = sweep.main(["--config=miniature", "--trials=1", f"--out={out}", *flags, "--config.decode.max_tokens=4"])
    run = json.loads((out / "trial-000" / "run.json").read_text())
    assert run["config"]["stages"]["ie"]["lr"] == study.best_params["stages.ie.lr"]
    assert run["config"]["data"]["scored"] == "val"
    rows = [json.loads(line) for line in (out / "trial-000/eim/metrics.jsonl").read_text().splitlines()]
    assert study.best_value == rows[-1]["eval/nll"] > 0

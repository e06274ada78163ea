"""How far a run is, by its files: each state in words, from work directories cut where a run may be."""

import contextlib
import json
import os
import socket
import time
import types

import pytest

from eim_jax.parallel import lock
from eim_jax.parallel.lock import holder_of, locked
from eim_jax.reporting import progress
from eim_jax.reporting.progress import read_progress
from eim_jax.utils.files import Damaged

PLAN = {"baseline": [{"name": "base", "steps": 40}], "eim": [{"name": "st", "steps": 20}, {"name": "ie", "steps": 400}]}
STAGE = {"losses": {"base": 1.0}, "trained_params": 1, "total_params": 2, "epochs": 1, "batch": 8}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def steps(folder, stage, index, *numbers, pace=1.5):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in numbers:
            row = {"stage": stage, "stage_index": index, "step": step, "loss": 1.0, "seconds_per_step": pace}
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def going_on(workdir):
    """The lock of a run that began before its records were written."""
    with locked(workdir):
        note = json.loads((workdir / lock.FILE).read_text())
        write(workdir / lock.FILE, note | {"since": "2026-01-01T00:00:00+00:00"})
        yield


@pytest.fixture
def workdir(tmp_path):
    """The baseline is trained and scored, the first stage of the other arm is finished, its second is at step 120."""
    write(tmp_path / "run.json", {"config": {"arms": ["baseline", "eim"]}, "plan": PLAN})
    write(tmp_path / "baseline" / "run.json", {"stages": [{"name": "base", "steps": 40, **STAGE}]})
    steps(tmp_path / "baseline", "base", 0, 20, 40)
    write(tmp_path / "baseline" / "scores_test.json", {"greedy": {}})
    write(tmp_path / "eim" / "run.json", {"stages": [{"name": "st", "steps": 20, **STAGE}]})
    steps(tmp_path / "eim", "st", 0, 20)
    steps(tmp_path / "eim", "ie", 1, 60, 120)
    return tmp_path


def test_a_run_that_goes_on_says_where_it_is_and_how_long_its_stage_will_take(workdir, monkeypatch):
    with going_on(workdir):
        found = read_progress(workdir)
        # 280 steps of 1.5 s are 7 minutes.
        assert found.words == "running: arm eim, stage ie (2 of 2), step 120 of 400, 7 min left in this stage"
        assert found.state == "running" and not found.over
        assert [(s.name, s.state, s.step, s.steps) for s in found.arms[1].stages] == [
            ("st", "done", 20, 20),
            ("ie", "now", 120, 400),
        ]
        assert found.arms[0].scored and not found.arms[1].scored
        # One slow record among them says nothing of the next.
        steps(workdir / "eim", "ie", 1, 140, pace=15.0)
        assert read_progress(workdir).words.endswith("step 140 of 400, 6 min left in this stage")
        (workdir / "eim" / "metrics.jsonl").write_text("")
        steps(workdir / "eim", "ie", 1, 60, 120)
        # Nothing for five minutes: said, and taken from what is left.
        at = (workdir / "eim" / "metrics.jsonl").stat().st_mtime
        monkeypatch.setattr(progress, "time", types.SimpleNamespace(time=lambda: at + 300))
        assert read_progress(workdir).words.endswith("2 min left in this stage, no record for 5:00")
        monkeypatch.setattr(progress, "time", types.SimpleNamespace(time=lambda: at + 1000))
        assert read_progress(workdir).words.endswith("step 120 of 400, no record for 16:40")


def test_a_run_that_was_stopped_and_is_continued_has_its_silence_behind_it(workdir):
    before = time.time() - 24 * 3600
    os.utime(workdir / "eim" / "metrics.jsonl", (before, before))
    with locked(workdir):
        words = read_progress(workdir).words
    assert words == "running: arm eim, stage ie (2 of 2), step 120 of 400, being prepared"


def test_between_stages_and_before_any(workdir):
    with going_on(workdir):
        (workdir / "eim" / "metrics.jsonl").write_text("")
        words = read_progress(workdir).words
        assert words == "running: arm eim, stage ie (2 of 2), being prepared"
        (workdir / "baseline" / "scores_test.json").unlink()
        words = read_progress(workdir).words
        assert words == "running: arm baseline, all 1 stages trained, not scored yet"
        (workdir / "baseline" / "run.json").unlink()
        (workdir / "baseline" / "metrics.jsonl").unlink()
        assert read_progress(workdir).words == "running: arm baseline, stage base (1 of 1), being prepared"


def test_a_run_that_stopped_and_one_that_died_are_told_apart_by_the_lock(workdir):
    with locked(workdir):
        note = json.loads((workdir / lock.FILE).read_text())
    where = "arm eim, stage ie (2 of 2), step 120 of 400. The same command continues it"
    assert read_progress(workdir).words == f"stopped: {where}"
    write(workdir / lock.FILE, note | {"process_started": 1.0})  # the number is another process's now
    found = read_progress(workdir)
    assert found.state == "died" and found.over
    assert found.words.startswith(f"ended without a word (process {os.getpid()} on ") and found.words.endswith(where)
    write(workdir / lock.FILE, note | {"host": "another"})
    found = read_progress(workdir)
    assert found.state == "running" and "on another, since" in found.words and "by its records alone" in found.words
    assert holder_of(workdir).alive is None


def test_a_finished_run_and_one_of_an_earlier_version(workdir):
    steps(workdir / "eim", "ie", 1, 400)
    write(workdir / "eim" / "run.json", {"stages": [{"name": n, "steps": 20, **STAGE} for n in ("st", "ie")]})
    write(workdir / "eim" / "scores_test.json", {"greedy": {}})
    assert read_progress(workdir).words.startswith("stopped: arm eim, all 2 stages trained")  # its page is missing
    config = {
        "arms": ["baseline", "eim"],
        "arm": {name: {"sequence": [s["name"] for s in PLAN[name]]} for name in PLAN},
    }
    write(workdir / "run.json", {"config": config, "finished": "2026-11-29T20:00:00+00:00"})  # without a plan
    assert read_progress(workdir).words == "finished 2026-11-29T20:00:00+00:00"
    with locked(workdir):  # it is scored once more by --mode=eval
        found = read_progress(workdir)
        assert found.over and found.words.startswith("finished 2026-11-29T20:00:00+00:00; in use (process ")
        (workdir / "eim" / "scores_test.json").unlink()  # it is scored anew, since its test pictures are others
        assert read_progress(workdir).words == "running: arm eim, all 2 stages trained, not scored yet"
    write(workdir / "eim" / "scores_test.json", {"greedy": {}})
    (workdir / "eim" / "run.json").unlink()
    assert "arm eim, stage st (1 of 2), step 20. The same" in read_progress(workdir).words
    for plan, field in ({"eim": 3}, "plan.eim"), ({"eim": [{"name": "st"}]}, r"plan.eim\[0\].steps"):
        write(workdir / "run.json", {"config": config, "plan": plan})
        with pytest.raises(Damaged, match=field):
            read_progress(workdir)


def test_looking_takes_no_lock_and_leaves_no_file(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert holder_of(workdir) is None and read_progress(workdir).state == "stopped"
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    with locked(workdir):  # whoever looks at the same time turns no run away
        assert holder_of(workdir).alive and socket.gethostname() in holder_of(workdir).described

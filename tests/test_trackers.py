"""Trackers take every scalar of an arm at the cumulative step, go on as the run does, and are checked beforehand."""

import sys
import types

import pytest
from test_logs import ALL, STAGES, record

from eim_jax.config import ConfigError
from eim_jax.training import trackers
from eim_jax.training.log import RunLog


@pytest.fixture
def stand_in(monkeypatch):
    """Modules of wandb's form that note what they are called with."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        return Run()

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return calls


def write(directory, pairs, resume_at, *names):
    with RunLog.open(directory, STAGES, resume_at, trackers=names, config={"seed": 3}) as log:
        for pair in pairs:
            log.write(record(*pair))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_tracker_gets_each_scalar_at_its_step_and_a_resumed_arm_is_the_same_run(tmp_path, stand_in, name):
    arm = tmp_path / "photos" / "eim"
    write(arm, ALL[:3], None, name)
    write(arm, ALL[3:], (0, 3), name)
    first, second = (options for kind, *rest in stand_in if kind == "init" for options in rest)
    assert first == second and first["project"] == "eim_jax" and first["resume"] == "allow"
    assert first["config"] == {"seed": 3} and first["name"].startswith("photos-eim")
    logged = [(step, values["loss"]) for kind, *rest in stand_in if kind == "log" for step, values in [rest]]
    assert [step for step, _ in logged] == list(range(len(ALL)))
    assert all("step" not in values for kind, *rest in stand_in if kind == "log" for values in rest[1:])
    assert [kind for kind, *_ in stand_in].count("finish") == 2
    assert not (arm / "tb").exists()
    write(arm, ALL[:1], None, name)  # begun anew: another run
    assert stand_in[-3][1] != first


def test_a_process_that_does_not_write_opens_no_tracker(tmp_path, stand_in):
    with RunLog.open(tmp_path / "eim", STAGES, enabled=False, trackers=("wandb",)) as log:
        log.write(record(0, 0))
    assert stand_in == []


def test_a_tracker_that_is_unknown_or_not_installed_is_an_error_that_says_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match="'tensorbord' is none of tensorboard, wandb, trackio"):
        trackers.check(("tensorbord",))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check(("wandb",))
    with pytest.raises(ConfigError, match="names 'wandb', and wandb is not installed: pip install wandb"):
        trackers.check(("wandb",), installed=True)

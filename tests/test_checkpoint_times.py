"""Checkpoints come by the clock too, and a restart says what none of them held."""

import json
import types

import jax
import pytest

from eim_jax.config import Checkpoint, Config
from eim_jax.training import arm, stage


@pytest.mark.parametrize(
    ("minutes", "passed", "processes", "wanted"),
    [(10.0, 599, 1, False), (10.0, 600, 1, True), (0.5, 30, 1, True), (0.0, 10**6, 1, False), (10.0, 600, 2, False)],
)
def test_a_checkpoint_is_due_so_long_after_the_one_before(monkeypatch, minutes, passed, processes, wanted):
    run = object.__new__(stage._StageRun)
    run.inputs = types.SimpleNamespace(config=Config(checkpoint=Checkpoint(every_minutes=minutes)))
    run._saved = 1000.0
    monkeypatch.setattr(stage.time, "monotonic", lambda: 1000.0 + passed)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert run._is_time() is wanted


@pytest.mark.parametrize(
    ("resume", "said"),
    [
        (None, "st was stopped without a save after step 3 or later, and starts again: it had no checkpoint yet"),
        (
            (0, 3),
            "st was stopped without a save after step 3 or later, and goes on after step 2, its newest checkpoint",
        ),
        ((0, 4), ""),  # the checkpoint holds all that was logged
        ((1, 0), ""),
    ],
)
def test_a_restart_says_which_steps_no_checkpoint_held(tmp_path, resume, said):
    rows = [{"stage": "st", "stage_index": 0, "step": step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = arm._lost(tmp_path / "metrics.jsonl", resume)
    assert found.startswith(said) if said else found == ""
    assert arm._lost(tmp_path / "none.jsonl", resume) == ""

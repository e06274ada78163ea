"""An interrupted run is the uninterrupted one, bit for bit: real processes, killed in every stage and in mid-save."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from eim_jax.training.log import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("0-st", "1-lm", "2-ie")
STEPS = 8


def command(workdir, *more):
    fields = {
        "arms": "('eim',)",
        "data.scenes": 24,
        "data.eval_limit": 4,
        "decode.methods": "('greedy',)",
        "decode.max_tokens": 6,
        "decode.java": False,
        "data.cache": workdir.with_name("cache"),
        "towers.dropout": 0.1,
        "checkpoint.every_steps": 2,
        "log_every": 1,
    }
    for name in ("st", "lm", "ie"):
        fields |= {f"stages.{name}.steps": STEPS, f"stages.{name}.warmup_steps": 2, f"stages.{name}.batch": 20}
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    config = f"--config={ROOT / 'configs/miniature.py'}"
    return [sys.executable, "-m", "eim_jax.main", config, f"--workdir={workdir}", *flags, *more]


def start(workdir, *more):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command(workdir, *more),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(process, condition):
    """Polls until the condition holds; a process that ends before is a failure that shows its output."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the run ended before the moment to kill it:\n{process.stdout.read()[-3000:]}")
        time.sleep(0.002)


def steps_done(workdir):
    return [(r["stage_index"], r["step"]) for r in read_metrics(workdir / "eim" / "metrics.jsonl")]


def saving(workdir, stage):
    """Whether a save of this stage is under way: its folder has not got its final name yet."""
    folder = workdir / "eim" / "checkpoints" / stage / "steps"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def finish(workdir, *more):
    process = start(workdir, *more)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def results(workdir):
    found = {}
    for stage in STAGES:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(workdir / "eim" / "checkpoints" / stage / "result" / "trained")
        found |= {f"{stage}/{path}": np.asarray(leaf) for path, leaf in tree.items()}
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_killed_in_every_stage_and_in_mid_save_end_bit_identical(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole)

    first = start(broken)  # kill -9 in the first stage, between checkpoints
    wait_until(first, lambda: (0, 3) in steps_done(broken))
    first.kill()
    first.wait()

    second = start(broken)  # kill -9 while the second stage is being saved
    wait_until(second, lambda: saving(broken, "1-lm"))
    second.kill()
    second.wait()
    assert saving(broken, "1-lm")  # the kill came before the save was whole
    assert (broken / "eim/checkpoints/0-st/result").exists()

    third = start(broken)  # SIGTERM in the last stage: saved at once, and says so
    wait_until(third, lambda: (2, 3) in steps_done(broken))
    third.send_signal(signal.SIGTERM)
    output, _ = third.communicate(timeout=300)
    assert "the same command continues" in output
    assert third.returncode not in (0, -signal.SIGTERM)

    output = finish(broken)
    assert "st: already trained" in output and "lm: already trained" in output
    want, got = results(whole), results(broken)
    assert want.keys() == got.keys()
    owned = {"0-st": {"st"}, "1-lm": {"lm"}, "2-ie": {"visual.prompt", "st", "lm"}}
    for stage, towers in owned.items():  # checkpoints hold the stage's trained leaves and nothing else
        stored = [path.removeprefix(f"{stage}/") for path in want if path.startswith(stage)]
        assert {t for t in towers for path in stored if path.startswith(t + ".")} == towers
        assert all(path.startswith(tuple(t + "." for t in towers)) for path in stored)
    different = [path for path in want if not np.array_equal(want[path], got[path])]
    assert not different
    # Every step stands once in the log, with the losses of the uninterrupted run.
    losses = [
        [(r["stage_index"], r["step"], r["loss"]) for r in read_metrics(w / "eim" / "metrics.jsonl")]
        for w in (whole, broken)
    ]
    assert losses[0] == losses[1]
    assert [step[:2] for step in losses[0]] == [(i, s + 1) for i in range(3) for s in range(STEPS)]

    # The finished workdir refuses another run's config, by field, and accepts other decoding.
    refused = start(broken, "--config.stages.ie.lr=0.5")
    output, _ = refused.communicate(timeout=200)
    assert refused.returncode != 0 and "stages.ie.lr: 0.001 in the workdir, 0.5 asked for" in output.replace("\n", " ")
    again = subprocess.run(
        [sys.executable, "-m", "eim_jax.main", f"--workdir={broken}", "--mode=eval", "--config.decode.max_tokens=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "captions by greedy" in again.stdout, again.stdout[-2000:] + again.stderr[-2000:]
    scores = json.loads((broken / "eim" / "scores_test.json").read_text())
    assert "at most 4 tokens" in scores["greedy"]["notes"]["decoding"]

"""An interrupted run is the uninterrupted one, bit for bit: real processes, killed in every stage and in mid-save."""

import json
import pathlib
import signal
import time

import mains
import numpy as np
import orbax.checkpoint as ocp
import pytest

from eim_jax.training.log import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("0-st", "1-lm", "2-ie")
STEPS = 8
TIMES = {"examples_per_second", "seconds_per_step", "mfu", "data_wait", "device", "host"}


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
        "towers.scan": True,  # less to compile
        "checkpoint.every_steps": 2,
        "log_every": 3,  # saved every two steps: a run continues within a record's steps
    }
    for name in ("st", "lm", "ie"):
        fields |= {f"stages.{name}.steps": STEPS, f"stages.{name}.warmup_steps": 2, f"stages.{name}.batch": 20}
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    return [f"--config={ROOT / 'configs/miniature.py'}", f"--workdir={workdir}", *flags, *more]


def start(workdir, *more):
    return mains.Main(command(workdir, *more), workdir.with_name(f"{time.monotonic_ns()}.txt"))


def steps_done(workdir):
    return [(r["stage_index"], r["step"]) for r in read_metrics(workdir / "eim" / "metrics.jsonl")]


def saving(workdir, stage):
    """Whether a save of this stage is under way: its folder has not got its final name yet."""
    folder = workdir / "eim" / "checkpoints" / stage / "steps"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def finish(workdir, *more):
    process = start(workdir, *more)
    assert process.wait() == 0, process.said()[-3000:]
    return process.said()


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
    first.until(lambda: (0, 3) in steps_done(broken))
    first.kill()

    second = start(broken)  # kill -9 while the second stage is being saved
    second.until(lambda: saving(broken, "1-lm"))
    second.kill()
    assert saving(broken, "1-lm")  # the kill came before the save was whole
    assert (broken / "eim/checkpoints/0-st/result").exists()

    third = start(broken)  # SIGTERM in the last stage: saved at once, and says so
    third.until(lambda: (2, 3) in steps_done(broken))
    third.signal(signal.SIGTERM)
    assert third.wait() not in (0, -signal.SIGTERM)
    assert "the same command continues" in third.said()

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
    # Every record stands once in the log, with all that the uninterrupted run's says but the time it took.
    records = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(file)]
        for file in (whole / "eim" / "metrics.jsonl", broken / "eim" / "metrics.jsonl")
    ]
    assert records[0] == records[1] and all("loss" in row for row in records[0])
    assert [(row["stage_index"], row["step"]) for row in records[0]] == [(i, s) for i in range(3) for s in (0, 3, 6, 8)]
    shares = [json.loads((w / "eim" / "run.json").read_text())["stages"][2]["padding"] for w in (whole, broken)]
    assert shares[0] == shares[1]

    # The finished workdir refuses another run's config, by field, and accepts other decoding.
    refused = start(broken, "--config.stages.ie.lr=0.5")
    assert refused.wait() != 0
    assert "stages.ie.lr: 0.001 in the workdir, 0.5 asked for" in refused.said().replace("\n", " ")
    own = (broken / "eim" / "scores_test.json").read_bytes()
    flags = [f"--workdir={broken}", "--mode=eval", "--config.decode.max_tokens=4"]
    _, output = mains.run(flags, tmp_path / "again.txt")
    assert "captions by greedy" in output, output[-2000:]
    # The run's own results stay as they were; the others stand beside them, on the page too.
    assert (broken / "eim" / "scores_test.json").read_bytes() == own
    (other,) = (broken / "eim" / "evals").iterdir()
    scores = json.loads((other / "scores_test.json").read_text())
    assert "at most 4 tokens" in scores["greedy"]["notes"]["decoding"]
    page = (broken / "report.html").read_text()
    assert "at most 6 tokens" in page and "at most 4 tokens" in page and f"evals/{other.name}" in page
    mains.run([f"--workdir={broken}", "--mode=eval"], tmp_path / "same.txt")  # by the same settings: the same files
    assert (broken / "eim" / "scores_test.json").read_bytes() == own
    assert [other] == list((broken / "eim" / "evals").iterdir())

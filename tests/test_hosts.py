"""Several real processes are one run: training, resuming on other numbers of them, scores, and what a lost one does."""

import json
import os
import pathlib
import shutil
import signal
import socket
import time

import mains
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from eim_jax.training.log import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("0-st", "1-lm", "2-ie")
STEPS = {"st": 4, "lm": 4, "ie": 12}  # of the last stage more, so that a signal in its first steps comes in time
HEARTBEAT = 10  # seconds: the least that a busy machine allows
STATED = 3 * HEARTBEAT  # what the README states: the heartbeat, and the time to notice and to end
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Run:
    """Processes that run one command together, their output in files."""

    def __init__(self, workdir, processes, devices, *more, mode="train", mesh=(1, -1, 1), config="miniature"):
        self.workdir = pathlib.Path(workdir)
        fields = {
            "arms": "('eim',)",
            "data.scenes": 24,
            "data.eval_limit": 5,
            "decode.methods": "('greedy',)",
            "decode.max_tokens": 6,
            "decode.batch": 8,
            "decode.java": False,
            "towers.dropout": 0.0,
            "towers.scan": True,
            "checkpoint.every_steps": 2,
            "log_every": 1,
            "mesh": mesh,
        }
        for name, steps in STEPS.items():
            fields |= {f"stages.{name}.steps": steps, f"stages.{name}.warmup_steps": 2, f"stages.{name}.batch": 16}
        config = [f"--config={ROOT / 'configs' / config}.py", f"--workdir={workdir}", f"--mode={mode}"]
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        self.processes = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for i in range(processes):
            place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
            place = [*place, f"--heartbeat={HEARTBEAT}"] if processes > 1 else []
            output = self.workdir.with_name(f"{self.workdir.name}-{mode}-{time.monotonic_ns()}-{i}.txt")
            self.processes.append(mains.Main([*config, *flags, *place, *more], output, XLA_FLAGS=devices))

    def said(self, i):
        return self.processes[i].said()

    def ended(self):
        """Each process's exit code."""
        try:
            return [process.wait(timeout=600) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def finished(self):
        codes = self.ended()
        assert codes == [0] * len(codes), "\n".join(self.said(i)[-2500:] for i in range(len(codes)))
        return self

    def until(self, condition):
        """Polls until the condition holds; a process that ends before is a failure that shows its output."""
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                self.ended()
                pytest.fail("\n".join(self.said(i)[-2500:] for i in range(len(self.processes))))
            time.sleep(0.005)


def metrics(workdir):
    return read_metrics(workdir / "eim" / "metrics.jsonl")


def losses(workdir):
    return {(r["stage_index"], r["step"]): r["loss"] for r in metrics(workdir) if r["step"]}


def results(workdir):
    found = {}
    for stage in STAGES:
        with ocp.PyTreeCheckpointer() as checkpointer:
            folder = workdir / "eim" / "checkpoints" / stage / "result" / "trained"
            leaves = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in leaves}
            tree = checkpointer.restore(folder, restore_args=as_numpy)
        found |= {f"{stage}/{path}": np.asarray(leaf) for path, leaf in tree.items()}
    return found


def predictions(workdir):
    return json.loads((workdir / "eim" / "predictions_test_greedy.json").read_text())


def assert_same_run(one, other, loss=1e-6, parameters=1e-6):
    """On the same mesh to 1e-6; the bits differ where gloo sums in another order than one process does."""
    want, got = losses(one), losses(other)
    assert want.keys() == got.keys() == {(i, s + 1) for i, n in enumerate(STEPS.values()) for s in range(n)}
    for step in want:
        assert got[step] == pytest.approx(want[step], rel=loss), step
    one, other = results(one), results(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        found = other[path]
        if path.endswith("qkv.bias"):
            # Softmax ignores what a keys' bias adds: its gradient is rounding alone, which Adam scales to full steps.
            leaf, found = (np.delete(x, 1, axis=-2) for x in (leaf, found))
        np.testing.assert_allclose(found, leaf, rtol=0, atol=parameters, err_msg=path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(runs):
    """One process, four devices."""
    return Run(runs / "alone", 1, 4).finished().workdir


@pytest.fixture(scope="module")
def pair(runs):
    """Two processes of two devices."""
    return Run(runs / "pair", 2, 2).finished()


@pytest.fixture(scope="module")
def stopped(runs):
    """Two processes of two devices, one of which got SIGTERM in the last stage."""
    run = Run(runs / "stopped", 2, 2)
    run.until(lambda: (2, 1) in losses(run.workdir))
    run.processes[1].signal(signal.SIGTERM)
    run.codes = run.ended()
    return run


def test_two_processes_train_as_one_does(alone, pair):
    assert_same_run(alone, pair.workdir)


def test_answers_and_scores_of_a_ragged_last_batch_are_those_of_one_process(alone, pair):
    # Five images in batches of eight, over four devices of two processes.
    want, got = predictions(alone), predictions(pair.workdir)
    assert [row["image_id"] for row in got] == [row["image_id"] for row in want] and len(got) == 5
    assert got == want
    want, got = (json.loads((w / "eim" / "scores_test.json").read_text())["greedy"] for w in (alone, pair.workdir))
    assert want.keys() == got.keys()
    for name in want:
        expected = want[name] if isinstance(want[name], dict) else pytest.approx(want[name], abs=1e-4)
        assert got[name] == expected, name


def test_new_pictures_are_captioned_as_by_one_process(runs, alone, pair):
    folder = runs / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"{i}.png")
    found = []
    for workdir, processes in ((alone, 1), (pair.workdir, 2)):
        out = runs / f"captions{processes}.json"
        Run(workdir, processes, 4 // processes, f"--images={folder}", f"--out={out}", mode="caption").finished()
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.exhaustive
def test_questions_are_answered_as_by_one_process(runs):
    """LaVIN: questions with and without a picture, 7 in batches of 8 over four devices."""
    stage = {"steps": 2, "warmup_steps": 0, "batch": 8}
    more = [f"--config.stages.base.{name}={value}" for name, value in stage.items()]
    more += ["--config.arm.eim.sequence=('base',)", "--config.data.eval_limit=7"]
    one, two = (
        Run(runs / f"lavin{n}", n, 4 // n, *more, config="miniature_lavin").finished().workdir / "eim" for n in (1, 2)
    )
    want, got = (json.loads((arm / "predictions_test.json").read_text()) for arm in (one, two))
    assert len(want["outputs"]) == 7 and got == want
    want, got = (json.loads((arm / "scores_test.json").read_text())["greedy"] for arm in (one, two))
    assert got.pop("notes") == want.pop("notes") and {"nll", "nll_image", "nll_image_shuffled"} <= want.keys()
    assert got == pytest.approx(want, abs=1e-4)


def test_one_process_speaks_for_all(pair):
    assert "2 processes, 4 devices" in pair.said(0) and "training samples" in pair.said(0)
    assert "training samples" not in pair.said(1) and "eim ie" not in pair.said(1)
    assert (pair.workdir / "report.html").exists()


@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_all_after_the_same_step_with_the_state_saved(stopped):
    assert all(code not in (0, -signal.SIGTERM, -signal.SIGABRT) for code in stopped.codes), stopped.codes
    steps = {line for i in range(2) for line in stopped.said(i).splitlines() if "the same command continues" in line}
    assert len({line[line.index("stopped after") :] for line in steps}) == 1, steps
    assert all("the same command continues" in stopped.said(i) for i in range(2))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2), (1, 1)], ids=["1x8", "4x2", "1x1"])
def test_a_checkpoint_of_two_processes_continues_on_other_numbers_of_processes(
    runs, alone, stopped, processes, devices
):
    here = runs / f"elastic{processes}x{devices}"
    shutil.copytree(stopped.workdir, here)
    before = losses(here)
    run = Run(here, processes, devices).finished()
    assert "resuming ie after step" in run.said(0)
    assert any(step not in before for step in losses(here))
    # The data order is the uninterrupted run's: another batch at any step would give another loss.
    assert_same_run(alone, here, loss=1e-5, parameters=1e-4)


@pytest.mark.exhaustive
def test_a_lost_process_ends_the_others_in_bounded_time_and_the_restarted_run_is_the_same(runs, alone, pair):
    here = runs / "lost"
    shutil.copytree(runs / "pair" / "cache", here / "cache")  # what the image check found
    run = Run(here, 2, 2)
    run.until(lambda: (1, 3) in losses(here))
    run.processes[1].kill()
    begun = time.monotonic()
    codes = run.ended()
    assert time.monotonic() - begun < STATED
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    # A shell that outlives the process says it, a moment after the end.
    while "process 0 of 2" not in run.said(0):
        assert time.monotonic() - begun < STATED, run.said(0)[-2500:]
        time.sleep(0.005)
    assert "the same command" in run.said(0).lower()
    again = Run(here, 2, 2).finished()
    assert "already trained" in again.said(0)
    assert_same_run(alone, here)


def test_an_error_of_one_process_names_it_and_ends_the_others(runs, pair):
    here = runs / "error"
    run = Run(here, 2, 1, mesh=(1, 3, 1))
    assert all(run.ended())
    said = [run.said(i) for i in range(2)]
    assert any(f"process {i} of 2: error: config.mesh" in said[i] for i in range(2)), said

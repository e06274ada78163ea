"""SIGINT and SIGTERM at any moment end a process with one line, also where Python is not asked."""

import os
import signal
import subprocess
import sys
import time
import types

import mains
import pytest
from test_resume import command

from eim_jax.parallel import signals
from eim_jax.parallel.signals import Interrupted, handled

SCRIPT = """
import hashlib, time
from eim_jax.parallel.signals import Signals, doing, handled
with handled():
    doing("counting")
    print("begun", flush=True)
    {body}
"""
IN_PYTHON = "time.sleep(600)"
# As a compilation: without the lock of the interpreter, and not to be interrupted by a signal.
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"
# As a callback of the garbage collector: what is raised there goes nowhere.
IN_A_FINALISER = """
    class Slow:
        def __del__(self):
            time.sleep(600)
    slow = Slow()
    del slow
    time.sleep(600)
"""
SWALLOWS = """
    while True:
        try:
            time.sleep(600)
        except BaseException:
            print("swallowed", flush=True)
"""


@pytest.fixture
def start():
    running = []

    def begin(body):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.1)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [IN_PYTHON, IN_C, IN_A_FINALISER], ids=["python", "c", "finaliser"])
def test_one_signal_ends_the_process_with_one_line(start, body, number):
    process = start(body)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert said.strip() == "stopped while counting: the same command continues"
    assert process.returncode == 1


@pytest.mark.parametrize("body", [IN_C, SWALLOWS], ids=["c", "swallowed"])
def test_a_second_ctrl_c_ends_at_once(start, body):
    process = start(body)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - begun < 2
    assert process.returncode == 128 + signal.SIGINT and "stopped at once" in said


def test_handlers_are_given_back_and_inner_ones_are_the_outer_one():
    before = signal.getsignal(signal.SIGTERM)
    with handled(), pytest.raises(Interrupted, match="stopped while starting: it starts again"):
        pass_on = signal.getsignal(signal.SIGTERM)
        with handled("another"):
            assert signal.getsignal(signal.SIGTERM) is pass_on
        with pytest.raises(Interrupted, match="the same command continues"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise Interrupted("stopped while starting: it starts again", together=False)
    assert signal.getsignal(signal.SIGTERM) is before


def wait_for(process, words):
    process.until(lambda: words in process.said())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_stopped_while_it_reads_compiles_and_scores_says_what_continues(tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "said.txt"
    few = [f"--config.stages.{name}.steps=3" for name in ("st", "lm", "ie")]
    for moment, doing in (
        ("training samples", "stopped while "),
        ("compiling st", "stopped "),  # where the program comes from a cache, the first step may be done before
        ("captions by greedy", "stopped while scoring arm eim"),
    ):
        process = mains.Main(command(workdir, *few), output)
        wait_for(process, moment)
        process.signal(signal.SIGINT)
        assert process.wait() == 1, process.said()[-2000:]
        last = process.said().strip().splitlines()[-1]
        assert last.startswith(doing) and last.endswith(": the same command continues")
        assert "Traceback" not in process.said()
    process = mains.Main(command(workdir, *few), output)
    assert process.wait() == 0, process.said()[-2000:]


def test_what_was_done_is_told_in_order_with_its_seconds_and_counted_anew(monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 13.0, 20.0, 21.0, 30.0, 32.0])
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(signals, "_state", signals._State())
    signals.doing("reading")
    signals.doing("reading")  # the same again is no other activity
    signals.doing("training")
    assert signals.spent() == [("starting", 2.0), ("reading", 1.0), ("training", 7.0)]
    assert signals.spent() == [("training", 1.0)]
    signals.began(5.0)  # seconds before now
    assert signals.spent() == [("training", 7.0)]

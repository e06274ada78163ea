"""A campaign of interruptions in small: what is struck and started again leaves what nobody disturbed leaves."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_commands_struck_three_times_leave_what_undisturbed_ones_leave(tmp_path):
    command = [sys.executable, "-m", "tests.kill", "--kills=3", "--seed=1", f"--folder={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (counts,) = (line.split() for line in done.stdout.splitlines() if line.startswith("all "))
    assert int(counts[-2]) >= 3 and counts[-1] == "0"

"""One run a workdir: a second is told who holds it, a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest

from eim_jax.parallel import lock
from eim_jax.parallel.lock import InUse, locked

HOLDS = """
import pathlib, sys, time
from eim_jax.parallel.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_told_who_holds_the_workdir_and_a_killed_one_holds_nothing(tmp_path, other, capsys):
    with (
        pytest.raises(InUse, match=rf"in use by another run \(process {other.pid} on .*, since 20.*choose another"),
        locked(tmp_path / "run"),
    ):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(tmp_path / "run"):
        said = capsys.readouterr().out
        assert f"process {other.pid} on" in said and "ended without a word" in said
        assert json.loads((tmp_path / "run" / lock.FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(InUse, match=f"process {os.getpid()} "), locked(tmp_path / "run"):
            pass
        (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run"):
        raise KeyboardInterrupt
    with locked(tmp_path / "run"):
        assert capsys.readouterr().out == ""


def test_without_locks_of_the_file_system_the_note_decides(tmp_path, other, monkeypatch):
    def none(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(InUse, match=f"process {other.pid} "), locked(tmp_path / "run"):
        pass
    file = tmp_path / "run" / lock.FILE
    note = json.loads(file.read_text())
    file.write_text(json.dumps({**note, "process_started": 1.0}))  # the number is another process's now
    with locked(tmp_path / "run"):
        pass
    file.write_text(json.dumps({**note, "host": "elsewhere"}))  # nobody can tell from here
    with pytest.raises(InUse, match="on elsewhere"), locked(tmp_path / "run"):
        pass
    # Cut short by a kill, or damaged.
    for content in (
        '{"pid": 1',
        "[7]",
        "[" * 4096,
        json.dumps({**note, "pid": 10**30}),
        json.dumps({**note, "pid": []}),
    ):
        file.write_text(content)
        with locked(tmp_path / "run"):
            pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="refused"), locked(tmp_path / "a" / "run"):
        raise ValueError("refused")
    assert not (tmp_path / "a" / "run").exists()

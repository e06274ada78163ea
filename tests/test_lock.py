"""One run a workdir: a second is told who holds it, a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest

from eim_jax.commands import exporting, prepare
from eim_jax.config import Config
from eim_jax.parallel import lock
from eim_jax.parallel.lock import InUse, held, locked

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


WRITES = """
import pathlib, sys, time
from eim_jax.parallel.lock import held
with held(pathlib.Path(sys.argv[1]), wait=sys.argv[2] == "wait"):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def writer(folder, wait="no", seconds=600):
    command = [sys.executable, "-c", WRITES, folder, wait, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_commands_do_not_write_one_folder_and_a_killed_one_leaves_its_place(tmp_path, capsys):
    folder = tmp_path / "new" / "out"
    first = writer(folder)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=rf"out is in use by another run \(process {first.pid} .*choose another --out"):
            lock.held(folder, wait=False).__enter__()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with held(folder, wait=False):
        assert f"process {first.pid} on" in capsys.readouterr().out
        assert not folder.exists()  # an export's folder has to be empty
    assert not list(folder.parent.iterdir())


def test_what_two_runs_need_is_waited_for(tmp_path, capsys):
    folder = tmp_path / "features"
    first = writer(folder, seconds=2)
    assert first.stdout.readline() == "held\n"
    with held(folder, wait=True):
        assert first.wait() == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("waiting for it") == 1 and f"process {first.pid} on" in said
        assert "ended without a word" not in said
    assert not list(tmp_path.iterdir())


def test_prepare_and_export_hold_their_folders(tmp_path, monkeypatch):
    taken = []

    def refuse(folder, *, wait):
        taken.append((folder, wait))
        raise InUse("in use")

    for module, call in (
        (prepare, lambda: prepare.prepare(Config(), tmp_path / "p")),
        (exporting, lambda: exporting.export(Config(), tmp_path, "eim", tmp_path / "e")),
    ):
        monkeypatch.setattr(module, "held", refuse)
        with pytest.raises(InUse):
            call()
    assert taken == [(tmp_path / "p", False), (tmp_path / "e", False)]

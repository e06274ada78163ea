"""What a command writes appears whole or not at all, and may be read by whom the umask says."""

import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from eim_jax.utils import files
from eim_jax.utils.files import new_folder, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_folder_is_readable_as_the_umask_says(tmp_path, umask):
    with new_folder(tmp_path / "out") as scratch:
        save_file({"a": np.ones(3)}, scratch / "a.safetensors")
        (scratch / "lm").mkdir()
        (scratch / "lm" / "config.json").write_text("{}")
        os.chmod(scratch / "lm" / "config.json", 0o600)  # as libraries do that write by way of a temporary file
    for file in ("a.safetensors", "lm/config.json"):
        assert stat.S_IMODE((tmp_path / "out" / file).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_a_folder_whose_writing_stops_is_not_there_and_the_next_attempt_writes_it(tmp_path):
    (tmp_path / "out").mkdir()  # an empty one may be there
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left by a kill").write_text("1")
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("2")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a"]


def test_a_text_that_cannot_be_written_whole_leaves_the_old_one_alone(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", dies)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]


def test_what_a_killed_process_left_of_a_text_goes_with_the_next_write_and_a_living_ones_stays(tmp_path):
    script = """
import os, pathlib, sys
from eim_jax.utils import files
files.flush = lambda path: os.kill(os.getpid(), 9)
files.write_text(pathlib.Path(sys.argv[1]), "half")
"""
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "a.json"])
    (left,) = tmp_path.iterdir()
    assert killed.returncode == -9 and left.name.startswith("a.json.")
    others = [left.with_name(left.name.replace("a.json", name)) for name in ("b.json", "a.json.1")]
    living = left.with_name(re.sub(r"-\d+[.]", f"-{os.getppid()}.", left.name))
    elsewhere = tmp_path / "a.json.0000ffff-1234567.partial"
    for file in (*others, living, elsewhere):
        file.write_text("stays")
    write_text(tmp_path / "a.json", "whole")
    assert {*tmp_path.iterdir()} == {tmp_path / "a.json", *others, living, elsewhere}
    assert (tmp_path / "a.json").read_text() == "whole"

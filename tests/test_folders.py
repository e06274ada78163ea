"""What a command writes appears whole or not at all, and may be read by whom the umask says."""

import os
import stat

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

"""Claims about paths: "~" is the home folder wherever a path is given, also where no shell expands it."""

import json
import pathlib

import pytest
from test_coco import caption, photo, write
from test_instruct import alpaca

from eim_jax.commands import command_line
from eim_jax.data.data_set import exists
from eim_jax.data.datasets.coco import COCO, CocoFields, load_coco
from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.datasets.scienceqa import load_scienceqa
from eim_jax.data.datasets.scienceqa_files import read_problems
from eim_jax.data.text_files import read_json
from eim_jax.utils.files import user_path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_reader_expands_the_home_folder(home):
    photo(home / "images" / "1.jpg")
    write(home, [{"id": 1, "file_name": "1.jpg"}], [caption(1, 1)])
    assert len(load_coco("~/captions.json", "~/images").split) == 1
    assert exists("~/captions.json") and read_json("~/captions.json")["images"]
    assert COCO.shards.sources(CocoFields(annotations="~/captions.json"))["annotations"] == home / "captions.json"
    (home / "rows.json").write_text(json.dumps([alpaca(0, image="1.jpg")]))
    assert load_instruct([("~/rows.json", 1.0)], "~/images").split.images.folder == home / "images"
    (home / "qa").mkdir()
    (home / "qa" / "problems.json").write_text('{"5": {"question": "q", "choices": ["a", "b"], "answer": 1}}')
    (home / "qa" / "pid_splits.json").write_text('{"test": ["5"]}')
    assert len(load_scienceqa("~/qa", "test").split) == len(read_problems("~/qa", "test")) == 1


def test_a_config_file_under_the_home_folder_is_found(home):
    assert command_line.presets_as_files(["eim_jax", "--config=~/a.py:b"]) == ["eim_jax", f"--config={home}/a.py:b"]
    assert command_line.presets_as_files(["eim_jax", "--config", "~/a.py"]) == ["eim_jax", "--config", f"{home}/a.py"]
    assert command_line.presets_as_files(["eim_jax", "--config=a/b.py"]) == ["eim_jax", "--config=a/b.py"]


def test_without_a_home_folder_a_path_is_as_it_stands(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
    assert user_path("~nobody/a") == pathlib.Path("~nobody/a")

"""A data set with fields of its own, added by a config file: the one of docs/extend/data_sets.md."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eim_jax.commands.inspection import inspect
from eim_jax.commands.train import train
from eim_jax.config import ConfigError, as_dict, from_config_dict, read_saved
from eim_jax.data import shard_writer
from eim_jax.data.datasets import DATASETS, data_set, load_split
from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning.shapes import abstract_inputs
from eim_jax.training import kinds

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extend" / "data_sets.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page's config file."""
    place = tmp_path_factory.mktemp("config") / "dots.py"
    place.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    return place


@pytest.fixture(scope="module")
def dots(file):
    """The file as --config executes it; the table is as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "dots", None)
        spec = importlib.util.spec_from_file_location("dots", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    assert "dots" not in DATASETS


@pytest.fixture(scope="module")
def asked(dots, tmp_path_factory):
    """Returns a function: changed fields -> the checked config of a short run."""
    place = tmp_path_factory.mktemp("pictures")

    def config(**changes):
        values = dots.get_config()
        short = {"steps": 2, "warmup_steps": 0, "batch": 8}
        values.stages.st.update(short)
        values.arm.eim.sequence = ("st",)
        values.arm.eim.prompts = 0
        values.decode.update({"methods": ("greedy",), "max_tokens": 3, "java": False})
        values.data.update({"dots_folder": str(place), **changes})
        found = from_config_dict(values)
        kinds.check(found)
        return found

    return config


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = asked(most=3)
    train(config, workdir, {"config": as_dict(config), "command": "", "versions": {}, "machine": {}, "started": ""})
    return config, workdir


def test_it_trains_and_is_scored_and_stands_in_the_report(finished):
    _, workdir = finished
    steps = [json.loads(line) for line in (workdir / "eim" / "metrics.jsonl").read_text().splitlines()]
    assert any(np.isfinite(line.get("loss/st", np.nan)) for line in steps)
    scores = json.loads((workdir / "eim" / "scores_test.json").read_text())["greedy"]
    assert 0 < scores["nll"] < 50 and "8 images" in scores["notes"]["decoding"]
    assert "there are three dots." in (workdir / "report.html").read_text()


def test_a_run_remembers_the_fields_and_may_change_those_that_are_free(finished, asked):
    config, workdir = finished
    kept = json.loads((workdir / "run.json").read_text())["config"]["data"]
    assert kept["kind"] == "dots" and kept["most"] == 3 and kept["annotations"] == ""
    saved = read_saved(workdir)
    settled = dataclasses.replace(config, data=dataclasses.replace(config.data, seam="spaced"))  # by the tokenizer
    assert saved == settled and data_set(saved.data).settings(saved.data).most == 3
    assert kinds.differences(saved, asked(most=3, dots_folder="elsewhere")) == []
    assert kinds.differences(saved, asked(most=2)) == ["data.most: 3 in the workdir, 2 asked for"]


def test_its_own_fields_are_checked(asked):
    for changes, message in (
        ({"most": "many"}, "config.data.most: 'many' is not a int"),
        ({"mots": 3}, "config.data.mots: no such field; did you mean 'most'?"),
    ):
        values = as_dict(asked())
        values["data"] |= changes
        with pytest.raises(ConfigError, match=re.escape(message)):
            kinds.check(from_config_dict(values))


def test_plan_counts_it(asked):
    _, notes = abstract_inputs(asked(), make_mesh((1, -1, 1)))
    assert "64 training samples (counted)" in notes


def test_inspect_shows_its_samples(finished, capsys):
    inspect(*finished, "eim", 2)
    shown = capsys.readouterr().out
    assert re.search(r"sample train\d+\.png", shown) and "[there] [are]" in shown  # the caption, token by token


def test_it_is_prepared_and_read_back_as_it_was(asked, tmp_path):
    config = asked(most=3)
    shard_writer.prepare(config, tmp_path / "shards", 2000)
    prepared = asked(most=3, prepared=str(tmp_path / "shards"))
    for name in ("train", "test"):
        want, got = load_split(config, name, tmp_path), load_split(prepared, name, tmp_path)
        assert got.samples == want.samples and got.references == want.references
        assert got.fingerprint() == want.fingerprint()
        assert np.array_equal(np.asarray(got.images[1]), np.asarray(want.images[1]))
    with pytest.raises(ConfigError, match=r"config\.data\.most is 2, but .* was prepared with 3"):
        load_split(asked(most=2, prepared=str(tmp_path / "shards")), "train", tmp_path)


def test_the_command_line_knows_the_data_set_of_a_config_file(file, tmp_path):
    command = [sys.executable, "-m", "eim_jax.main", f"--config={file}", "--mode=prepare", f"--out={tmp_path / 'out'}"]
    command += [f"--config.data.dots_folder={tmp_path / 'pictures'}", "--config.data.most=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "prepared 72 samples" in done.stdout, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"] == {"most": 2}
    wrong = subprocess.run([*command, "--config.data.mots=2"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "config.data has no field 'mots'; did you mean config.data.most?" in wrong.stderr

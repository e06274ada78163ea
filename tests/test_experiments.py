"""The paper's tables as data: rows that resolve, cells that run once."""

import importlib
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from experiment_cases import few_scenes, with_overrides, write

from eim_jax.config import ConfigError, from_config_dict
from eim_jax.data.datasets import load_split
from eim_jax.training.arm import plan_arm
from experiments import report, results, rows, run
from experiments.cells import FAMILIES, SCALES, Row, cell, hash_of, resolve
from experiments.tables import TABLES, rows_of

ROOT = Path(__file__).resolve().parent.parent
ALL = {scale: rows_of(list(TABLES.values()), scale) for scale in SCALES}


# Rows


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_of_every_table_is_a_valid_config(scale):
    for row in ALL[scale]:
        for budget in ("steps", "paper"):
            one = cell(row, scale, 3, budget)
            assert one.config.seed == 3 and one.config.arms == (row.arm,)
        total = sum(cell(row, scale, 0).config.stages[s].steps for s in one.config.arm[row.arm].sequence)
        assert abs(total - FAMILIES[row.family].steps[scale]) <= 2  # equal budgets, up to rounding
    assert {row.name for row in ALL["miniature"] if "full" in row.scales} < {row.name for row in ALL["full"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs of each miniature config, over few scenes."""
    loaded = {}

    def get(one):
        if one.file not in loaded:
            loaded[one.file] = few_scenes(one, tmp_path_factory.mktemp("world"))
        return loaded[one.file]

    return get


def test_the_patterns_of_every_row_find_their_parameters(world):
    planned = set()
    for row in ALL["miniature"]:
        one = cell(row, "miniature", 0)
        arm = one.config.arm[row.arm]
        what = one.file, repr(arm), tuple(one.config.stages[name].train for name in arm.sequence)
        if what in planned:  # another row with other rates, steps or weights
            continue
        planned.add(what)
        inputs = world(one)
        object.__setattr__(inputs, "config", one.config)
        plan = plan_arm(inputs, row.arm)
        assert all(stage.trained_params > 0 for stage in plan)


def test_a_row_is_one_definition_and_its_cell_one_hash():
    seen = {}
    for table in TABLES.values():
        for row in table.rows:
            assert seen.setdefault(row.name, row) is row
        assert not table.ticks or len(table.ticks) == len(table.rows)
        assert all(len(ticks) == len(table.marks) for ticks in table.ticks)
    for scale, budget in itertools.product(SCALES, ("steps", "paper")):
        hashes = {}
        for row in rows_of(list(TABLES.values()), scale, budget):
            hashes.setdefault(cell(row, scale, 0, budget).hash, []).append(row.name)
        assert [names for names in hashes.values() if len(names) > 1] == [], (scale, budget)
    assert TABLES["4"].rows[-1] is TABLES["2"].rows[-1] is TABLES["open"].rows[0]


def test_a_hash_follows_what_decides_the_numbers_and_nothing_else():
    row = rows.EIM
    one = cell(row, "miniature", 0)
    assert cell(row, "miniature", 1).hash != one.hash != cell(row, "miniature", 0, "paper").hash
    module = FAMILIES["clipcap"].configs["miniature"]
    for free in ({"data.cache": "/elsewhere"}, {"log_every": 7}, {"stages.joint.lr": 0.5}, {"arm.baseline.st": "ffn"}):
        values = {**one.overrides, **free, **({"arm.baseline.features": "full"} if "arm.baseline.st" in free else {})}
        assert hash_of(from_config_dict(with_overrides(module.get_config(), values)), "eim") == one.hash
    for deciding in ({"decode.max_tokens": 9}, {"stages.lm.lr": 0.5}, {"data.eval_limit": 9}):
        config = from_config_dict(with_overrides(module.get_config(), {**one.overrides, **deciding}))
        assert hash_of(config, "eim") != one.hash


def test_every_committed_result_is_still_known_by_its_hash():
    """The config that made it, by the overrides it was made with; and, where its row stands in a table, the row's."""
    known = {row.name: row for table in TABLES.values() for row in table.rows}
    steps = [file for file in (ROOT / results.OUT / "miniature").glob("*-s*.json")]
    assert len(steps) > 200
    of_rows = 0
    for file in steps:
        found = json.loads(file.read_text())
        module = importlib.import_module(".".join(Path(found["file"]).with_suffix("").parts))
        config = resolve(module, {k: tuple(v) if isinstance(v, list) else v for k, v in found["overrides"].items()})
        arm = found["overrides"]["arms"][0]
        assert hash_of(config, arm) == found["hash"] == file.stem.rpartition("-")[2], file.name
        if found["budget"] == "steps":
            assert cell(known[found["row"]], "miniature", found["seed"]).hash == found["hash"], file.name
            of_rows += 1
    assert of_rows > 150


def test_rates_are_compared_on_the_validation_split():
    drawn = set()
    for row in TABLES["tuning"].rows:
        config = cell(row, "miniature", 0).config
        few = replace(config, data=replace(config.data, own={**config.data.own, "scenes": 8}))
        if repr(few.data) not in drawn:
            drawn.add(repr(few.data))
            assert load_split(few, "test", Path()).name == "val" != load_split(few, "train", Path()).name
        (rate,) = (value for field, value in row.overrides.items() if field.endswith(".lr"))
        assert rate == config.stages[config.arm[row.arm].sequence[-1]].lr


def test_an_override_that_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match="no stage 'nowhere'"):
        cell(Row("x", "x", "clipcap", overrides={"sequence": ("nowhere",)}), "miniature", 0)
    with pytest.raises(KeyError):
        cell(rows.LARGE, "miniature", 0)


def test_equal_time_scales_a_rows_steps_by_the_seconds_measured(tmp_path):
    options = run.parse(["--table=4", "--budget=time", "--seeds=1", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="budget=steps"):
        run.cells([rows.BASELINE, rows.EIM], options)
    for row, seconds in ((rows.BASELINE, 0.1), (rows.EIM, 0.3)):
        write(tmp_path, cell(row, "miniature", 0), seconds=seconds)
    write(tmp_path, cell(rows.EIM, "miniature", 1), seconds=0.9)  # slowed by other work: the fastest seed counts
    (eim,) = run.cells([rows.EIM], options)  # the baseline's own factor is 1, asked for or not
    assert report.read(tmp_path, "miniature", "time", 5)["clipcap"][0]["row"] == "clipcap"
    base, eim = run.cells([rows.BASELINE, rows.EIM], options)
    assert base.config.stages["base"].steps == 900
    assert [eim.config.stages[s].steps for s in ("st", "lm", "ie")] == [50, 50, 200]
    assert run.cells([rows.BASELINE], options)[0].hash == cell(rows.BASELINE, "miniature", 0).hash
    assert report.read(tmp_path, "miniature", "time", 5)["clipcap"][0]["row"] == "clipcap"
    write(tmp_path, cell(rows.EIM, "miniature", 0), seconds=9.0)  # measured once, kept
    assert run.cells([rows.EIM], options)[0].hash == eim.hash


# The runner

FAKE = """#!{python}
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
calls = workdir / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
(workdir / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
if "-lm-" in str(workdir) + "-" or workdir.name.startswith("lm-"):
    (workdir / "slow").touch()
    if len(calls.read_text()) == 1:
        time.sleep(60)
if workdir.name.startswith("ie-"):
    sys.exit("error: nothing works")
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Runs cells by a program that trains nothing."""
    fake = tmp_path / "fake"
    fake.write_text(FAKE.format(python=sys.executable, root=str(ROOT)))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(run.sys, "executable", str(fake))
    monkeypatch.setattr(run.results, "save", lambda out, one, workdir: write(out, one))
    return lambda jobs=2: run.Pool(jobs, tmp_path / "out", tmp_path / "runs")


def _cells(*chosen):
    return [cell(row, "miniature", 0) for row in chosen]


def test_a_stopped_call_keeps_what_is_finished_and_continues(pool, tmp_path, monkeypatch):
    quick, slow = _cells(rows.ST_ALONE, rows.LM_ALONE)
    stopping = pool()
    watch = stopping._reap

    def reap(*place):
        watch(*place)
        if (tmp_path / "runs" / "miniature" / slow.name / "slow").exists() and results.read(tmp_path / "out", quick):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stopping, "_reap", reap)
    with pytest.raises(SystemExit, match="the same command continues"):
        stopping.run([quick, slow])
    assert results.read(tmp_path / "out", quick) and results.read(tmp_path / "out", slow) is None
    missing = [one for one in (quick, slow) if results.read(tmp_path / "out", one) is None]
    monkeypatch.setattr(results, "commit", lambda: "another")
    assert pool().run(missing) == {}
    assert (tmp_path / "runs" / "miniature" / quick.name / "calls").read_text() == "x"
    assert (tmp_path / "runs" / "miniature" / slow.name / "calls").read_text() == "xx"
    begun = (tmp_path / "runs" / "miniature" / slow.name / results.COMMIT).read_text()
    assert "another" not in begun  # the code that a run began with, not that of the call which ended it


def test_what_is_found_out_later_changes_nothing_else_in_a_result(tmp_path):
    (one,) = _cells(rows.ST_ALONE)
    before = write(tmp_path, one, commit="abc")
    results.add(tmp_path, one, "diagnostics", [1])
    assert results.read(tmp_path, one) == {**before, "diagnostics": [1]}


def test_a_failed_cell_is_named_and_the_others_go_on(pool, tmp_path):
    broken, fine = _cells(rows.IE_ALONE, rows.ST_ALONE)
    assert pool(1).run([broken, fine]) == {broken.name: "error: nothing works"}
    assert results.read(tmp_path / "out", fine)["row"] == "st"


@pytest.mark.parametrize(("given", "jobs", "shares"), [("4,5,7", 2, {"4,7", "5"}), ("3", 2, {"3"}), ("", 2, {""})])
def test_runs_share_the_gpus(pool, tmp_path, monkeypatch, given, jobs, shares):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    both = _cells(rows.ST_ALONE, rows.BASELINE)
    assert pool(jobs).run(both) == {}
    assert {(tmp_path / "runs" / "miniature" / one.name / "gpus").read_text() for one in both} == shares


def test_two_runs_never_share_a_work_directory(pool, tmp_path):
    (one,) = _cells(rows.ST_ALONE)
    workdir = tmp_path / "runs" / "miniature" / one.name
    workdir.mkdir(parents=True)
    held = run._lock(workdir / "lock")
    assert "another process" in pool().run([one])[one.name]
    held.close()
    assert pool().run([one]) == {}


def test_the_command_line_makes_the_cells_config(tmp_path):
    one = cell(rows.NORMS_ZERO, "miniature", 2)
    code = (
        "import sys, json, pathlib; from eim_jax import main, config; main._parse(sys.argv)\n"
        "print(json.dumps(config.as_dict(main._config(pathlib.Path('x'), 'train'))))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, *one.flags(), f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert from_config_dict(json.loads(told.stdout.splitlines()[-1])) == one.config, told.stderr[-500:]

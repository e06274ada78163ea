"""The paper's tables as data: rows that resolve, cells that run once, intervals and verdicts in known cases."""

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from eim_jax import inputs as loading
from eim_jax import partition
from eim_jax.config import ConfigError, from_config_dict
from eim_jax.data.sources import load_split
from eim_jax.models.gpt2 import GPT2
from eim_jax.train import plan_arm
from experiments import claims, diagnose, integration, intervals, report, results, rows, run
from experiments.cells import FAMILIES, SCALES, Row, cell, hash_of
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
    assert {row.name for row in ALL["miniature"]} < {row.name for row in ALL["full"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs of each miniature config, over few scenes."""
    loaded = {}

    def get(one):
        if one.file not in loaded:
            values = {**one.overrides, "data.scenes": 60}
            module = FAMILIES[one.row.family].configs["miniature"]
            config = from_config_dict(_with(module.get_config(), values))
            loaded[one.file] = loading.load(config, tmp_path_factory.mktemp("world"))
        return loaded[one.file]

    return get


def _with(config, overrides):
    config.update_from_flattened_dict(overrides)
    return config


def test_the_patterns_of_every_row_find_their_parameters(world):
    for row in ALL["miniature"]:
        one = cell(row, "miniature", 0)
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
    hashes = {}
    for row in ALL["miniature"]:
        hashes.setdefault(cell(row, "miniature", 0).hash, []).append(row.name)
    assert [names for names in hashes.values() if len(names) > 1] == []
    assert TABLES["4"].rows[-1] is TABLES["2"].rows[-1] is TABLES["open"].rows[0]


def test_a_hash_follows_what_decides_the_numbers_and_nothing_else():
    row = rows.EIM
    one = cell(row, "miniature", 0)
    assert cell(row, "miniature", 1).hash != one.hash != cell(row, "miniature", 0, "paper").hash
    module = FAMILIES["clipcap"].configs["miniature"]
    for free in ({"data.cache": "/elsewhere"}, {"log_every": 7}, {"stages.joint.lr": 0.5}, {"arm.baseline.st": "ffn"}):
        values = {**one.overrides, **free, **({"arm.baseline.features": "full"} if "arm.baseline.st" in free else {})}
        assert hash_of(from_config_dict(_with(module.get_config(), values)), "eim") == one.hash
    for deciding in ({"decode.max_tokens": 9}, {"stages.lm.lr": 0.5}, {"data.eval_limit": 9}):
        config = from_config_dict(_with(module.get_config(), {**one.overrides, **deciding}))
        assert hash_of(config, "eim") != one.hash


def test_rates_are_compared_on_the_validation_split():
    for row in TABLES["tuning"].rows:
        config = cell(row, "miniature", 0).config
        assert load_split(config, "test", Path()).name == "val" != load_split(config, "train", Path()).name
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
        _write(tmp_path, cell(row, "miniature", 0), seconds=seconds)
    base, eim = run.cells([rows.BASELINE, rows.EIM], options)
    assert base.config.stages["base"].steps == 900
    assert [eim.config.stages[s].steps for s in ("st", "lm", "ie")] == [50, 50, 200]
    assert run.cells([rows.BASELINE], options)[0].hash == cell(rows.BASELINE, "miniature", 0).hash
    assert report.read(tmp_path, "miniature", "time", 5)["clipcap"][0]["row"] == "clipcap"
    _write(tmp_path, cell(rows.EIM, "miniature", 0), seconds=9.0)  # measured once, kept
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
    monkeypatch.setattr(run.results, "save", lambda out, one, workdir: _write(out, one))
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
    assert pool().run(missing) == {}
    assert (tmp_path / "runs" / "miniature" / quick.name / "calls").read_text() == "x"
    assert (tmp_path / "runs" / "miniature" / slow.name / "calls").read_text() == "xx"


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


# Intervals and verdicts


def test_the_interval_of_many_seeds_is_students():
    values = np.random.default_rng(1).normal(2.0, 1.0, 40)
    found = intervals.bootstrap(values, np.tile(values, (20_000, 1)))
    half = stats.t.ppf(0.975, 39) * values.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(np.quantile(found, [0.025, 0.975]), values.mean() + np.array([-half, half]), atol=0.03)


def test_the_interval_of_one_seed_is_that_of_the_items():
    rng = np.random.default_rng(2)
    right = rng.integers(0, 2, 400)
    one = {0: _result(items={"ids": list(range(400)), "accuracy/Avg": [[int(r), 1] for r in right]})}
    one[0]["scores"]["accuracy/Avg"] = right.mean()
    low, high = intervals.score(one, "accuracy/Avg").interval
    half = 1.96 * right.std() / 20
    np.testing.assert_allclose([low, high], [right.mean() - half, right.mean() + half], atol=0.006)


@pytest.mark.parametrize(
    ("seeds", "items", "both", "most"),
    [(1.0, 4.0, 4.0, 0.985), (1.0, 0.0, 1.0, 0.985), (0.0, 0.0, 8.0, 1.0), (0.5, 1.0, 8.0, 1.0)],
)
def test_a_difference_of_nothing_is_covered_as_often_as_promised(seeds, items, both, most):
    # Five seeds, 60 items; noise of seeds, of items and of both together is normal, the true difference is 0.
    rng, hits, trials, number, length = np.random.default_rng(3), 0, 300, 60, 0.0
    draws = rng.multinomial(number, np.full(number, 1 / number), size=600) / number
    for _ in range(trials):
        noise = rng.normal(0, seeds, (5, 1)) + rng.normal(0, items, (1, number)) + rng.normal(0, both, (5, number))
        low, high = intervals._interval(noise.mean(axis=1), draws @ noise.T)
        hits += low <= 0 <= high
        length += (high - low) / trials
    assert 0.92 <= hits / trials <= most
    # Against the interval of somebody who knows the three variances: at most half as long again.
    known = np.sqrt(seeds**2 / 5 + items**2 / number + both**2 / (5 * number))
    assert length < 1.5 * 2 * stats.t.ppf(0.975, 4) * known


@pytest.mark.parametrize("name", ["qa-test-0-{}", "count/test-0-{}/{}"], ids=["questions", "mme"])
def test_items_about_one_scene_are_drawn_together(name):
    # Two items a scene that say the same are worth one.
    right = np.random.default_rng(6).integers(0, 2, 200)
    ids = [name.format(2 * k + twin if "qa" in name else k, twin) for k in range(200) for twin in (0, 1)]
    parts = {"ids": ids, "accuracy/Avg": [[int(r), 1] for r in right for _ in range(2)]}
    low, high = intervals.score({0: _result(parts, {"accuracy/Avg": right.mean()})}, "accuracy/Avg").interval
    half = 1.96 * right.std() / np.sqrt(200)
    np.testing.assert_allclose([low, high], [right.mean() - half, right.mean() + half], atol=0.008)


def test_pairing_removes_what_two_rows_share():
    # Items differ by far more than the rows: unpaired, nothing could be said.
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 10, 200)
    left, right = {}, {}
    for seed in range(4):
        for row, effect in ((left, 0.0), (right, 1.0)):
            values = hard + effect + rng.normal(0, 0.5, 200)
            parts = {"ids": list(range(200)), "CIDEr": [[float(v), 1] for v in values]}
            row[seed] = _result(items=parts, scores={"CIDEr": float(values.mean())})
    change = intervals.difference(left, right, "CIDEr")
    assert 0.8 < change.interval[0] < change.mean < change.interval[1] < 1.2 and change.seeds == 4
    assert intervals.score(left, "CIDEr").interval[0] < -0.8
    right[0]["items"]["ids"] = ["another"] * 200
    with pytest.raises(ValueError, match="other items"):
        intervals.difference(left, right, "CIDEr")


@pytest.mark.parametrize(
    "interval, expected, word",
    [
        ((0.1, 2.0), 1.0, "supported"),
        ((0.1, 0.3), 1.0, "supported"),
        ((-0.5, 0.4), 1.0, "not supported"),
        ((-0.5, 0.6), 1.0, "undecided"),
        ((-0.5, 0.4), 0.0, "undecided"),
        ((-0.5, -0.1), 0.0, "not supported"),
        ((-3.0, 3.0), -1.0, "undecided"),
    ],
)
def test_the_rule_of_verdicts(interval, expected, word):
    assert claims.rule(interval, expected) == word


def test_claims_speak_of_rows_of_their_tables():
    assert len({claim.name for claim in claims.CLAIMS}) == len(claims.CLAIMS) >= 12
    for claim in claims.CLAIMS:
        assert claim.better in TABLES[claim.table].rows and claim.worse in TABLES[claim.table].rows
    effects = {claim.name: claim.effect for claim in claims.CLAIMS}
    np.testing.assert_allclose(effects["eim"], 33.9 / 31.2 - 1)
    np.testing.assert_allclose(effects["apart"], 33.9 / 32.0 - 1)
    assert effects["order"] == 0.0


# Diagnostics


def test_alignment_and_uniformity_of_known_queries():
    # Two opposite unit queries: d^2 = 4; their keys at right angles to one, equal to the other.
    found = diagnose.spread(np.array([[2.0, 0.0], [-3.0, 0.0]]), np.array([[0.0, 5.0], [-1.0, 0.0]]))
    np.testing.assert_allclose([found["alignment"], found["uniformity"]], [0.5, -8.0])


def test_gradients_are_compared_over_what_both_reach():
    a = {"x": np.array([3.0, 4.0]), "y": np.array([7.0])}
    assert diagnose.cosine(a, {"x": np.array([4.0, -3.0]), "y": np.zeros(1)}) == 0.0
    np.testing.assert_allclose(diagnose.cosine(a, {"x": np.array([6.0, 8.0]), "y": np.zeros(1)}), 1.0)
    assert diagnose.cosine(a, {"x": np.zeros(2), "y": np.zeros(1)}) is None


@pytest.mark.parametrize("scan", [False, True])
def test_the_integration_rate_reads_every_block(scan):
    # The output of block k, normed, is what the same LM gives that has its first k blocks alone.
    vlm, params = tiny.model()
    params = partition.unflatten(params)
    first, second = params["lm"]["blocks_0"], params["lm"]["blocks_1"]
    rest = {name: leaf for name, leaf in params["lm"].items() if not name.startswith("blocks")}
    if scan:
        vlm = dataclasses.replace(vlm, lm=GPT2(dataclasses.replace(vlm.lm.config, scan=True)))
        params = {**params, "lm": {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)}}
    batch = tiny.batch(text_only=(3,))
    found = integration.layers(vlm, params, batch)
    seen = vlm.connect(params, vlm.see(params, batch.image))
    read = vlm.lm_input(params, batch.tokens, batch.valid, visual=seen, has_image=batch.has_image)
    blocks = ({"blocks_0": first}, {"blocks_0": first, "blocks_1": second})
    for (visual, text), kept in zip(found, blocks, strict=True):
        lm = GPT2(dataclasses.replace(vlm.lm.config, scan=False, layers=len(kept)))
        expected = dataclasses.replace(vlm, lm=lm).blocks({**params, "lm": {**rest, **kept}}, read)
        both = np.concatenate([visual, text], axis=1).astype(np.float64)
        both = (both - both.mean(-1, keepdims=True)) / np.sqrt(both.var(-1, keepdims=True) + 1e-5)  # ln_f as it begins
        np.testing.assert_allclose(both, expected, atol=2e-5)
    assert np.isfinite(integration.integration_rate(vlm, params, batch))


def test_a_model_is_diagnosed_as_it_starts(world, monkeypatch):
    one = cell(rows.ST_ALONE, "miniature", 0)
    inputs = world(one)
    object.__setattr__(inputs, "config", one.config)
    vlm, params = loading.start(inputs, one.config.arm["baseline"])
    monkeypatch.setattr(diagnose, "after_stages", lambda inputs, arm: [("start", vlm, params)])
    monkeypatch.setattr(diagnose, "ROWS", 8)
    (found,) = diagnose.diagnose(inputs, "baseline", load_split(one.config, "test", Path()))
    assert found["after"] == "start" and 1 < found["perplexity"] < 50 and np.isfinite(found["integration"])
    assert found["queries"].keys() == {"st"} and found["cosines"].keys() == {"base·st"}
    assert abs(found["queries"]["st"]["alignment"]) < 0.3  # the ST is as it was drawn


def test_the_distance_of_two_clouds_is_that_of_their_gaussians():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5] + [3.0, 0.0, 0.0]
    visual = rng.normal(size=(200_000, 3)) * [2.0, 1.0, 0.5] + [0.0, 1.0, 0.0]
    length = np.linalg.norm(text, axis=1).mean()
    expected = (9 + 1 + (1 - 2) ** 2 + (2 - 1) ** 2) / length**2  # |difference of means|^2 + sum (sd - sd')^2
    np.testing.assert_allclose(integration.distance(visual, text), expected, rtol=0.03)
    np.testing.assert_allclose(integration.distance(7 * visual, 7 * text), integration.distance(visual, text))
    far = np.concatenate([visual, [[1e4, 0.0, 0.0]]])  # an outlier is left out
    np.testing.assert_allclose(integration.distance(far, text), expected, rtol=0.03)


# The report


def _result(items=None, scores=None, seed=0, row="", seconds=0.1, **more):
    curves = {
        "step": [25, 50],
        "loss": [2.0, 1.0],
        "loss/base": [2.0, 1.0],
        "loss/ie": [3.0, 2.5],
        "queue/ie/recall1": [0.1, 0.2],
        "queue/ie/effective": [90.0, 80.0],
    }
    stage = {
        "name": "ie",
        "losses": {"base": 1.0, "ie": 1.0},
        "steps": 600,
        "epochs": 4.0,
        "batch": 40,
        "trained_params": 9,
        "seconds": 60.0,
        "seconds_per_step": seconds,
        "peak_memory_bytes": 1,
        "curves": curves,
    }
    return {
        "row": row,
        "seed": seed,
        "budget": "steps",
        "file": "configs/miniature.py",
        "overrides": {"seed": seed},
        "versions": {"jax": "0"},
        "machine": {"cpu_cores": 2},
        "date": "2026-11-21",
        "decoding": "greedy",
        "seconds": 60.0,
        "scores": scores or {},
        "items": items or {"ids": []},
        "stages": [stage],
        "examples": {"test-0-1": "a red <circle>", "test-0-2": "two stars"},
        **more,
    }


def _write(out, one, **more):
    found = _result(seed=one.seed, row=one.row.name, scores={"Bleu_4": 0.3}, **more)
    target = results.path(out, one)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found))
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three seeds of Table 3 with EIM's row, as if they had been run: loss_IE helps, loss_LM does nothing."""
    out, rng = tmp_path_factory.mktemp("results"), np.random.default_rng(0)
    ids = [f"i{k}" for k in range(60)]
    for row, gain in ((rows.BASELINE, 0.0), (rows.ST_ALONE, 0.0), (rows.LM_ALONE, 0.0), (rows.IE_ALONE, 0.3)):
        for seed in range(3):
            right = rng.binomial(10, 0.4 + gain, 60)
            bleu = [[11, 10, 11, 10, 9, 8, int(r), max(int(r) - 1, 0), max(int(r) - 2, 1), 1] for r in right]
            nll = [[float(20 - r), 10] for r in right]
            parts = {"ids": ids, "Bleu_4": bleu, "nll": nll, "nll_shuffled": [[a + 3.0, b] for a, b in nll]}
            scores = {k: float(intervals.items.value(k, np.sum(v, axis=0))) for k, v in parts.items() if k != "ids"}
            scores["nll_gap"] = scores["nll_shuffled"] - scores["nll"]
            one = cell(row, "miniature", seed)
            target = results.path(out, one)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(_result(parts, scores, seed, row.name)))
    report.main([f"--out={out}"])
    return out


def test_the_page_is_whole_and_asks_the_network_for_nothing(measured):
    page = (measured / "miniature.html").read_text()
    assert page.count("<svg") >= 3 and "<circle>" not in page and "&lt;circle&gt;" in page
    assert not any(word in page for word in ("http://", "https://", "<script", 'src="/', "nan"))
    assert "Each loss alone" in page and "paper 32.8" in page and "Measures added" not in page
    assert page.count("<table>") == page.count("</table>") and page.count("<section") == page.count("</section>")
    assert 'class="change up">supported' in page


def test_the_markdown_holds_verdicts_and_tables_with_the_papers_values(measured):
    text = (measured / "miniature.md").read_text()
    lines = text.splitlines()
    claim = next(line for line in lines if line.startswith("| loss_IE (with prompts) alone"))
    assert claim.endswith("| 3 | supported |") and "+5.1 %" in claim
    assert next(line for line in lines if line.startswith("| EIM makes ClipCap better")).endswith(
        "| – | not measured |"
    )
    row = next(line for line in lines if line.startswith("| + loss_IE"))
    assert row.startswith("| + loss_IE | 600 ie; 0.00M trained; 1:00 | 32.8 | ") and "(+" in row
    assert len({line.count("|") for line in lines if line.startswith(("| + loss", "| ClipCap |"))}) <= 2


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([f"--out={tmp_path}"])
    assert "no finished cell" in capsys.readouterr().err

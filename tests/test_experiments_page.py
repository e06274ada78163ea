"""What is measured on finished models, and the page of the results."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close
from experiment_cases import few_scenes, result, write

from eim_jax.data.datasets import load_split
from eim_jax.evaluation.metrics import metric_of
from eim_jax.models.language.gpt2 import GPT2
from eim_jax.training import arm_model, partition
from experiments import diagnose, integration, report, results, rows
from experiments.cells import SCALES, cell
from experiments.tables import TABLES, rows_of

ROOT = Path(__file__).resolve().parent.parent
ALL = {scale: rows_of(list(TABLES.values()), scale) for scale in SCALES}


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
    seen = vlm.connect(params, vlm.encode_image(params, batch.image))
    read = vlm.lm_input(params, batch.tokens, batch.valid, visual=seen, has_image=batch.has_image)
    blocks = ({"blocks_0": first}, {"blocks_0": first, "blocks_1": second})
    for (visual, text), kept in zip(found, blocks, strict=True):
        lm = GPT2(dataclasses.replace(vlm.lm.config, scan=False, layers=len(kept)))
        expected = dataclasses.replace(vlm, lm=lm).run_lm({**params, "lm": {**rest, **kept}}, read)
        both = np.concatenate([visual, text], axis=1).astype(np.float64)
        both = (both - both.mean(-1, keepdims=True)) / np.sqrt(both.var(-1, keepdims=True) + 1e-5)
        both = both * np.asarray(rest["ln_f"]["scale"]) + np.asarray(rest["ln_f"]["bias"])
        assert_close(both, expected, 2e-5)
    assert np.isfinite(integration.integration_rate(vlm, params, batch))


@pytest.mark.exhaustive
def test_a_model_is_diagnosed_as_it_starts(tmp_path, monkeypatch):
    one = cell(rows.ST_WITH_LM, "miniature", 0)  # one of its stages has a rate of its own for st/.*
    inputs = few_scenes(one, tmp_path)
    object.__setattr__(inputs, "config", one.config)
    vlm, params = arm_model.start(inputs, one.config.arm["eim"])
    monkeypatch.setattr(diagnose, "after_stages", lambda inputs, arm: [("start", vlm, params)])
    monkeypatch.setattr(diagnose, "ROWS", 8)
    (found,) = diagnose.diagnose(inputs, "eim", load_split(one.config, "test", Path()))
    assert found["after"] == "start" and 1 < found["perplexity"] < 50 and np.isfinite(found["integration"])
    assert found["queries"].keys() == {"ie", "st", "lm"}
    assert found["cosines"].keys() == {"base·ie", "base·st", "base·lm", "ie·st"}  # the others share no parameters
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
            scores = {k: metric_of(k).total(v) for k, v in parts.items() if k != "ids"}
            scores["nll_gap"] = scores["nll_shuffled"] - scores["nll"]
            one = cell(row, "miniature", seed)
            target = results.path(out, one)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(result(parts, scores, seed, row.name)))
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
    assert row.startswith("| + loss_IE | 600 ie; 0.00M trained last; 1:00; 3 seeds | ") and "(+" in row
    assert row.split(" | ")[2].endswith("; paper 32.8")
    assert len({line.count("|") for line in lines if line.startswith(("| + loss", "| ClipCap |"))}) <= 2


def test_one_seed_has_no_interval_and_no_colour_and_a_note_is_shown(measured, tmp_path):
    out = shutil.copytree(measured, tmp_path / "results")
    (out / "miniature" / report.NOTE).write_text("Measured beside a <loud> fan.\n")
    report.main([f"--out={out}", "--seeds=1"])
    assert "\n\nMeasured beside a <loud> fan.\n\n|" in (out / "miniature.md").read_text()
    assert "Measured beside a &lt;loud&gt; fan." in (out / "miniature.html").read_text()
    row = next(line for line in (out / "miniature.md").read_text().splitlines() if line.startswith("| + loss_IE"))
    assert "; 1 seed |" in row and "[" not in row and "(+" in row
    assert 'class="change up"' not in (out / "miniature.html").read_text()


def test_seeds_of_a_row_that_saw_other_data_are_not_averaged(tmp_path, capsys):
    for seed in range(2):
        write(tmp_path, cell(rows.BASELINE, "miniature", seed), identity={"training data": f"data {seed}"})
    with pytest.raises(SystemExit):
        report.main([f"--out={tmp_path}"])
    assert "row clipcap" in capsys.readouterr().err


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([f"--out={tmp_path}"])
    assert "no finished cell" in capsys.readouterr().err

"""A metric added from here to a task that is there: it is scored and shown wherever metrics are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scored_runs

from eim_jax.evaluation.metrics import METRICS, metric_of
from eim_jax.evaluation.metrics.metric import Family, Metric
from experiments.intervals import score


def shared_words(outputs, references):
    """How many of a caption's words are in some reference: rows (shared, words)."""
    rows = []
    for key, text in outputs.items():
        known = {word for reference in references[key] for word in reference.split()}
        words = text.split()
        rows.append([sum(word in known for word in words), len(words)])
    return rows


SHARED = Metric(
    "shared_words",
    "shared words",
    factor=100,
    decimals=1,
    sense=+1,
    unit="points",
    tasks=("captions", "scenes"),
    measure=shared_words,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config, work directory) of a captioning run that the added metric scores too."""
    config, workdir = scored_runs.few_steps(**{"data.eval_limit": 12}), tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "shared_words", SHARED)
        scored_runs.run(config, workdir)
        yield config, workdir


def by_hand(workdir) -> np.ndarray:
    """Shared words and words of each caption in the predictions file."""
    from eim_jax.data.miniature import captioning

    references = captioning.load("test", scenes=12).references
    said = json.loads((workdir / "baseline" / "predictions_test.json").read_text())
    rows = []
    for one in said:
        words = one["caption"].split()
        rows.append(
            [sum(any(word in text.split() for text in references[one["image_id"]]) for word in words), len(words)]
        )
    return np.array(rows, float)


def test_the_scores_and_items_files_hold_it(world):
    workdir, rows = world[1], by_hand(world[1])
    found = scored_runs.scores_of(workdir)["baseline"]["greedy"]
    np.testing.assert_allclose(found["shared_words"], rows[:, 0].sum() / rows[:, 1].sum())
    items = json.loads((workdir / "baseline" / "items_test.json").read_text())["greedy"]
    np.testing.assert_array_equal(items["shared_words"], rows)


def test_the_terminal_the_page_and_its_verdict_and_the_seeds_table_show_it(world):
    workdir, rows = world[1], by_hand(world[1])
    value = rows[:, 0].sum() / rows[:, 1].sum()
    assert scored_runs.terminal(workdir)["shared words"] == f"{value:.3f}"
    assert scored_runs.columns_of(workdir)["shared words"] == (f"{100 * value:.1f}", "points")
    assert "shared words" in scored_runs.judged(workdir)
    assert f"| shared words | {100 * value:.1f} |" in scored_runs.over_seeds(workdir)
    assert f"{100 * value:.1f}" in (workdir / "report.html").read_text()


def test_the_experiments_show_it_with_an_interval_from_its_rows(world, tmp_path):
    config, workdir = world
    found, page = scored_runs.experiment(config, workdir, tmp_path, ("Bleu_4", "shared_words"))
    assert "shared words" in page
    spread, rows = score(found["extend-baseline"], "shared_words"), by_hand(workdir)
    rng = np.random.default_rng(1)
    draws = rows[rng.integers(len(rows), size=(20_000, len(rows)))].sum(axis=1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    np.testing.assert_allclose(spread.interval, (low, high), atol=0.02)


def test_a_family_gives_a_metric_for_every_part(monkeypatch):
    family = Family("exact/", lambda part: Metric(f"exact/{part}", part, 100, 1, +1, "points"), ("all", "numbers"))
    monkeypatch.setitem(METRICS, family.prefix, family)
    scores = {"exact/other": 0.25, "exact/numbers": 0.5, "exact/all": 0.4}
    arms = {arm: {"greedy": scores} for arm in ("baseline", "eim")}
    head, rows = scored_runs.score_table(arms)
    assert head[2:] == ["all", "numbers", "other"] and rows[0][2:] == ["0.400", "0.500", "0.250"]
    assert metric_of("exact/numbers").text(0.5) == "50.0"


def test_the_example_of_the_docs_is_the_one_here():
    here = Path(__file__)
    page = (here.parents[2] / "docs" / "extend" / "metrics.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    assert first in here.read_text(encoding="utf-8")

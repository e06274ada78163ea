"""Intervals and verdicts in cases whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
from experiment_cases import result
from scipy import stats

from experiments import claims, intervals
from experiments.cells import SCALES
from experiments.tables import TABLES, rows_of

ROOT = Path(__file__).resolve().parent.parent
ALL = {scale: rows_of(list(TABLES.values()), scale) for scale in SCALES}


# Intervals and verdicts


def test_the_interval_of_many_seeds_is_students():
    values = np.random.default_rng(1).normal(2.0, 1.0, 40)
    found = intervals.bootstrap(values, np.tile(values, (20_000, 1)))
    half = stats.t.ppf(0.975, 39) * values.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(np.quantile(found, [0.025, 0.975]), values.mean() + np.array([-half, half]), atol=0.03)


def test_the_interval_of_one_seed_is_that_of_the_items():
    rng = np.random.default_rng(2)
    right = rng.integers(0, 2, 400)
    one = {0: result(items={"ids": list(range(400)), "accuracy/Avg": [[int(r), 1] for r in right]})}
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
    low, high = intervals.score({0: result(parts, {"accuracy/Avg": right.mean()})}, "accuracy/Avg").interval
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
            row[seed] = result(items=parts, scores={"CIDEr": float(values.mean())})
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

"""The two-way interval, its tests and its power: closed forms, scipy, simulation, and the second design's table."""

import numpy as np
import pytest
from experiment_cases import result
from scipy import stats

from eim_jax.evaluation.metrics import metric_of
from experiments import design, power, run
from experiments.decide import Outcome, decide, markdown, outcomes
from experiments.design import DECLARED, OTHERS, SEEDS, TABLES
from experiments.intervals import difference as bootstrap
from experiments.rows import ADAPTER, ADAPTER_EIM, BASELINE, EIM
from experiments.two_way import Layout, difference, holm, pseudo_values, seeds_for


def drawn(rng, seeds, scenes, sd=(0.0, 0.0, 1.0), mean=0.0):
    """d[s, i] of known noise: of a seed, of a scene, of both together."""
    a, b = sd[0] * rng.normal(size=(seeds, 1)), sd[1] * rng.normal(size=(1, scenes))
    return mean + a + b + sd[2] * rng.normal(size=(seeds, scenes))


def test_mean_squares_are_those_of_the_analysis_of_variance():
    parts = drawn(np.random.default_rng(0), 4, 6, (1, 2, 3), 5)
    made, grand = Layout.of(parts), parts.mean()
    seeds = 6 * sum((row.mean() - grand) ** 2 for row in parts)
    scenes = 4 * sum((column.mean() - grand) ** 2 for column in parts.T)
    left = ((parts - grand) ** 2).sum() - seeds - scenes  # sums of squares add up
    wanted = (grand, seeds / 3, scenes / 5, left / 15)
    np.testing.assert_allclose((made.mean, made.of_seeds, made.of_scenes, made.left), wanted)
    with pytest.raises(ValueError, match="1 seeds"):
        Layout.of(parts[:1])


def test_with_noise_of_seeds_alone_it_is_students_test():
    values = np.random.default_rng(1).normal(0.3, 1, 6)
    made = Layout.of(np.repeat(values[:, None], 4, axis=1))
    test = stats.ttest_1samp(values, 0)
    assert made.df == pytest.approx(5) and made.error == pytest.approx(values.std(ddof=1) / np.sqrt(6))
    assert made.p_different() == pytest.approx(test.pvalue)
    np.testing.assert_allclose(made.interval(), test.confidence_interval(0.95))
    for bound in (0.2, 2.0):
        low = stats.ttest_1samp(values, -bound, alternative="greater").pvalue
        high = stats.ttest_1samp(values, bound, alternative="less").pvalue
        assert made.p_equivalent(bound) == pytest.approx(max(low, high))


def test_the_interval_covers_from_five_seeds_up_and_false_claims_are_as_rare_as_said():
    rng = np.random.default_rng(2)
    for sd in ((0, 0, 1), (0.3, 0, 1), (0, 0.5, 1), (0.3, 0.5, 1), (1, 0.1, 0.1)):
        found = [Layout.of(drawn(rng, 5, 60, sd)) for _ in range(400)]
        covered = np.mean([low <= 0 <= high for low, high in (one.interval() for one in found)])
        assert 0.92 <= covered <= 0.995, sd  # 400 draws: sd .011


def test_power_and_equivalence_are_what_simulation_gives():
    rng = np.random.default_rng(3)
    true = Layout(0.0, 8, 50, 50 * 0.09 + 1, 8 * 0.04 + 1, 1.0)  # noises .3, .2, 1
    found = [Layout.of(drawn(rng, 8, 50, (0.3, 0.2, 1), 0.4)) for _ in range(500)]
    seen = np.mean([one.p_different() < 0.05 and one.mean > 0 for one in found])
    assert abs(true.power(0.4) - seen) < 0.06
    null = [Layout.of(drawn(rng, 8, 50, (0.3, 0.2, 1))) for _ in range(500)]
    assert abs(true.power_equivalent(0.4) - np.mean([one.p_equivalent(0.4) < 0.05 for one in null])) < 0.06
    assert true.at(8, 50)[1:] == pytest.approx(true[1:])  # the mean squares that it was made of


def test_seeds_needed_are_the_fewest_that_reach_the_power():
    pilot = Layout(0.0, 5, 400, 400 * 0.04 + 4, 5 * 0.01 + 4, 4.0)
    needed = seeds_for(pilot, 0.15, 400)
    assert needed is not None and needed > 5
    assert pilot.at(needed, 400).power(0.15) >= 0.8 > pilot.at(needed - 1, 400).power(0.15)
    assert seeds_for(pilot, 0.15, 2000) < needed  # more scenes buy seeds
    assert seeds_for(pilot, 0.001, 400) is None


def test_holm_is_the_stepwise_procedure():
    values = [0.2, 0.001, 0.011, 0.04, 0.5]
    adjusted = holm(values)
    for alpha in (0.01, 0.05, 0.06, 0.5):  # step down: reject while p_(k) <= alpha / (m - k + 1)
        rejected = set()
        for place, which in enumerate(np.argsort(values)):
            if values[which] > alpha / (5 - place):
                break
            rejected.add(int(which))
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected


def cells(rng, seeds, scenes, add=0.0, name="row"):
    """A row's results on items whose rows are (right, asked), as accuracy has them."""
    found = {}
    for seed in range(seeds):
        right = (rng.random(scenes) < 0.5 + add).astype(float)
        items = {
            "ids": [f"i{n:03d}" for n in range(scenes)],
            "accuracy/Avg": np.stack([right, np.ones(scenes)], 1).tolist(),
        }
        found[seed] = result(items, {"accuracy/Avg": right.mean()}, seed, name)
    return found


def test_pseudo_values_of_a_mean_are_the_items_and_a_pool_is_the_mean_of_its_settings():
    rng = np.random.default_rng(4)
    one, other, third, fourth = (cells(rng, 5, 40, add) for add in (0, 0.2, 0, 0.1))
    parts = pseudo_values(list(one.values()), "accuracy/Avg")
    np.testing.assert_allclose(parts[2], np.asarray(one[2]["items"]["accuracy/Avg"])[:, 0], atol=1e-9)
    first, second = (difference([pair], "accuracy/Avg") for pair in ((one, other), (third, fourth)))
    both = difference([(one, other), (third, fourth)], "accuracy/Avg")
    assert both.mean == pytest.approx((first.mean + second.mean) / 2) and both.seeds == 5
    assert first.mean == pytest.approx(bootstrap(one, other, "accuracy/Avg").mean)
    other[1]["items"]["ids"][0] = "elsewhere"
    with pytest.raises(ValueError, match="other items"):
        difference([(one, other)], "accuracy/Avg")


def test_pseudo_values_of_a_ratio_have_the_noise_of_its_bootstrap():
    rng = np.random.default_rng(5)
    rows = np.stack([rng.integers(0, 9, 200), rng.integers(9, 15, 200)], 1).astype(float)
    cell = result({"ids": list(range(200)), "nll": rows.tolist()}, {"nll": metric_of("nll").value(rows.sum(0))})
    [parts] = pseudo_values([cell], "nll")
    again = [metric_of("nll").value(rows[rng.integers(0, 200, 200)].sum(0)) for _ in range(2000)]
    assert parts.std(ddof=1) / np.sqrt(200) == pytest.approx(np.std(again), rel=0.1)


def layout(mean, error):
    """Of noise of 20 seeds alone."""
    return Layout(mean, 20, 100, error**2 * 2000, 0.0, 0.0)


def test_verdicts_are_corrected_together_and_tell_small_from_unknown():
    claim = DECLARED[0]
    given = ((0.03, 0.005), (-0.03, 0.005), (0.001, 0.003), (0.004, 0.001), (0.01, 0.02))
    family = [Outcome(claim, "Bleu_4", layout(*each), 0.012, 0.3) for each in given]
    family.append(Outcome(claim, "Bleu_4", None, 0.0, 0.0))
    words = [one.word for one in decide(family)]
    small = "no effect larger than 1.2"
    assert words == ["supported", "contrary", small, f"supported, but {small}", "undecided", "not measured"]
    alone = Outcome(claim, "Bleu_4", layout(0.01, 0.0044), 0.001, 0.3)  # p = .035: alone yes, among six no
    assert [one.word for one in decide([alone])] == ["supported"]
    assert decide([alone, *family[4:], *family[4:]])[0].word == "undecided"
    lower = Outcome(claim, "nll", layout(-0.1, 0.01), 0.01, 1.0)
    assert decide([lower])[0].word == "supported"  # less is better


def test_a_claim_has_no_verdict_until_its_declared_seeds_are_there():
    [claim] = [one for one in DECLARED if one.family == "pilot"]
    [(worse, better)] = claim.pairs
    rng = np.random.default_rng(6)
    metric = "accuracy/Avg"
    sides = [cells(rng, 5, 400, add, row.name) for row, add in ((worse, 0.0), (better, 0.4))]
    for seeds, said in ((0, "not measured"), (4, "not yet: 4 of 5 seeds"), (5, "supported")):
        found = {row.name: dict(list(side.items())[:seeds]) for row, side in zip(claim.pairs[0], sides, strict=True)}
        [one] = decide(outcomes(found, lambda _: metric, [claim]))
        assert one.word == said and (one.outcome.layout is None) == (seeds < 5)
    page = markdown({}, {})
    assert "Not run: confirm, loss-ie, negatives, pilot, pilot-sizes, related, rivals." in page and "|" not in page


def test_the_power_page_is_students_where_seeds_alone_differ_and_adds_its_hours_up():
    drawn = np.random.default_rng(8).normal(0.5, 0.02, (2, 3))
    found = {}
    for row, values in zip((ADAPTER, ADAPTER_EIM), drawn, strict=True):
        items = [{"ids": [f"i{n}" for n in range(9)], "accuracy/Avg": [[value, 1.0]] * 9} for value in values]
        each = enumerate(zip(items, values, strict=True))
        found[row.name] = {seed: result(kept, {"accuracy/Avg": v}, seed, row.name) for seed, (kept, v) in each}
    [claim] = [one for one in DECLARED if one.name == "adapter"]
    effect, error = claim.effect * drawn[0].mean(), (drawn[1] - drawn[0]).std(ddof=1) / np.sqrt(40)
    wanted = []
    for true in (effect, effect / 2):  # 40 seeds; the smallest of eight p
        wanted.append(stats.nct.sf(stats.t.ppf(1 - 0.025 / 8, 39), 39, true / error))
    [line] = [line for line in power.plan(found).splitlines() if claim.statement in line]
    said = line.split(" | ")
    assert said[2] == "40" and said[5:7] == [f"{each:.2f}" for each in wanted] and 0.1 < wanted[0] < 0.99
    costs = power.cost({row.name: {0: result(), 1: result()} for row in power.rows()})  # runs of a minute
    assert "| confirm | **all** | | | 4.7 |" in costs  # 280 of them
    hours = [float(line.split("|")[-2]) for line in costs.splitlines() if "**all**" in line]
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.2) and len(hours) == 5


def test_the_design_is_one_row_a_name_with_the_declared_runs():
    confirm = next(table for table in TABLES if table.name == "confirm")
    assert sum(row.seeds for row in confirm.rows) == 280
    assert (
        design.tested(EIM) is design.tested(EIM)
        and design.tested(EIM).seeds == SEEDS["clipcap-eim"]
        and design.tested(EIM).base.endswith("2000")
    )
    tests = {table.name: {row.overrides["data.test_items"] for row in table.rows} for table in TABLES}
    assert tests["confirm"] == {2000, 4000} and tests["negatives"] == {2000} and tests["pilot"] == {1000}
    assert all(row.seeds in (5, OTHERS, 20, 25, 40) for table in TABLES for row in table.rows)


def test_a_table_of_the_design_runs_each_rows_own_seeds_a_seed_at_a_time():
    options = run.parse(["--table=confirm", "--dry"])
    found = run.cells(run.chosen(options), options)
    assert len(found) == 280
    assert [one.seed for one in found] == sorted(one.seed for one in found)
    some = run.parse(
        ["--table=confirm", "--seeds=22", f"--rows={design.tested(BASELINE).name},{design.tested(EIM).name}"]
    )
    assert len(run.cells(run.chosen(some), some)) == 22 + 20
    every = {row.name for row in run.chosen(run.parse([]))}
    assert design.tested(EIM).name not in every and "clipcap-eim" in every

"""The verdicts of the second design (design.py), and what the first one could have decided.

python -m experiments.decide              # experiments/results/miniature-design.md, of what is finished
python -m experiments.decide --first      # experiments/results/miniature-power.md: the power beside each verdict
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eim_jax.evaluation.metrics import metric_of
from eim_jax.utils.console import console
from experiments import results
from experiments.cells import Row, cell
from experiments.claims import CLAIMS, judge
from experiments.design import DECLARED, NLL_MARGIN, TESTED, Declared
from experiments.two_way import FEWEST, MOST, Layout, difference, holm, seeds_for

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row name -> seed -> result
ALPHA = 0.05
NLL = "nll"
HEADS = "| claim | outcome | seeds | measured, 95 % interval | p (Holm) | verdict | bound | power | seeds for 80 % |"


@dataclass(frozen=True)
class Outcome:
    """One claim in one outcome: `bound` is the least difference that matters, `worse` the worse rows' mean score."""

    claim: Declared
    metric: str
    layout: Layout | None
    bound: float
    worse: float

    @property
    def gain(self) -> float:
        """The difference, positive where the claim is right."""
        assert self.layout is not None
        return self.layout.mean * metric_of(self.metric).sense


@dataclass(frozen=True)
class Decision:
    """An outcome's verdict, and both p values as Holm's correction leaves them."""

    outcome: Outcome
    word: str
    different: float | None = None
    equivalent: float | None = None


def outcomes(found: Found, metric_for: Callable[[Declared], str], claims: Sequence[Declared]) -> list[Outcome]:
    """Each claim's layout in one outcome; None in place of one that has fewer than FEWEST seeds."""
    made = []
    for claim in claims:
        metric = metric_for(claim)
        pairs = [(found.get(worse.name, {}), found.get(better.name, {})) for worse, better in claim.pairs]
        layout = difference(pairs, metric)
        if layout is None or layout.seeds < FEWEST:
            made.append(Outcome(claim, metric, None, 0.0, 0.0))
            continue
        worse = float(np.mean([cell["scores"][metric] for left, _ in pairs for cell in left.values()]))
        bound = abs(NLL_MARGIN * worse) if metric == NLL else claim.bound(worse)
        made.append(Outcome(claim, metric, layout, bound, worse))
    return made


def decide(family: Sequence[Outcome]) -> list[Decision]:
    """The verdicts of claims that are corrected together, in one outcome.

    A claim that is not measured counts in the correction all the same: it is as if its p were 1.
    """
    different = holm([1.0 if one.layout is None else one.layout.p_different() for one in family])
    equivalent = holm([1.0 if one.layout is None else one.layout.p_equivalent(one.bound) for one in family])
    return [
        Decision(one, "not measured") if one.layout is None else Decision(one, word(one, p, q), p, q)
        for one, p, q in zip(family, different, equivalent, strict=True)
    ]


def word(outcome: Outcome, different: float, equivalent: float) -> str:
    """The verdict by both corrected p values."""
    small = f"no effect larger than {_number(outcome.metric, outcome.bound)}"
    if different <= ALPHA:
        side = "supported" if outcome.gain > 0 else "contrary"
        return f"{side}, but {small}" if equivalent <= ALPHA else side
    return small if equivalent <= ALPHA else "undecided"


def families(found: Found) -> list[Decision]:
    """All claims, family by family, each by its primary outcome and then by NLL."""
    made = []
    for name in dict.fromkeys(claim.family for claim in DECLARED):
        claims = [claim for claim in DECLARED if claim.family == name]
        made += decide(outcomes(found, lambda claim: claim.metric, claims))
        made += decide(outcomes(found, lambda _: NLL, claims))
    return made


def markdown(found: Found) -> str:
    """The page of the second design."""
    lines = [
        "The second design's verdicts (what was declared before it ran: docs/results/design.md). Power: the chance to "
        "tell a difference of the bound's size from 0 with these seeds, by these runs' own noise; behind it the seeds "
        "that would give 80 %.",
        "",
        HEADS,
        "|---" * HEADS.count(" | ") + "|---|",
    ]
    for one in families(found):
        told = [one.outcome.claim.statement, metric_of(one.outcome.metric).name]
        lines.append("| " + " | ".join([*told, *_figures(one), *_power(one.outcome)]) + " |")
    return "\n".join(lines) + "\n"


def _figures(one: Decision) -> list[str]:
    layout, metric = one.outcome.layout, one.outcome.metric
    if layout is None or one.different is None:
        return ["–", "–", "–", one.word, "–"]
    low, high = layout.interval()
    change = f"{_signed(metric, layout.mean)} [{_signed(metric, low)}, {_signed(metric, high)}]"
    return [str(layout.seeds), change, f"{one.different:.2g}", one.word, _number(metric, one.outcome.bound)]


def _power(outcome: Outcome) -> list[str]:
    if outcome.layout is None:
        return ["–", "–"]
    needed = seeds_for(outcome.layout, outcome.bound, outcome.layout.scenes)
    return [f"{outcome.layout.power(outcome.bound):.2f}", f"more than {MOST}" if needed is None else str(needed)]


def first(found: Found) -> str:
    """What the first design could decide: each verdict of its page, with its power and the seeds that it would take."""
    lines = [
        f"Each verdict of the first design (400 test scenes) beside its power: the chance to tell the paper's effect, "
        f"or half of it, from 0 with the seeds that ran, by a two-way layout of these very runs (seeds x scenes; "
        f"three to five seeds give rough figures). Behind it the seeds that would tell the paper's effect apart with a "
        f"chance of 80 %, on 400 and on {TESTED:,} scenes.",
        "",
        "| claim | verdict | seeds | paper's effect here | power, whole effect | half | seeds, as tested | "
        f"seeds, {TESTED:,} scenes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        if not (claim.effect and claim.better.at("miniature") and claim.worse.at("miniature")):
            continue
        layout = difference([(found.get(claim.worse.name, {}), found.get(claim.better.name, {}))], claim.metric)
        if layout is None:
            continue
        verdict = judge(claim, found)
        effect, more = verdict.expected, TESTED * layout.scenes // 400
        needed = [seeds_for(layout, effect, scenes) for scenes in (layout.scenes, more)]
        shown = [
            claim.statement,
            verdict.word,
            str(layout.seeds),
            f"{_signed(claim.metric, effect)} {metric_of(claim.metric).name}",
            f"{layout.power(effect):.2f}",
            f"{layout.power(effect / 2):.2f}",
            *(f"more than {MOST}" if one is None else str(one) for one in needed),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def read(out: Path, rows: Sequence[Row]) -> Found:
    """The finished cells of these rows, at equal steps.

    Raises ValueError where the seeds of a row were trained from other towers or data, or on another platform.
    """
    found = {}
    for row in {row.name: row for row in rows}.values():
        seeds = {results.load(file)["seed"] for file in sorted((out / "miniature").glob(f"{row.name}-s*.json"))}
        cells = {seed: results.read(out, cell(row, "miniature", seed)) for seed in sorted(seeds)}
        found[row.name] = {seed: one for seed, one in cells.items() if one is not None}
        results.check_alike(row.name, found[row.name])
    return found


def _signed(metric: str, value: float) -> str:
    how = metric_of(metric)
    return f"{value * how.factor:+.{how.decimals}f}".replace("-", "−")


def _number(metric: str, value: float) -> str:
    how = metric_of(metric)
    return f"{value * how.factor:.{how.decimals}f}"


def main(arguments: list[str] | None = None) -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="of the first design: the power beside each verdict")
    parser.add_argument("--out", type=Path, default=results.OUT)
    options = parser.parse_args(arguments)
    of_first = [row for claim in CLAIMS if claim.effect for row in (claim.worse, claim.better) if row.at("miniature")]
    of_second = [row for claim in DECLARED for pair in claim.pairs for row in pair]
    found = read(options.out, of_first if options.first else of_second)
    target = options.out / ("miniature-power.md" if options.first else "miniature-design.md")
    target.write_text(first(found) if options.first else markdown(found), encoding="utf-8")
    console.print(str(target), soft_wrap=True)


if __name__ == "__main__":
    main()

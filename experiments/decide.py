"""The verdicts of the second design (design.py), and what the first one could have decided.

python -m experiments.decide              # experiments/results/miniature-design.md, of what is finished
python -m experiments.decide --first      # experiments/results/miniature-power.md: what the first one could decide
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eim_jax.evaluation.metrics import metric_of
from eim_jax.utils.console import console
from experiments import power, results
from experiments.cells import Row, cell
from experiments.design import DECLARED, NLL_MARGIN, TIMED, Declared, rows_of
from experiments.pace import measured
from experiments.power import Found, number, signed
from experiments.two_way import FEWEST, MOST, Layout, difference, holm, seeds_for

ALPHA = 0.05
NLL = "nll"
HEADS = "| claim | outcome | seeds | measured, 95 % interval | p (Holm) | verdict | bound | power | seeds for 80 % |"


@dataclass(frozen=True)
class Outcome:
    """One claim in one outcome: `bound` is the least difference that matters, `worse` the worse rows' mean score.

    Without a layout while seeds are missing, `seeds` of them are there.
    """

    claim: Declared
    metric: str
    layout: Layout | None
    bound: float = 0.0
    worse: float = 0.0
    seeds: int = 0

    @property
    def gain(self) -> float:
        """The difference, positive where the claim is right."""
        assert self.layout is not None
        return self.layout.mean * metric_of(self.metric).sense


@dataclass(frozen=True)
class Decision:
    """An outcome's verdict, and both p values as Holm's correction leaves them; none where there is no verdict yet."""

    outcome: Outcome
    word: str
    different: float | None = None
    equivalent: float | None = None


def outcomes(found: Found, metric_for: Callable[[Declared], str], claims: Sequence[Declared]) -> list[Outcome]:
    """Each claim in one outcome, with its layout once all of its seeds are there."""
    made = []
    for claim in claims:
        metric = metric_for(claim)
        pairs = [(found.get(worse.name, {}), found.get(better.name, {})) for worse, better in claim.pairs]
        shared = set.intersection(*(set(row) for pair in pairs for row in pair))
        seeds = len(shared)
        layout = difference(pairs, metric) if seeds >= max(claim.seeds, FEWEST) else None
        if layout is None:
            made.append(Outcome(claim, metric, None, seeds=seeds))
            continue
        worse = float(
            np.mean([cell["scores"][metric] for left, _ in pairs for seed, cell in left.items() if seed in shared])
        )
        bound = abs(NLL_MARGIN * worse) if metric == NLL else claim.bound(worse)
        made.append(Outcome(claim, metric, layout, bound, worse))
    return made


def decide(family: Sequence[Outcome]) -> list[Decision]:
    """The verdicts of claims that are corrected together, in one outcome.

    A claim whose seeds are not all there counts in the correction all the same, as if its p were 1: when it is
    measured, the others' corrected p can only fall.
    """
    different = holm([1.0 if one.layout is None else one.layout.p_different() for one in family])
    equivalent = holm([1.0 if one.layout is None else one.layout.p_equivalent(one.bound) for one in family])
    return [
        Decision(one, _missing(one)) if one.layout is None else Decision(one, word(one, p, q), p, q)
        for one, p, q in zip(family, different, equivalent, strict=True)
    ]


def _missing(outcome: Outcome) -> str:
    if outcome.seeds >= max(outcome.claim.seeds, FEWEST):
        return f"not measured: the results do not hold {outcome.metric} of each test item"
    return f"not yet: {outcome.seeds} of {outcome.claim.seeds} seeds" if outcome.seeds else "not measured"


def word(outcome: Outcome, different: float, equivalent: float) -> str:
    """The verdict by both corrected p values."""
    small = f"no effect larger than {number(outcome.metric, outcome.bound)}"
    if different <= ALPHA:
        side = "supported" if outcome.gain > 0 else "contrary"
        return f"{side}, but {small}" if equivalent <= ALPHA else side
    return small if equivalent <= ALPHA else "undecided"


def families(found: Found, names: Sequence[str]) -> list[Decision]:
    """All claims of these families, each by its primary outcome and then by NLL."""
    made = []
    for name in names:
        claims = [claim for claim in DECLARED if claim.family == name]
        made += decide(outcomes(found, lambda claim: claim.metric, claims))
        made += decide(outcomes(found, lambda _: NLL, claims))
    return made


def markdown(found: Found, timed: Found) -> str:
    """The page of the second design: `found` at equal steps, `timed` at equal time."""
    every = list(dict.fromkeys(claim.family for claim in DECLARED))
    lines = [
        "The second design's verdicts (what was declared before it ran: docs/results/design.md). Power: the chance to "
        "tell a difference of the bound's size from 0 with these seeds, by these runs' own noise, each claim by itself "
        "(p at most 0.05 before Holm's correction); behind it the seeds that would give 80 %.",
    ]
    for title, cells, names in (("At equal steps", found, every), ("At equal time", timed, TIMED)):
        begun = [name for name in names if any(cells.get(row.name) for row in rows_of(name))]
        lines += ["", f"## {title}", ""]
        if missing := [name for name in names if name not in begun]:
            lines += [f"Not run: {', '.join(missing)}.", ""]
        if not begun:
            continue
        lines += [HEADS, "|---" * HEADS.count(" | ") + "|---|"]
        for one in families(cells, begun):
            told = [one.outcome.claim.statement, metric_of(one.outcome.metric).name]
            lines.append("| " + " | ".join([*told, *_figures(one), *_power(one.outcome)]) + " |")
    return "\n".join(lines).rstrip() + "\n"


def _figures(one: Decision) -> list[str]:
    layout, metric = one.outcome.layout, one.outcome.metric
    if layout is None or one.different is None:
        return ["–", "–", "–", one.word, "–"]
    low, high = layout.interval()
    change = f"{signed(metric, layout.mean)} [{signed(metric, low)}, {signed(metric, high)}]"
    return [str(layout.seeds), change, f"{one.different:.2g}", one.word, number(metric, one.outcome.bound)]


def _power(outcome: Outcome) -> list[str]:
    if outcome.layout is None:
        return ["–", "–"]
    needed = seeds_for(outcome.layout, outcome.bound, outcome.layout.scenes)
    return [f"{outcome.layout.power(outcome.bound):.2f}", f"more than {MOST}" if needed is None else str(needed)]


def read(out: Path, rows: Sequence[Row], budget: str = "steps") -> Found:
    """The finished cells of these rows; at equal time none of a row whose speed was not measured (pace.py).

    Raises ValueError where the seeds of a row were trained from other towers or data, or on another platform.
    """
    rows = list({row.name: row for row in rows}.values())
    pace = measured(out, rows, "miniature") if budget == "time" else dict.fromkeys((row.name for row in rows), 1.0)
    found = {}
    for row in (row for row in rows if row.name in pace):
        seeds = {results.load(file)["seed"] for file in sorted((out / "miniature").glob(f"{row.name}-s*.json"))}
        cells = {
            seed: results.read(out, cell(row, "miniature", seed, budget, pace[row.name])) for seed in sorted(seeds)
        }
        found[row.name] = {seed: one for seed, one in cells.items() if one is not None}
        results.check_alike(row.name, found[row.name])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="what the first design could decide, and the plan of this")
    parser.add_argument("--out", type=Path, default=results.OUT)
    options = parser.parse_args(arguments)
    if options.first:
        target, text = options.out / "miniature-power.md", power.page(read(options.out, power.rows()))
    else:
        every = [row for claim in DECLARED for pair in claim.pairs for row in pair]
        timed = [row for name in TIMED for row in rows_of(name)]
        text = markdown(read(options.out, every), read(options.out, timed, "time"))
        target = options.out / "miniature-design.md"
    target.write_text(text, encoding="utf-8")
    console.print(str(target), soft_wrap=True)


if __name__ == "__main__":
    main()

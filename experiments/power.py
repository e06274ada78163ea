"""What the first design could decide and what the second one can, by the noise of the runs that are there.

python -m experiments.decide --first      # experiments/results/miniature-power.md

Both tables take each claim's own runs apart (two_way.py). Seeds are few, so the noise between seeds is a rough figure:
where three runs happen to lie close together, the power is too high.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from eim_jax.evaluation.metrics import metric_of
from experiments import design
from experiments.cells import Row
from experiments.claims import CLAIMS, judge
from experiments.two_way import LEVEL, MOST, Layout, difference, seeds_for

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row name -> seed -> result
USUAL = 400  # scenes that the first design was tested on; its questions are fewer scenes, in the same proportion
MORE = design.TESTED / USUAL


def signed(metric: str, value: float) -> str:
    """A difference in the metric's own unit."""
    how = metric_of(metric)
    return f"{value * how.factor:+.{how.decimals}f}".replace("-", "−")


def number(metric: str, value: float) -> str:
    """A value in the metric's own unit."""
    how = metric_of(metric)
    return f"{value * how.factor:.{how.decimals}f}"


def rows() -> list[Row]:
    """The first design's rows that the page needs."""
    claimed = [row for claim in CLAIMS if claim.effect for row in (claim.worse, claim.better) if row.at("miniature")]
    stand_ins = [row for claim in design.DECLARED for pair in claim.pilots for row in pair]
    return list({row.name: row for row in [*claimed, *stand_ins, *design.COSTS_AS.values()]}.values())


def page(found: Found) -> str:
    """The whole page."""
    every = [one for cells in found.values() for one in cells.values()]
    days, cores = sorted({one["date"] for one in every}), sorted({str(one["machine"]["cpu_cores"]) for one in every})
    made = f"from {len(every)} committed runs of {days[0]} to {days[-1]}, {'/'.join(cores)} CPU cores"
    return (
        f"# What can be decided\n\nMade by `python -m experiments.decide --first` {made}.\n\n"
        f"{first(found)}\n{plan(found)}\n{cost(found)}"
    )


def first(found: Found) -> str:
    """Each verdict of the first design, with its power and the seeds that it would take."""
    lines = [
        "## The first design, 400 test scenes",
        "",
        "Power: the chance to tell the paper's effect, or half of it, from 0 with the seeds that ran. Behind it the "
        f"seeds that would find the paper's whole effect with a chance of 80 %, on 400 and on {design.TESTED:,} "
        "scenes. One claim at a time: no correction for their number.",
        "",
        "| claim | verdict | seeds | paper's effect here | power, whole effect | half | seeds, as tested | "
        f"seeds, {design.TESTED:,} scenes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        if not (claim.effect and claim.better.at("miniature") and claim.worse.at("miniature")):
            continue
        layout = difference([(found.get(claim.worse.name, {}), found.get(claim.better.name, {}))], claim.metric)
        if layout is None:
            continue
        verdict = judge(claim, found)
        effect = verdict.expected
        needed = [seeds_for(layout, effect, scenes) for scenes in (layout.scenes, round(MORE * layout.scenes))]
        shown = [
            claim.statement,
            verdict.word,
            str(layout.seeds),
            f"{signed(claim.metric, effect)} {metric_of(claim.metric).name}",
            f"{layout.power(effect):.2f}",
            f"{layout.power(effect / 2):.2f}",
            *(f"more than {MOST}" if one is None else str(one) for one in needed),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def plan(found: Found) -> str:
    """What the second design's seeds can be expected to decide, claim by claim."""
    lines = [
        f"## The second design, {design.TESTED:,} test scenes",
        "",
        "Its claims, seeds and margins are in docs/results/design.md. Power: the chance to tell the whole effect, or "
        "the margin alone, from 0; behind it the chance to find that there is no effect larger than the margin, if "
        "there is none. All three are those of the family's smallest p after Holm's correction, the worst case. Where "
        "a claim's rows have not run, its noise is that of the rows named.",
        "",
        "| family | claim | seeds | whole effect | margin | power, whole effect | power, margin | "
        "no larger effect found | noise of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for claim in design.DECLARED:
        sides = [(found.get(worse.name, {}), found.get(better.name, {})) for worse, better in claim.pilots]
        layout = difference(sides, claim.metric)
        if layout is None:
            continue
        alpha = (1 - LEVEL) / sum(one.family == claim.family for one in design.DECLARED)
        worse = statistics.mean(one["scores"][claim.metric] for left, _ in sides for one in left.values())
        shown = [claim.family, claim.statement, *_chances(claim, layout, worse, alpha), _noise_of(claim, layout)]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _chances(claim: design.Declared, layout: Layout, worse: float, alpha: float) -> list[str]:
    there = layout.at(claim.seeds, round(claim.scenes / USUAL * layout.scenes))
    whole, margin = abs(claim.effect * worse), claim.bound(worse)
    return [
        str(claim.seeds),
        f"{signed(claim.metric, whole)} {metric_of(claim.metric).name}" if whole else "not known",
        number(claim.metric, margin),
        f"{there.power(whole, alpha):.2f}" if whole else "–",
        f"{there.power(margin, alpha):.2f}",
        f"{there.power_equivalent(margin, alpha):.2f}",
    ]


def _noise_of(claim: design.Declared, layout: Layout) -> str:
    of = "its own" if claim.like is None else " and ".join(row.name for row in claim.like)
    return f"{layout.seeds} seeds of {of}"


def cost(found: Found) -> str:
    """What the second design's runs take."""
    lines = [
        "## What it costs",
        "",
        "Minutes a run, on one core: those of the first design's runs (the median seed), with what is not training "
        f"(towers, queues, captions) {MORE:g} times, for the larger test; an upper figure. A row that has not run is "
        "counted as the one that it is a variant of. A row stands in the first family that needs it.",
        "",
        "| family | row | seeds | minutes a run | core-hours |",
        "|---|---|---|---|---|",
    ]
    total, seen = 0.0, set()
    for family in dict.fromkeys(claim.family for claim in design.DECLARED):
        rows = {row.name: row for row in design.rows_of(family) if row.name not in seen}
        seen |= rows.keys()
        minutes = {name: _minutes(found, design.untested(row)) for name, row in rows.items()}
        known = {name: rows[name].seeds * each / 60 for name, each in minutes.items() if each is not None}
        for name, hours in known.items():
            lines.append(f"| {family} | {name} | {rows[name].seeds} | {minutes[name]:.1f} | {hours:.1f} |")
        if known:
            lines.append(f"| {family} | **all** | | | {sum(known.values()):.1f} |")
        total += sum(known.values())
    return "\n".join([*lines, f"| **all** | | | | {total:.1f} |"]) + "\n"


def _minutes(found: Found, row: Row) -> float | None:
    runs = found.get(design.COSTS_AS.get(row.name, row).name, {}).values()
    trained = [sum(stage["seconds"] for stage in one["stages"]) for one in runs]
    each = [part + MORE * (one["seconds"] - part) for one, part in zip(runs, trained, strict=True)]
    return statistics.median(each) / 60 if each else None

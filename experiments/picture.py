"""The picture of the results page: every claim as an interval, beside the paper's effect and what is too small.

python -m experiments.picture             # docs/assets/claims.svg, of the committed results
"""

import re
from collections.abc import Sequence
from pathlib import Path

from eim_jax.evaluation.metrics import metric_of
from eim_jax.reporting.charts import Interval, intervals
from eim_jax.reporting.svg import alone
from eim_jax.utils.console import console
from experiments import report, results
from experiments.cells import DEFAULT
from experiments.claims import Verdict
from experiments.design import POINT

SCALE = "miniature"
FILE = Path(__file__).resolve().parent.parent / "docs/assets/claims.svg"
PERCENT = 100  # scores that are shares are drawn in points; others have a scale of their own and are left out
REACH = 13  # points: one claim lies beyond
WIDTH = 9.6


def main() -> None:
    """Writes the picture."""
    found = report.read(results.OUT, SCALE, DEFAULT[SCALE], 100)
    FILE.write_text(alone(drawn(report.verdicts(found, SCALE))), encoding="utf-8")
    console.print(str(FILE), soft_wrap=True)


def drawn(judged: Sequence[Verdict]) -> str:
    """The claims in their order, the paper's before ours, those that were measured in points."""
    shown = [v for v in judged if v.word != "not measured" and metric_of(v.claim.metric).factor == PERCENT]
    rows = [_row(v) for v in sorted(shown, key=lambda v: v.claim.ours)]
    return intervals(rows, unit="difference, points of BLEU-4 or accuracy", name="claims", reach=REACH, width=WIDTH)


def _row(v: Verdict) -> Interval:
    assert v.change is not None and v.change.interval is not None
    of = "ours" if v.claim.ours else f"Table {v.claim.table}"
    accuracy = "" if v.claim.metric == "Bleu_4" else ", accuracy"
    low, high = v.change.interval
    return Interval(
        f"{v.claim.statement} ({of}{accuracy}, {v.change.seeds} seeds)",
        PERCENT * v.change.mean,
        (PERCENT * low, PERCENT * high),
        PERCENT * v.expected if v.expected else None,
        report.COLOURS.get(v.word, 4),
        PERCENT * bound(v),
    )


def bound(v: Verdict) -> float:
    """What difference is too small to matter: half of the paper's effect here, a point where it names none."""
    return v.expected / 2 if v.expected else POINT


def spoken(svg: str) -> str:
    """What a screen reader says of a picture, every number of it."""
    [text] = re.findall(r'aria-label="([^"]*)"', svg)
    return text


if __name__ == "__main__":
    main()

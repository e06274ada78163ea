"""The picture of the results page says what the committed results say."""

from eim_jax.reporting.charts import Interval, intervals
from eim_jax.reporting.svg import alone
from experiments import picture, report, results
from experiments.cells import DEFAULT
from experiments.claims import CLAIMS


def test_the_committed_picture_is_that_of_the_committed_results():
    # Read aloud it names every claim with its numbers; how a line is drawn may differ by matplotlib's version.
    found = report.read(results.OUT, picture.SCALE, DEFAULT[picture.SCALE], 100)
    drawn = alone(picture.drawn(report.verdicts(found, picture.SCALE)))
    assert picture.spoken(picture.FILE.read_text(encoding="utf-8")) == picture.spoken(drawn)
    page = (results.OUT / "miniature.md").read_text(encoding="utf-8")
    for claim in CLAIMS:
        row = next((line for line in page.splitlines() if line.startswith(f"| {claim.statement} | {claim.table} ")), "")
        measured = bool(row) and not row.endswith("not measured |") and "MME" not in row
        assert (f"{claim.statement} (" in picture.spoken(drawn)) == measured, claim.statement


def test_what_lies_beyond_the_edge_stands_there_in_figures():
    rows = [
        Interval("right", 20.0, (18.0, 22.0)),
        Interval("left", -20.0, (-22.0, -18.0)),
        Interval("in", 2.0, (-9, 9)),
    ]
    svg = intervals(rows, unit="points", name="edges", reach=13)
    assert "+20.0 [+18.0, +22.0] →" in svg and "← -20.0 [-22.0, -18.0]" in svg
    assert svg.count("→") + svg.count("←") == 2
    assert "→" not in intervals(rows, unit="points", name="edges")

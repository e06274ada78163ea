"""The tables as measured: one self-contained page, and the same tables in Markdown for a README.

python -m experiments.report --scale=miniature        # experiments/results/miniature.html and .md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eim_jax.evaluation.metrics import metric_of
from eim_jax.reporting.charts import Interval, intervals
from eim_jax.reporting.environment import environment
from eim_jax.utils.console import console
from experiments import results, training_efficiency
from experiments.cells import BUDGETS, DEFAULT, SCALES, Row, cell
from experiments.claims import CLAIMS, Verdict, judge
from experiments.examples import anchors, examples
from experiments.intervals import difference
from experiments.layout import Table
from experiments.pace import measured
from experiments.report_tables import (
    Entry,
    Found,
    charts,
    diagnostics,
    efficiency,
    entries,
    sense,
    stages,
    told,
)
from experiments.tables import TABLES, rows_of

# what is shown beside the score that judges a claim
BESIDE = {
    "Bleu_4": ("CIDEr", "shape_colour_f1", "nll"),
    "accuracy/Avg": ("accuracy/IMG", "nll", "nll_image_gap"),
    "mme/sum": ("nll",),
}
NOTE = "note.txt"  # beside a scale's results
WORDS = {"supported": "up", "not supported": "down"}  # verdict -> class of its badge
COLOURS = {"supported": 2, "not supported": 5}
EQUAL = {
    "steps": "every row the same number of optimizer steps",
    "time": "every row the steps that take its baseline's training time, queues and cached features left out",
    "paper": "every stage its config's own epochs, in the paper the same for all",
}


def main(arguments: list[str] | None = None) -> None:
    """Writes the page and the Markdown of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="miniature")
    parser.add_argument("--budget", choices=BUDGETS, help="as for experiments.run")
    parser.add_argument("--seeds", type=int, default=100, help="seeds 0 ... N-1, those that are there")
    parser.add_argument("--out", type=Path, default=results.OUT)
    options = parser.parse_args(arguments)
    budget = options.budget or DEFAULT[options.scale]
    try:
        found = read(options.out, options.scale, budget, options.seeds)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if not any(found.values()):
        parser.exit(2, f"error: no finished cell of budget {budget} in {options.out / options.scale}\n")
    name = options.scale if budget == DEFAULT[options.scale] else f"{options.scale}-{budget}"
    page, text = options.out / f"{name}.html", options.out / f"{name}.md"
    page.write_text(html(found, options.scale, budget, options.out), encoding="utf-8")
    text.write_text(markdown(found, options.scale, budget, options.out), encoding="utf-8")
    console.print(f"{page}\n{text}", soft_wrap=True)


def read(out: Path, scale: str, budget: str, seeds: int) -> Found:
    """The finished cells of every row; in budget "time" those of the measured paces.

    Raises ValueError where the seeds of a row were trained from other towers or data, or on another platform.
    """
    rows = {row.name: row for row in rows_of(list(TABLES.values()), scale, budget)}
    files = [results.load(file) for file in sorted((out / scale).glob("*-s*.json"))]
    pace = {}
    if budget == "time":
        pace = measured(out, list(rows.values()), scale)
        rows = {name: row for name, row in rows.items() if name in pace}
    found = {}
    for name, row in rows.items():
        by_seed = {seed: cell(row, scale, seed, budget, pace.get(name, 1.0)) for seed in {f["seed"] for f in files}}
        cells = {seed: results.read(out, by_seed[seed]) for seed in sorted(by_seed)}
        found[name] = {seed: one for seed, one in cells.items() if one is not None and seed < seeds}
        results.check_alike(name, found[name])
    return found


def verdicts(found: Found, scale: str) -> list[Verdict]:
    """Every claim that this scale can judge."""
    return [judge(claim, found) for claim in CLAIMS if claim.better.at(scale) and claim.worse.at(scale)]


def forest(judged: Sequence[Verdict]) -> str:
    """The claims about captions as intervals of BLEU-4, the paper's effect a diamond."""
    rows = [
        Interval(
            f"{v.claim.name} (Table {v.claim.table})",
            100 * v.change.mean,
            (100 * v.change.interval[0], 100 * v.change.interval[1]),
            100 * v.expected if v.expected else None,
            COLOURS.get(v.word, 4),
        )
        for v in judged
        if v.word != "not measured" and v.claim.metric == "Bleu_4"
    ]
    return intervals(rows, unit="difference in BLEU-4, points", name="claims") if rows else ""


def note(out: Path, scale: str) -> str:
    """What a reader of these results has to know, if somebody wrote it beside them."""
    file = out / scale / NOTE
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def html(found: Found, scale: str, budget: str, out: Path) -> str:
    """The page."""
    cells = [one for row in found.values() for one in row.values()]
    judged = verdicts(found, scale)
    tables = [
        {
            "table": table,
            "columns": [metric_of(key) for key in table.metrics],
            "rows": entries(table, found),
            "stages": stages(table, found),
            "charts": charts(table, found),
            "gallery": examples(table, found, scale),
            "judged": [_judged(v, found) for v in judged if v.claim.table == table.name and v.word != "not measured"],
        }
        for table in TABLES.values()
        if _shown(table, found)
    ]
    diagnosed = {
        row.title: one
        for name, row in _rows().items()
        for one in [one for one in found.get(name, {}).values() if "diagnostics" in one][:1]
    }
    return (
        environment(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            title=f"EIM's tables, {scale}{', equal time' if budget == 'time' else ''}",
            scale=scale,
            note=note(out, scale),
            budget=EQUAL[budget],
            seeds=sorted({one["seed"] for one in cells}),
            count=len(cells),
            hours=sum(one["seconds"] for one in cells) / 3600,
            dates=sorted({one["date"] for one in cells}),
            machines=sorted({_facts(one["machine"]) for one in cells}),
            versions=sorted({_facts(one["versions"]) for one in cells}),
            judged=[_judged(v, found) for v in judged],
            anchors=anchors() if scale == "miniature" else [],
            decoding=" and ".join(sorted({one["decoding"] for one in cells})),
            forest=forest(judged),
            tables=tables,
            efficiency=efficiency(found),
            diagnosed=diagnosed,
            diagnostics=diagnostics({title: one["diagnostics"] for title, one in diagnosed.items()}),
            commands=[(row, one) for name, row in _rows().items() for one in list(found.get(name, {}).values())[:1]],
        )
    )


def _judged(v: Verdict, found: Found) -> dict[str, Any]:
    how = metric_of(v.claim.metric)
    others = []
    for key in BESIDE.get(v.claim.metric, ()):
        change = difference(found.get(v.claim.worse.name, {}), found.get(v.claim.better.name, {}), key)
        if change is not None:
            other = metric_of(key)
            others.append({"name": other.name, "change": told(other, change), "sense": sense(other, change)})
    return {
        "claim": v.claim.statement,
        "ours": v.claim.ours,
        "others": others,
        "table": v.claim.table,
        "metric": how.name,
        "rows": f"{v.claim.better.title}, against {v.claim.worse.title}",
        "word": v.word,
        "badge": WORDS.get(v.word, ""),
        "seeds": str(v.change.seeds) if v.change else "–",
        "change": told(how, v.change) if v.change else "–",
        "expected": f"{v.expected * how.factor:+.{how.decimals}f}".replace("-", "−") if v.expected else "–",
        "paper": f"{100 * v.claim.effect:+.1f} %".replace("-", "−") if v.claim.effect else _unknown(v),
    }


def _unknown(v: Verdict) -> str:
    return "ours" if v.claim.ours else "not known"


def markdown(found: Found, scale: str, budget: str, out: Path) -> str:
    """Verdicts and tables for a README."""
    lines = [
        f"Scale {scale}; budget: {EQUAL[budget]}. Means are over the seeds that a row has, differences over those "
        "that both rows have.",
        *(["", told_beside] if (told_beside := note(out, scale)) else []),
        "",
        "| claim | table | paper, relative | the same here | measured, 95 % interval | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (_judged(v, found) for v in verdicts(found, scale)):
        kept = ("claim", "table", "paper", "expected", "change", "seeds", "word")
        cells = [f"{row[key]} {row['metric']}" if key == "change" and row[key] != "–" else row[key] for key in kept]
        lines.append(f"| {' | '.join(cells)} |")
    for table in TABLES.values():
        if not _shown(table, found):
            continue
        heads = [f"{how.title} ({how.unit})" if how.unit else how.title for how in map(metric_of, table.metrics)]
        lines += ["", f"Table {table.name}: {table.title}" if table.name.isdigit() else table.title, ""]
        lines.append("| | steps | " + " | ".join(heads) + " |")
        lines.append("|---|---|" + "---|" * len(heads))
        for row, took, _, scores in entries(table, found):
            if any(entry.value or entry.paper for entry in scores):
                lines.append(f"| {row.title} | {took or 'not run'} | {' | '.join(map(_cell, scores))} |")
    if rows := efficiency(found):
        lines += ["", "Seconds of an epoch, stage by stage (in brackets the paper's minutes)", "", "| | |", "|---|---|"]
        for row in rows:
            told_of = [
                f"{s['name']} {s['seconds']}" + (f" ({s['paper']})" if s["paper"] else "") for s in row["stages"]
            ]
            lines.append(f"| {row['row'].title} | {', '.join(told_of)} |")
    return "\n".join(lines) + "\n"


def _cell(entry: Entry) -> str:
    """A score with its change, and the paper's."""
    value = f"{entry.value or '–'}{f' ({entry.change})' if entry.change else ''}"
    return f"{value}; paper {entry.paper}" if entry.paper else value


def _shown(table: Table, found: Found) -> bool:
    """Whether there is something to compare."""

    def scored(row: Row) -> bool:
        return any(key in one["scores"] for one in found.get(row.name, {}).values() for key in table.metrics)

    return table is not training_efficiency.TABLE and sum(map(scored, table.rows)) > 1


def _rows() -> dict[str, Row]:
    return {row.name: row for table in TABLES.values() for row in table.rows}


def _facts(mapping: Mapping[str, Any]) -> str:
    return " · ".join(f"{key} {value}" for key, value in mapping.items())


if __name__ == "__main__":
    main()

"""The tables of the report: what stands in each cell, the queues' figures, the curves, the training times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eim_jax.evaluation.metrics import metric_of
from eim_jax.evaluation.metrics.metric import Metric
from eim_jax.losses.table import title_of
from eim_jax.reporting.charts import Line, panel
from eim_jax.utils.console import duration
from experiments import results, training_efficiency
from experiments.cells import Row
from experiments.intervals import Spread, difference, score
from experiments.layout import Table

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row name -> seed -> result


@dataclass(frozen=True)
class Entry:
    """One score of one row as shown; `sense` +1 better than the table's first row, -1 worse, 0 not told apart."""

    paper: str = ""
    value: str = ""
    change: str = ""
    sense: int | None = None


def entries(table: Table, found: Found) -> list[tuple[Row, str, list[str], list[Entry]]]:
    """The rows of a table, each with what it took, its ticks and its scores."""
    shown = []
    for i, row in enumerate(table.rows):
        ticks = list(table.ticks[i]) if table.ticks else []
        took = effort(list(found.get(row.name, {}).values()))
        shown.append((row, took, ticks, [_entry(table, row, key, found) for key in table.metrics]))
    return shown


def effort(cells: Sequence[Mapping[str, Any]]) -> str:
    """What a row took: its stages' steps, what its last stage trains, its training time and its number of seeds.

    The time is that of the fastest seed, stage by stage.
    """
    if not cells:
        return ""
    stages = cells[0]["stages"]
    steps = " + ".join(f"{stage['steps']:,} {stage['name']}" for stage in stages)
    seeds = f"{len(cells)} seed{'s' * (len(cells) > 1)}"
    return (
        f"{steps}; {stages[-1]['trained_params'] / 1e6:.2f}M trained last; {duration(results.seconds(cells))}; {seeds}"
    )


def _entry(table: Table, row: Row, key: str, found: Found) -> Entry:
    how = metric_of(key)
    paper = "" if key not in row.paper else f"{row.paper[key]:g}"
    here, first = found.get(row.name, {}), found.get(table.rows[0].name, {})
    spread = score(here, key) if here else None
    if spread is None:
        return Entry(paper)
    value = how.text(spread.mean) + (f" ± {how.text(spread.sd)}" if spread.sd is not None else "")
    change = difference(first, here, key) if row is not table.rows[0] and first else None
    if change is None:
        return Entry(paper, value)
    return Entry(paper, value, told(how, change), sense(how, change))


def told(how: Metric, change: Spread) -> str:
    """A difference with its interval, in the score's unit; one seed's has none, since it knows no other seed."""
    digits = f"+.{how.decimals}f"
    text = f"{change.mean * how.factor:{digits}}"
    if change.interval is not None and change.seeds > 1:
        text += " [" + ", ".join(f"{bound * how.factor:{digits}}" for bound in change.interval) + "]"
    return text.replace("-", "−")


def sense(how: Metric, change: Spread) -> int | None:
    """Whether the interval says better (+1), worse (-1) or neither (0); None where it is not judged."""
    if change.interval is None or change.seeds < 2 or not how.sense:
        return None
    low, high = change.interval
    return how.sense * (int(low > 0) - int(high < 0))


def stages(table: Table, found: Found) -> list[dict[str, str]]:
    """First -> last value of every queue loss of a table's rows, its recall@1 and effective negatives, seeds' mean."""
    rows = []
    for row in table.rows:
        cells = list(found.get(row.name, {}).values())
        for index in range(len(cells[0]["stages"])) if cells else ():
            curves = [one["stages"][index]["curves"] for one in cells]
            for loss in (
                key.split("/")[1] for key in curves[0] if key.startswith("queue/") and key.endswith("recall1")
            ):
                ends = {
                    name: _ends(curves, key)
                    for name, key in (
                        ("loss", f"loss/{loss}"),
                        ("recall", f"queue/{loss}/recall1"),
                        ("effective", f"queue/{loss}/effective"),
                    )
                }
                rows.append({"row": row.title, "stage": cells[0]["stages"][index]["name"], "of": loss, **ends})
    return rows


def _ends(curves: Sequence[Mapping[str, Sequence[float]]], key: str) -> str:
    first, last = (sum(one[key][i] for one in curves) / len(curves) for i in (0, -1))
    return f"{first:.3g} → {last:.3g}"


def charts(table: Table, found: Found) -> list[dict[str, str]]:
    """Each loss, recall@1 and effective negatives over the steps of the stage that reads it last, seeds' mean."""
    lines: dict[str, list[Line]] = {}
    for i, row in enumerate(table.rows):
        cells = list(found.get(row.name, {}).values())
        for stage in range(len(cells[0]["stages"])) if cells else ():
            curves = [one["stages"][stage]["curves"] for one in cells]
            for key in filter(_charted, curves[0]):
                values = [sum(points) / len(points) for points in zip(*(one[key] for one in curves), strict=True)]
                line = Line(row.title, curves[0]["step"], values, i, dashed=i // 6 % 3)
                kept = [old for old in lines.get(key, []) if old.label != row.title]
                lines[key] = [*kept, line]
    return [
        {
            "title": title,
            "range": "",
            "svg": panel(lines[key], unit=unit, name=f"t{table.name}-{key.replace('/', '-')}"),
        }
        for key in sorted(lines, key=lambda key: (key.startswith("queue"), key))
        for title, unit in [_charted(key)]
    ]


def _charted(key: str) -> tuple[str, str] | None:
    """Title and unit of a curve's chart; None: it has none."""
    match key.split("/"):
        case ["loss", name]:
            return title_of(name), "nats"
        case ["queue", name, "recall1"]:
            return f"{title_of(name)}: recall@1", "share of queries"
        case ["queue", name, "effective"]:
            return f"{title_of(name)}: effective negatives", "keys"
    return None


def diagnostics(diagnosed: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, str]]:
    """What `diagnose` found, over the stages that a row has finished: {row title: records} -> charts."""
    quantities: dict[str, tuple[str, Any]] = {
        "text perplexity": ("perplexity", lambda record: record["perplexity"]),
        "modality integration": ("MIR", lambda record: record["integration"]),
    }
    pairs = dict.fromkeys(pair for records in diagnosed.values() for record in records for pair in record["cosines"])
    for pair in pairs:
        quantities[f"gradients {pair}"] = ("cosine", lambda record, pair=pair: record["cosines"].get(pair))
    drawn = []
    for n, (title, (unit, value)) in enumerate(quantities.items()):
        lines = []
        for i, (row, records) in enumerate(diagnosed.items()):
            values = [value(record) for record in records]
            if any(v is not None for v in values):
                lines.append(Line(row, range(len(values)), values, i, dashed=i // 6 % 3))
        if lines:
            svg = panel(lines, unit=unit, name=f"diagnosed-{n}", over="stages done")
            drawn.append({"title": title, "range": "", "svg": svg})
    return drawn


def efficiency(found: Found) -> list[dict[str, Any]]:
    """Seconds an epoch of every stage, beside the paper's minutes."""
    rows = []
    for row in training_efficiency.TABLE.rows:
        cells, paper = list(found.get(row.name, {}).values()), training_efficiency.MINUTES.get(row.name, {})
        if not cells:
            continue
        stages, speeds = {}, results.speeds(cells)
        for i, stage in enumerate(cells[0]["stages"]):
            stages[stage["name"]] = stage["steps"] / stage["epochs"] * speeds[i]
        shown = [
            {"name": name, "seconds": f"{seconds:.1f} s", "paper": _minutes(paper.get(name))}
            for name, seconds in [*stages.items(), ("all", sum(stages.values()))]
        ]
        rows.append({"row": row, "stages": shown})
    return rows


def _minutes(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} min"

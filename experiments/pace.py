"""How many steps a row takes in the time of its baseline: the budget "time"."""

import json
import sys
from pathlib import Path

from eim_jax.utils.files import write_json
from experiments import results
from experiments.cells import Row, cell
from experiments.tables import TABLES

FILE = "pace.json"
SEEDS = 10  # whose speeds are looked for
BASES = {  # family -> the name of its baseline's row
    "clipcap": "clipcap",
    "clipcap_large": "clipcap-large",
    "llama_adapter": "llama-adapter",
    "lavin": "lavin",
    "lavin_lite": "lavin-lite",
    "lavin13b": "lavin-13b",
    "chat": "chat",
    "chat_lite13b": "chat-13b",
}


def paces(out: Path, rows: list[Row], scale: str, *, keep: bool = True) -> dict[str, float]:
    """By what a row's steps are multiplied so that it trains as long as its family's baseline: {row name: factor}.

    Both are measured in budget "steps": the sum over stages of steps x steady seconds a step of the fastest finished
    seed (building queues and caching features left out). What is once measured is kept in pace.json, by the
    hash of the row's cell, so that all seeds and later calls train the same steps (not with `keep` False). Exits where
    nothing was measured.
    """
    known = _known(out, scale)
    bases = {row.name: row for table in TABLES.values() for row in table.rows}

    def seconds(row: Row) -> float:
        found = [results.read(out, cell(row, scale, seed, "steps")) for seed in range(SEEDS)]
        cells = [one for one in found if one is not None]
        if not cells:
            sys.exit(f"error: --budget=time needs the speed of row {row.name}: run --budget=steps first")
        return results.seconds(cells)

    found = {}
    for row in rows:
        key = cell(row, scale, 0, "steps").hash
        if key not in known:
            known[key] = round(seconds(bases[row.base or BASES[row.family]]) / seconds(row), 4)
        found[row.name] = known[key]
    if keep:
        (out / scale).mkdir(parents=True, exist_ok=True)
        write_json(out / scale / FILE, known)
    return found


def measured(out: Path, rows: list[Row], scale: str) -> dict[str, float]:
    """The factors of `paces` that are known, of rows that have one; a baseline's is 1 by definition."""
    known = _known(out, scale)
    keys = {row.name: cell(row, scale, 0, "steps").hash for row in rows}
    found = {name: known[key] for name, key in keys.items() if key in known}
    return found | {row.name: 1.0 for row in rows if row.name == (row.base or BASES[row.family])}


def _known(out: Path, scale: str) -> dict[str, float]:
    file = out / scale / FILE
    return json.loads(file.read_text()) if file.exists() else {}

"""A run of a few steps, and what every place that shows scores says of it."""

import contextlib
import dataclasses
import io
import json
from unittest import mock

import tiny

from eim_jax import config as settings
from eim_jax.commands import train
from eim_jax.commands.score_report import score_table
from eim_jax.reporting.scores import table, verdict
from experiments import report, results, seeds
from experiments.cells import Cell, Row
from experiments.layout import Table
from experiments.tables import TABLES


def few_steps(**changes) -> settings.Config:
    """Two arms of two steps each, trained alike on the captions of a few scenes."""
    short = {"steps": 2, "warmup_steps": 1, "batch": 8}
    values = {"data.scenes": 8, "decode.methods": ("greedy",), "decode.max_tokens": 6, "decode.java": False}
    values |= {f"stages.base.{name}": value for name, value in short.items()}
    config = tiny.config_of("miniature", **values, **changes)
    return dataclasses.replace(config, arm={arm: config.arm["baseline"] for arm in ("baseline", "eim")})


def run(config, workdir) -> None:
    """Trains, scores and reports, as `--mode=train` does."""
    record = {"command": "a test", "config": settings.as_dict(config), "versions": {"jax": "0"}}
    record |= {"machine": {"platform": "cpu"}, "started": "2026-11-28T00:00:00+00:00"}
    train.train(config, workdir, record)


def scores_of(workdir) -> dict:
    """{arm: {method: scores}} from the files."""
    return {arm: json.loads((workdir / arm / "scores_test.json").read_text()) for arm in ("baseline", "eim")}


def terminal(workdir) -> dict[str, str]:
    """{title: what stands there} of the baseline's row in the terminal's table."""
    head, rows = score_table(scores_of(workdir))
    return dict(zip(head, rows[0], strict=True))


def columns_of(workdir) -> dict[str, tuple[str, str]]:
    """{heading: (the baseline's figure, its unit)} of the page's table."""
    found = table(scores_of(workdir))
    cells = found["methods"][0]["rows"][0]["cells"]
    return {c.label: (cell["text"], c.unit) for c, cell in zip(found["columns"], cells, strict=True)}


def judged(workdir) -> list[str]:
    """The names of the scores in the page's verdict."""
    return [row["label"] for row in verdict(scores_of(workdir))[0]["rows"]]


def over_seeds(workdir) -> str:
    """The table that experiments/seeds.py prints of this one run."""
    said = io.StringIO()
    with mock.patch("sys.argv", ["seeds", str(workdir)]), contextlib.redirect_stdout(said):
        seeds.main()
    return said.getvalue()


def experiment(config, workdir, out, metrics) -> tuple[dict, str]:
    """({row: {seed: result}}, the page): the two arms as a table of their own, the run standing for two seeds."""
    found, rows = {}, []
    for arm in ("baseline", "eim"):
        row = Row(f"extend-{arm}", arm, "clipcap", arm)
        one = Cell(row, "miniature", "steps", 0, "", {}, config)
        result = results.save(out, one, workdir)
        found[row.name] = {0: result, 1: {**result, "seed": 1}}
        rows.append(row)
    with mock.patch.dict(TABLES, {"extend": Table("extend", "A table of one's own", tuple(rows), metrics)}):
        return found, report.html(found, "miniature", "steps", out)

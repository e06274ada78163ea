"""All tables by their names on the command line."""

from experiments import (
    cone,
    controls,
    design,
    open_questions,
    table02,
    table03,
    table04,
    table05,
    table06,
    table07,
    table08,
    table09,
    table10,
    table11,
    table12,
    table13,
    training_efficiency,
    tuning,
)
from experiments.cells import Row
from experiments.layout import Table

MODULES = (table02, table03, table04, table05, table06, table07, table08, table09, table10, table11, table12, table13)
ALL = (
    *(module.TABLE for module in MODULES),
    controls.TABLE,
    controls.QUESTIONS,
    open_questions.TABLE,
    open_questions.QUESTIONS,
    cone.TABLE,
    *design.TABLES,
    tuning.TABLE,
    tuning.QUESTIONS,
)
TABLES: dict[str, Table] = {table.name: table for table in (*ALL, training_efficiency.TABLE)}


def rows_of(tables: list[Table], scale: str, budget: str = "") -> list[Row]:
    """The rows that these tables need at a scale with a budget, each once, in order."""
    return list({row.name: row for table in tables for row in table.rows if row.at(scale, budget)}.values())

"""A table of the paper: which rows it has, in which order, with which marks and scores."""

from dataclasses import dataclass

from experiments.cells import Row


@dataclass(frozen=True)
class Table:
    """A table of the paper: its rows, the first of which the others are compared with, and its columns.

    `metrics` are keys of scores, the columns; `marks` the names of the columns of ticks before them, `ticks` the rows'
    entries in these.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    marks: tuple[str, ...] = ()
    ticks: tuple[tuple[str, ...], ...] = ()
    about: str = ""


CAPTIONS = ("Bleu_4", "CIDEr", "nll", "nll_gap", "shape_colour_f1")
SCIENCEQA = tuple(f"accuracy/{name}" for name in ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"))
ANSWERS = ("accuracy/Avg", "accuracy/IMG", "nll", "nll_image_gap")

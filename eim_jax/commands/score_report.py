"""The scores of a run as the modes train and eval end with them: the terminal's table, and report.html."""

import functools
from pathlib import Path

from eim_jax.data.datasets.mme import YesNoSplit
from eim_jax.data.datasets.scienceqa import QASplit
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import mme
from eim_jax.evaluation.tasks.answers import scored
from eim_jax.parallel import processes
from eim_jax.reporting.page import write_report
from eim_jax.reporting.questions import Item
from eim_jax.utils.console import console, print_table

SCORES = {  # in the terminal's table
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE_L",
    "CIDEr": "CIDEr",
    "SPICE": "SPICE",
    **{f"accuracy/{name}": name for name in ("Avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")},
    "unparsed": "unparsed",
    **{f"mme/{name}": name for name in (*mme.TASKS, "sum", "perception", "cognition", "total")},
    "nll": "nll",
    "shape_colour_f1": "object F1",
}


def report_scores(workdir: Path, test: Split, limit: int, table: dict[str, dict]) -> None:
    """Prints the scores of a run's arms and renews its page, from the first process alone."""
    if not processes.is_first():
        return
    rows, present = [], [k for k in SCORES if any(s.get(k) is not None for m in table.values() for s in m.values())]
    for arm, methods in table.items():
        for method, scores in methods.items():
            values = [scores.get(k) for k in present]
            shown = [
                "-" if v is None else f"{v:.1f}" if k.startswith("mme/") else f"{v:.3f}"
                for k, v in zip(present, values, strict=True)
            ]
            rows.append([arm, method, *shown])
    notes = [s.get("notes", {}).get("decoding", "") for m in table.values() for s in m.values()]
    what = " ".join(notes[0].rpartition("; ")[2].split()[:2])
    print_table(f"scores on the test split ({what})", ["arm", "decoding", *(SCORES[k] for k in present)], rows)
    where = {id_: row for row, id_ in enumerate(test.images.ids)}
    items = questions_of(test, limit)
    path = write_report(workdir, lambda id_: test.images[where[str(id_)]], test.references, items)
    console.print(f"report: {path}", soft_wrap=True)


def questions_of(test: Split, limit: int) -> list[Item] | None:
    """The test's questions as the report shows them; None for captions."""

    def picture(sample):
        return None if sample.image is None else functools.partial(test.images.__getitem__, sample.image)

    if isinstance(test, QASplit):
        return [
            Item(s.id, picture(s), p.question, p.hint, p.choices, p.answer)
            for s in scored(test, limit)
            for p in [test.problems[s.id]]
        ]
    if isinstance(test, YesNoSplit):
        return [
            Item(s.id, picture(s), q.question, "", ("Yes", "No"), ("Yes", "No").index(q.answer))
            for s in scored(test, limit)
            for q in [test.questions[s.id]]
        ]
    return None

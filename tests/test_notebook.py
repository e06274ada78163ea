"""The notebook runs from top to bottom, briefly, and its cells print what a newcomer is told to look at."""

import re
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
BRIEF = {"steps": 2, "warmup_steps": 1, "batch": 8}


def fewer(stages, **fields):
    """Flags for a run of two steps a stage."""
    given = {f"stages.{stage}.{name}": value for stage in stages for name, value in BRIEF.items()}
    given |= {"data.scenes": 8, "data.eval_limit": 8, "decode.methods": "\"('greedy',)\"", "decode.max_tokens": 5}
    return " ".join(f"--config.{field}={value}" for field, value in {**given, "decode.java": False, **fields}.items())


def printed(cell):
    """What a cell printed; libraries' warnings are on the other stream."""
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


def test_no_outputs_are_kept():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_cell_does_what_stands_above_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EIM_JAX_FEWER", fewer(("base", "st", "lm", "ie")))
    monkeypatch.setenv("EIM_JAX_FEWER_QUESTIONS", fewer(("align", "tune")))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert jax.config.jax_compilation_cache_dir  # conftest's, which the notebook's processes inherit
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    install, train, scores, captions, losses, photos, train_questions, ask = (
        printed(cell) for cell in notebook.cells if cell.cell_type == "code"
    )
    assert re.fullmatch(r"eim_jax \d+\.\d+\.\d+\n", install)
    assert "report.html" in train and "done in" in train and "done in" in train_questions
    assert [line.split()[0] for line in scores.splitlines()] == ["baseline", "eim"] and "'nll'" in scores
    said = [line.partition(": ")[0] for line in captions.splitlines()]
    assert said == ["baseline", "eim"] * 6
    lines = [line.split()[:2] for line in losses.splitlines()]
    assert lines == [["st", "loss/st"], ["lm", "loss/lm"], ["ie", "loss/base"], ["ie", "loss/ie"]]
    assert losses.count("r@1") == 3
    assert [line.split(":")[0] for line in photos.splitlines()] == ["one.png", "two.png"]
    assert [line.partition("?")[0] for line in ask.splitlines()] == [
        "What colour is the circle",
        "How many objects are there",
    ]

"""The result of a cell as one JSON file, made from what its run left in its work directory."""

import hashlib
import json
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eim_jax.config import from_config_dict
from eim_jax.evaluation.metrics import known_metrics
from eim_jax.reporting.scores import flatten
from eim_jax.training.log import read_metrics
from experiments.cells import Cell, hash_of

OUT = Path("experiments/results")
CURVES = ("loss", "queue/")  # keys of metrics.jsonl that are kept
POINTS = 20  # of a stage's curve
COMMIT = "commit.txt"  # in a run's work directory: the code that it began with
EXAMPLES = 8  # test items whose captions or answers are kept: the first by the hash of their id


def path(out: Path, cell: Cell) -> Path:
    """Where the cell's result stands, or will."""
    found = sorted((out / cell.scale).glob(f"*-{cell.hash}.json"))
    return found[0] if found else out / cell.scale / f"{cell.name}.json"


def read(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's result, None while there is none."""
    file = path(out, cell)
    return load(file) if file.exists() else None


def load(file: Path) -> Any:
    """A JSON file's content."""
    return json.loads(file.read_text(encoding="utf-8"))


def speeds(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds a step of each stage of a row, by its fastest seed: what else a machine does can only slow a run."""
    return [
        min(stages) for stages in zip(*([s["seconds_per_step"] for s in one["stages"]] for one in cells), strict=True)
    ]


def seconds(cells: Sequence[Mapping[str, Any]]) -> float:
    """What the training of a row takes at these speeds, queues and cached features left out."""
    return sum(s["steps"] * pace for s, pace in zip(cells[0]["stages"], speeds(cells), strict=True))


def save(out: Path, cell: Cell, workdir: Path) -> dict[str, Any]:
    """Collects a finished run into the cell's file; the file appears whole or not at all.

    Raises ValueError when the work directory was trained with another config than the cell's.
    """
    found = collect(cell, workdir)
    target = path(out, cell)
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, found)
    return found


def _write(target: Path, found: Mapping[str, Any]) -> None:
    fresh = target.with_suffix(".partial")
    lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in found.items())
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    fresh.replace(target)


def add(out: Path, cell: Cell, key: str, value: Any) -> None:
    """Adds to, or replaces in, the cell's file what was found out after its run."""
    _write(path(out, cell), {**load(path(out, cell)), key: value})


def check_alike(row: str, cells: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises ValueError where a row's seeds were trained from other towers or data, or on another platform."""
    for what, get in (
        ("from other towers or data", lambda one: one.get("identity")),
        ("on another platform", lambda one: one["machine"].get("platform")),
    ):
        known = {seed: json.dumps(get(one), sort_keys=True) for seed, one in cells.items() if get(one)}
        if len(set(known.values())) > 1:
            seeds = ", ".join(map(str, known))
            raise ValueError(
                f"row {row}: of seeds {seeds} some were trained {what}: delete those results, run them again"
            )


def collect(cell: Cell, workdir: Path) -> dict[str, Any]:
    """What is kept of a run: settings, scores, what each test item adds to them, stages, a few captions or answers."""
    run, arm = load(workdir / "run.json"), workdir / cell.row.arm
    if hash_of(from_config_dict(run["config"]), cell.row.arm) != cell.hash:
        raise ValueError(f"{workdir} was trained with another config than {cell.name}: delete it")
    method = cell.config.decode.methods[0]
    scores = with_derived(flatten(load(arm / "scores_test.json")[method]))
    items = load(arm / "items_test.json")[method]
    said = load(arm / "predictions_test.json")
    outputs = said["outputs"] if isinstance(said, dict) else {str(row["image_id"]): row["caption"] for row in said}
    shown = sorted(outputs, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:EXAMPLES]
    diagnostics = arm / "diagnostics.json"
    return {
        "row": cell.row.name,
        "scale": cell.scale,
        "budget": cell.budget,
        "seed": cell.seed,
        "hash": cell.hash,
        "file": cell.file,
        "overrides": cell.overrides,
        "versions": run["versions"],
        "machine": run["machine"],
        "date": run["started"][:10],
        "commit": noted.read_text().strip() if (noted := workdir / COMMIT).exists() else commit(),
        "identity": run["identity"],
        "seconds": run["seconds"],
        "decoding": method,
        "scores": {name: value for name, value in scores.items() if value is not None},
        "items": items,
        "stages": _stages(arm),
        "examples": {key: outputs[key] for key in shown},
        **({"diagnostics": load(diagnostics)} if diagnostics.exists() else {}),
    }


def with_derived(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns the scores with those that METRICS derives from others, where they can be had."""
    found = dict(scores)
    for metric in known_metrics():
        if metric.same_as and metric.key not in found and found.get(metric.same_as) is not None:
            found[metric.key] = found[metric.same_as]
        more, less = (found.get(key) for key in metric.difference or ("", ""))
        if more is not None and less is not None:
            found[metric.key] = more - less
    return found


def note_commit(workdir: Path) -> None:
    """Writes into a run's work directory with which code it begins; what is there stays."""
    if not (workdir / COMMIT).exists():
        (workdir / COMMIT).write_text(commit() + "\n")


def commit() -> str:
    """The commit checked out, "+" behind it where eim_jax/ or configs/ differ from it; "" outside a repository."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(("git", *words), cwd=Path(__file__).parent.parent, capture_output=True, text=True)

    if shutil.which("git") is None or (head := git("rev-parse", "--short=10", "HEAD")).returncode:
        return ""
    changed = git("diff", "--quiet", "HEAD", "--", "eim_jax", "configs").returncode
    return head.stdout.strip() + ("+" if changed else "")


def _stages(arm: Path) -> list[dict[str, Any]]:
    """Of each stage: steps, steady seconds a step, size, and its curves at POINTS steps at most."""
    records, stages = read_metrics(arm / "metrics.jsonl"), []
    for index, stage in enumerate(load(arm / "run.json")["stages"]):
        rows = [row for row in records if row["stage_index"] == index and row["step"]]
        begun = next((row for row in records if row["stage_index"] == index and not row["step"]), {})
        start = {key: _short(value) for key, value in begun.items() if key.startswith(CURVES)}
        speed = statistics.median(row["examples_per_second"] for row in rows)
        every = -(-len(rows) // POINTS)
        kept = rows[::-1][::every][::-1]  # the last one always
        keys = [key for key in kept[-1] if key.startswith(CURVES)]
        stages.append(
            {
                **{key: stage[key] for key in ("name", "losses", "steps", "epochs", "batch", "trained_params")},
                "seconds": round(stage["seconds"], 2),
                "seconds_per_step": stage["batch"] / speed,
                "peak_memory_bytes": stage["peak_memory_bytes"],
                **({"start": start} if start else {}),
                "curves": {"step": [row["step"] for row in kept]}
                | {key: [_short(row.get(key)) for row in kept] for key in keys},
            }
        )
    return stages


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")

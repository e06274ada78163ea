"""What a command left, as values that two of its runs can be compared by; times left out."""

import hashlib
import json
import pathlib

import numpy as np

TIMES = {"examples_per_second", "seconds_per_step", "mfu", "data_wait", "device", "host", "seconds", "prepare_seconds"}


def left_by(name: str, folder: pathlib.Path) -> dict[str, object]:
    """{what: value} of a finished command's folder."""
    if name == "prepare":
        return _files(folder / "prepared", without={"cache"})
    if name == "export":
        return _files(folder / "exported")
    run = folder / "run"
    arm = run / "eim"
    found = _files(arm, without={"checkpoints", "run.json"}, only=(".json",))
    found |= {"report.html": (run / "report.html").read_text().rstrip().endswith("</html>")}
    found |= {f"queues/{path}": value for path, value in _files(run / "queues").items()}
    for place in sorted((run / "cache" / "features").iterdir()):
        found |= {f"features/{place.name}/{path}": value for path, value in _files(place).items()}
    found["metrics.jsonl"] = [_timeless(json.loads(line)) for line in (arm / "metrics.jsonl").read_text().splitlines()]
    found["run.json"] = _timeless(json.loads((arm / "run.json").read_text()))
    return found | _leaves(arm / "checkpoints")


def differences(want: dict[str, object], got: dict[str, object]) -> list[str]:
    """The names of what differs, is missing or is too much."""
    return sorted(
        name for name in want.keys() | got.keys() if name not in want or name not in got or want[name] != got[name]
    )


def litter(folder: pathlib.Path) -> list[str]:
    """Files that a finished command should have taken away."""
    marks = (".partial", ".parts", ".tmp", ".old", ".lock", "orbax-checkpoint-tmp")
    found = [path for path in folder.rglob("*") if any(mark in path.name for mark in marks)]
    return sorted(str(path.relative_to(folder)) for path in found if path.name != "run.lock")


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _files(folder: pathlib.Path, without: set[str] = frozenset(), only: tuple[str, ...] = ()) -> dict[str, object]:
    """{path: sha256} of the files below."""
    found = {}
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.is_file() and not without & set(inner.parts) and (not only or file.suffix in only):
            found[str(inner)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _leaves(checkpoints: pathlib.Path) -> dict[str, object]:
    """Every leaf that a stage's result holds, by its bytes."""
    import orbax.checkpoint as ocp

    found = {}
    for stage in sorted(checkpoints.iterdir()):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(stage / "result" / "trained")
        for path, leaf in tree.items():
            array = np.asarray(leaf)
            found[f"{stage.name}/{path}"] = (array.shape, array.dtype.name, array.tobytes())
    return found

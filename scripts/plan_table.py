"""The tables of plans: python scripts/plan_table.py FILE.json ..., each written by --mode=plan --out=FILE.json.

With --run, plans configs/NAME.py for TOPOLOGY first, where the file is missing: --run NAME@TOPOLOGY[@STAGE] ...; with
--all, every full-size config: its heaviest stage on its smallest v5e slice and on eight v5p (needs libtpu); with
--gpus, one config a recipe on GPUs (needs the extra plan-gpu).
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from eim_jax.planning.targets import SMALLEST

GPUS = (
    "clipcap_eim_coco@gpu:l4x1@ie",
    "llama_adapter_eim_scienceqa@gpu:h100x8@ie",
    "lavin7b_scienceqa@gpu:h100x1@base",
    "lavin7b_eim_scienceqa@gpu:h100x8@ie",
    "lavin7b_eim_scienceqa@gpu:h100x2x8@ie",
    "lavin7b_eim_chat@gpu:rtx4090x1@ie",
)
HEAD = (
    *("config", "topology", "stage", "parameters", "optimizer", "queue", "temporaries", "peak GiB", "TFLOP"),
    *("GB sent", "step s", "expected s", "bound by", "epoch min", "verdict"),
)


def main() -> None:
    """Prints one Markdown line a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--run", nargs="*", default=[], metavar="NAME@TOPOLOGY[@STAGE]")
    parser.add_argument("--folder", type=Path, default=Path("runs/plan"), help="where --run writes")
    parser.add_argument("--all", action="store_true", help="the TPUs' cases of docs/guides/plan.md")
    parser.add_argument("--gpus", action="store_true", help="the GPUs' cases of docs/guides/plan.md")
    options = parser.parse_args()
    cases = options.run
    if options.all:
        cases += [
            f"{name}@{place}@{stage}" for name, (slice_, stage) in SMALLEST.items() for place in (slice_, "v5p:2x2x2")
        ]
    cases = cases + list(GPUS) if options.gpus else cases
    files = options.files + [run(case, options.folder) for case in cases]
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for file in files:
        for line in rows(json.loads(file.read_text())):
            print(f"| {' | '.join(line)} |")


def run(case: str, folder: Path) -> Path:
    """Plans one case, unless its file is there; returns the file."""
    name, topology, *stage = case.split("@")
    file = folder / f"{case.replace(':', '_')}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "eim_jax.main", "--mode=plan", f"--config=configs/{name}.py"]
        command += [f"--topology={topology}", f"--out={file}", *(f"--stages={s}" for s in stage)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return file


def rows(plan: dict) -> list[list[str]]:
    """A plan's lines, memory in GiB on each chip, seconds at peak rates."""
    name = re.search(r"--config=(?:\S*/)?(\w+)\.py", plan["command"])[1]
    found = []
    for p in plan["stages"]:
        m = {part: size / 2**30 for part, size in p["memory"].items()}
        parts = (m["trained"] + m["frozen"] + m["kept"], m["optimizer"], m["queue"], m["temporaries"])
        seconds = max(p["seconds"].values())
        found.append(
            [
                *(f"`{name}`", plan["topology"], p["stage"], *(f"{x:.2f}" for x in parts)),
                f"{m['peak']:.2f} of {p['capacity'] / 2**30:.1f}",
                f"{p['flops'] / 1e12:,.1f}",
                f"{sum(p['sent'].values()) / 1e9:.2f}",
                f"{seconds:.4f}",
                f"{p['expected']:.4f}",
                max(p["seconds"], key=p["seconds"].get),
                f"{seconds * p['steps_per_epoch'] / 60:.1f}",
                "fits" if p["fits"] else f"does not fit: {p['knob']}",
            ]
        )
    return found


if __name__ == "__main__":
    main()

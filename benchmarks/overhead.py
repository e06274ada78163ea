"""EIM's overhead an epoch over the baseline, beside the paper's: what every stage reads and computes, and step times.

python benchmarks/overhead.py [--recipes clipcap lavin llama_adapter] [--text N]
    from the full-size configs, by shapes alone: batch fields and towers that a stage's step really reads, and the
    arithmetic of its matrix products (eim_jax.planning.plan's count, recomputation included), at the longest text or
    at N tokens (length buckets make a step as long as its texts).
python benchmarks/overhead.py --measure [--batch 8] [--rounds 3]
    also times ClipCap's stages at full size (ViT-B/32, GPT-2 small, 566,747 keys) on random weights; nothing is loaded.
"""

import argparse
import functools
import gc
import importlib
import statistics
import sys
import unittest.mock
from pathlib import Path

import clipcap_case
import jax
import jax.numpy as jnp
from pairs import machine
from step_case import Updates
from timing import Side, measure

from eim_jax.config import from_config_dict
from eim_jax.losses import next_token, objective
from eim_jax.losses.table import queues_of
from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning.plan import placed, stage_program
from eim_jax.planning.shapes import abstract_inputs
from eim_jax.training import partition
from eim_jax.training.arm_model import model, shapes
from eim_jax.training.vision_features import reads_features
from eim_jax.utils.flops import work

sys.path.append(str(Path(__file__).parent.parent))  # configs/ is no part of the package
# recipe -> (baseline's config, EIM's config, the paper's stage minutes on its machines, what it says of the overhead)
RECIPES = {
    "clipcap": (
        "clipcap_small_coco",
        "clipcap_eim_coco",
        {"st": 0.9, "lm": 6.4, "ie": 43.7},
        "51 min an epoch, +17 % over its own last stage (43.7); ClipCap_small alone 23",
    ),
    "lavin": (
        "lavin7b_scienceqa",
        "lavin7b_eim_scienceqa",
        {"st": 0.45, "lm": 1.05, "adapter": 7.0},
        "+8.5 min, about +120 %",
    ),
    "llama_adapter": (
        "llama_adapter_scienceqa",
        "llama_adapter_eim_scienceqa",
        {"st": 0.33, "lm": 1.0, "adapter": 7.0},
        "+8 min, about +120 %",
    ),
}
TOWERS = ("visual", "text", "st", "lm")


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    """Prints the tables; returns the rows of each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--text", type=int, help="tokens of a text instead of the configs' longest")
    parser.add_argument("--measure", action="store_true", help="time ClipCap's stages")
    parser.add_argument("--size", choices=clipcap_case.SIZES, default="full", help="of the timed stages")
    parser.add_argument("--batch", type=int, default=8, help="of the timed stages")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"{machine('jax', 'flax', 'optax')}\n$ python {' '.join(sys.argv)}\n")
    found = {}
    for name in options.recipes:
        baseline, eim, minutes, words = RECIPES[name]
        found[name] = [*stage_rows(baseline, options.text), *stage_rows(eim, options.text)]
        seconds = times(options) if options.measure and name == "clipcap" else {}
        print(f"## {name}\n\nThe paper: {words}.\n")
        print("| arm | stage | reads | towers in the step | TFLOP a step | s a step, measured | paper, min an epoch |")
        print("|---|---|---|---|---|---|---|")
        for row in found[name]:
            row["seconds"] = seconds.get(row["stage"])
            timed = f"{row['seconds']:.3f}" if row["seconds"] else ""
            paper = minutes.get(row["stage"], "")
            cells = (row["arm"], row["stage"], " ".join(row["reads"]), " ".join(row["towers"]))
            print(f"| {' | '.join(cells)} | {row['flops'] / 1e12:.4g} | {timed} | {paper} |")
        print()
        for line in overhead(found[name]):
            print(f"- {line}")
        print(flush=True)
    return found


def stage_rows(config_name: str, text: int | None = None) -> list[dict]:
    """One row a stage of the config's first arm, from shapes: what its step reads, and its arithmetic."""
    values = importlib.import_module(f"configs.{config_name}").get_config()
    values.data.max_tokens = text or values.data.max_tokens
    config = from_config_dict(values)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    inputs, _ = abstract_inputs(config, mesh)
    name = config.arms[0]
    vlm = model(inputs, config.arm[name])
    params = placed(shapes(inputs, config.arm[name], vlm), mesh)
    rows = []
    for stage_name in config.arm[name].sequence:
        stage = config.stages[stage_name]
        program = stage_program(inputs, vlm, stage, params, steps=100_000)
        # The head's loop ends with the supervised tokens, so its turns are in no program: one chunk counts it whole.
        with unittest.mock.patch.dict(next_token.CHUNK_BYTES, dict.fromkeys(next_token.CHUNK_BYTES, 1 << 50)):
            jaxpr = program.step.trace(*program.arguments).jaxpr
        batch = program.arguments[3]
        row = {"arm": name, "stage": stage_name, "flops": work(jaxpr).flops, "batch": stage.batch}
        row["reads"] = [field for field, value in batch._asdict().items() if value is not None]
        rows.append(row | {"towers": towers_read(jaxpr, program.arguments)})
    epoch = sum(row["flops"] for row in rows) * len(inputs.train) / rows[0]["batch"]
    return [row | {"once": once(inputs, vlm, config, name) / epoch} for row in rows]


def once(inputs, vlm, config, arm: str) -> float:
    """FLOPs of what a run computes once: the queues that its stages read, and features where some stage caches them."""
    flat = shapes(inputs, config.arm[arm], vlm)
    params = partition.unflatten(flat)
    chosen = [config.stages[name] for name in config.arm[arm].sequence]
    total, c = 0.0, vlm.visual.config
    for kind in queues_of(*chosen):
        encode = functools.partial(kind.keys, vlm)
        total += work(jax.make_jaxpr(encode)(params, kind.source.row(inputs))).flops * len(inputs.train)
    if any(
        "image" in objective.fields(stage, config.losses) and reads_features(inputs, stage, flat) for stage in chosen
    ):
        image = jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), jnp.uint8)
        total += work(jax.make_jaxpr(vlm.encode_image)(params, image)).flops * len(inputs.train.images)
    return total


def towers_read(jaxpr, arguments: tuple) -> list[str]:
    """The towers of which the traced step reads a parameter; what only passes by (a frozen leaf's shape) is none."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    used = {id(variable) for equation in inner.eqns for variable in equation.invars}
    leaves = jax.tree_util.tree_leaves_with_path(arguments)
    if len(leaves) != len(inner.invars):
        raise RuntimeError(f"the traced step has {len(inner.invars)} inputs for {len(leaves)} arguments")
    found = set()
    for (path, _), variable in zip(leaves, inner.invars, strict=True):
        if path[0].idx in (0, 2) and id(variable) in used:  # trained and frozen leaves
            found.add(path[1].key.partition("/")[0])
    return [tower for tower in TOWERS if tower in found]


def overhead(rows: list[dict]) -> list[str]:
    """What EIM's stages add, over its own last stage and over the baseline's epoch, in each unit that is known."""
    baseline, eim = [r for r in rows if r["arm"] == "baseline"], [r for r in rows if r["arm"] != "baseline"]
    lines = []
    for unit, words in (("flops", "arithmetic"), ("seconds", "measured time")):
        parts = [row.get(unit) for row in (*baseline, *eim)]
        if not all(parts):
            continue
        whole, last = sum(row[unit] for row in eim), eim[-1][unit]
        before = ", ".join(f"{row['stage']} {row[unit] / last:.1%}" for row in eim[:-1])
        epoch = sum(row[unit] for row in baseline)
        lines.append(
            f"{words}: +{whole / last - 1:.0%} over EIM's own last stage ({before} of it); "
            f"an epoch of all stages is {whole / epoch:.2f} of the baseline's"
        )
    lines.append(
        f"once a run, queues and cached features: {eim[0]['once']:.0%} of one epoch's arithmetic "
        f"(the baseline: {baseline[0]['once']:.0%} of its own)"
    )
    return lines


def times(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each of ClipCap's stages on this machine."""
    found = {}
    for stage in clipcap_case.STAGES:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        case = clipcap_case.clipcap_case(clipcap_case.SIZES[options.size], stage, batch=options.batch, dtype=dtype)
        step = Updates(case)
        found[stage] = statistics.median(measure({stage: Side(step.run)}, options.rounds, 0.0)[stage])
        del step
        gc.collect()
    return found


if __name__ == "__main__":
    main()

"""A plan in words: Markdown tables in the terminal, a JSON file, and the table of every parameter's place."""

import dataclasses
import re
from pathlib import Path

from eim_jax.config import Config
from eim_jax.parallel.sharding import make_mesh, table
from eim_jax.planning.collectives import KINDS
from eim_jax.planning.expected import SHARES
from eim_jax.planning.meshes import MeshPlan, best
from eim_jax.planning.plan import USABLE, Memory, StagePlan
from eim_jax.planning.shapes import abstract_inputs
from eim_jax.planning.targets import GIB, Target
from eim_jax.training.arm_model import model, shapes
from eim_jax.utils.console import console, duration
from eim_jax.utils.files import write_json


def print_plan(target: Target, mesh: tuple, plans: list[StagePlan], notes: list[str]) -> None:
    """Prints what was planned for config.mesh as Markdown tables, with the rates behind it."""
    chip, mesh = target.chip, tuple(make_mesh(mesh, target.devices).shape.values())
    _say(f"\n{target.name}: {len(target.devices)} x {chip.name}, mesh (data, fsdp, tensor) = {mesh}; {target.note}")
    _say(
        f"peak rates of a device ({chip.source}): {chip.flops / 1e12:,.1f} TFLOP/s, {chip.bandwidth / 1e9:,.0f} GB/s "
        f"from memory, {chip.link / 1e9:,.0f} GB/s to others; {USABLE:.0%} of {chip.memory / GIB:.1f} GiB is usable"
    )
    for note in notes:
        _say(f"- {note}")
    _say("\nGiB on each device:\n")
    fields = (*Memory._fields, "peak", "of")
    rows = [
        [p.arm, p.stage, *(f"{x / GIB:.2f}" for x in (*p.memory, p.memory.peak, p.capacity)), verdict(target, p)]
        for p in plans
    ]
    _print_markdown(("arm", "stage", *fields, "verdict"), rows)
    builds = [[p.arm, p.stage, b.queue, b.rows, b.temporaries, b.peak, b.fits] for p in plans for b in p.builds]
    if builds:
        _say("\nBuilding the queues, once, before the stage's first step: rows at a time, GiB on each device:\n")
        good, bad = "fits", "does not fit" if target.exact else "may not fit"
        rows = [
            [*names, str(number), f"{more / GIB:.2f}", f"{peak / GIB:.2f}", good if fits else bad]
            for *names, number, more, peak, fits in builds
        ]
        _print_markdown(("arm", "stage", "queue", "rows", "temporaries", "peak", "verdict"), rows)
    shares = SHARES[target.platform]
    _say("\nA step of all devices in TFLOP; GB that each device sends; seconds at peak rates (a step: the largest);")
    _say(
        f"expected at {shares.compute:.0%} of the arithmetic's, {shares.memory:.0%} of the memory's and "
        f"{shares.links:.0%} of the links' peak ({shares.source}):\n"
    )
    rows = [
        [
            *(p.arm, p.stage, f"{p.flops / 1e12:,.1f}"),
            *(f"{p.sent[kind] / 1e9:.2f}" for kind in KINDS),
            *(f"{x:.4f}" for x in p.seconds.values()),
            f"{p.step_seconds:.4f}",
            f"{p.expected:.4f}",
            f"{p.steps_per_epoch:,}",
            duration(p.epoch_seconds),
            duration(p.expected * p.steps_per_epoch),
        ]
        for p in plans
    ]
    heads = ("arm", "stage", "TFLOP", *KINDS, "compute", "memory", "links", "step", "expected")
    heads += ("steps", "epoch", "expected epoch")
    _print_markdown(heads, rows)
    _say()
    for p in plans:
        for note in p.notes:
            _say(f"- {p.arm} {p.stage}: {note}")
        if not p.fits:
            _say(f"- {p.arm} {p.stage} {verdict(target, p)}. First: {p.knob}")


def print_meshes(target: Target, plans: list[MeshPlan]) -> None:
    """Prints what each mesh would hold and send, and which of them to take."""
    _say("\nEvery mesh (data, fsdp, tensor): GiB on a device, GB that a device sends in all steps of all stages:\n")
    rows = [
        (str(p.mesh), f"{p.peak / GIB:.2f}", f"{p.sent / 1e9:,.1f}", "fits" if p.fits else _unfit(target))
        for p in plans
    ]
    _print_markdown(("mesh", "peak", "sent", "verdict"), rows)
    chosen = best(plans)
    if chosen is None:
        _say("\nNo mesh of these fits; what the last one needs first stands above.")
        return
    _say(
        f'\nRecommended: --config.mesh="({",".join(map(str, chosen.mesh))})", which sends the least of those that fit.'
    )


def verdict(target: Target, p: StagePlan) -> str:
    """One phrase; an upper bound that is too large proves nothing."""
    return "fits" if p.fits else _unfit(target)


def _unfit(target: Target) -> str:
    return "does not fit" if target.exact else "may not fit"


def print_table(config: Config, target: Target) -> None:
    """Prints where every parameter of every arm lies."""
    for name in config.arms:
        console.print(f"\narm {name}: path, shape, dtype, sharding, bytes on each device", soft_wrap=True)
        for line in sharding_table(config, target.devices, name, target.platform):
            _say(line)


def sharding_table(config: Config, devices: list, arm: str, platform: str) -> list[str]:
    """One line a parameter of the arm; equal layers (blocks_0, blocks_1, ...) share a line."""
    mesh = make_mesh(config.mesh, devices)
    inputs, _ = abstract_inputs(config, mesh, platform=platform)
    lines: dict[tuple, int] = {}
    for row in table(shapes(inputs, config.arm[arm], model(inputs, config.arm[arm])), mesh):
        spec = "(" + ", ".join("+".join(a) if isinstance(a, tuple) else str(a or "-") for a in row.spec) + ")"
        path = re.sub(r"/blocks_\d+/", "/blocks_*/", row.path)
        line = (path, "x".join(map(str, row.shape)) or "scalar", row.dtype, spec, row.bytes)
        lines[line] = lines.get(line, 0) + 1
    return [
        f"{path} {shape} {dtype} {spec} {size:,}" + (f" (x {number})" if number > 1 else "")
        for (path, shape, dtype, spec, size), number in lines.items()
    ]


def write(path: Path, command: str, target: Target, mesh: tuple, plans: list[StagePlan], notes: list[str]) -> None:
    """Writes the plan for config.mesh as JSON."""
    found = [
        {
            **p._asdict(),
            "memory": {**p.memory._asdict(), "peak": p.memory.peak},
            "builds": [build._asdict() for build in p.builds],
            "step_seconds": p.step_seconds,
            "epoch_seconds": p.epoch_seconds,
        }
        for p in plans
    ]
    chip = dataclasses.asdict(target.chip)
    sides = tuple(make_mesh(mesh, target.devices).shape.values())
    head = {"command": command, "topology": target.name, "devices": len(target.devices), "exact": target.exact}
    head |= {"mesh": sides}
    write_json(path, {**head, "chip": chip, "notes": notes, "stages": found})


def _say(text: str = "") -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _print_markdown(heads, rows) -> None:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in (heads, ["-" * w for w in widths], *rows):
        _say("| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |")

"""How a step's time and memory grow: with the queue's keys, the batch, the texts' length, the devices.

    python benchmarks/growth.py --svg docs/assets/growth.svg

Times are of this machine: the queue loss alone (batch 40, width 64), and the last stage of ClipCap-EIM in miniature
(loss_base and loss_IE). Memory is the compiled step's. Devices are not here: full-size ClipCap-EIM's last stage is
compiled for that many fake CPUs, its batch of 40 a device or 320 in all. A slope is d log y / d log x between
neighbours: 1 is linear, 0 is free.
"""

import argparse
import dataclasses
import datetime
import importlib
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from clipcap_case import SIZES, clipcap_case
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from step_case import Updates, unit_keys
from timing import Side, measure

from eim_jax.config import Config, from_config_dict
from eim_jax.losses.contrastive import queue_nce
from eim_jax.planning import plan
from eim_jax.planning.targets import target
from eim_jax.reporting.svg import GRID, INK, LINES, alone, inline_svg, text_style
from eim_jax.utils.cpu import cpu_model, vector_units

BATCH, WIDTH, TAU = 40, 64, 0.07
KEYS = tuple(round(10 ** (4 + half / 2)) for half in range(7))  # 1e4 ... 1e7
BATCHES = (5, 10, 20, 40, 80, 160, 320)
SLOTS = (8, 16, 32, 64, 128, 256)
DEVICES = (1, 2, 4, 8)
EACH, ALL = 40, 320  # rows of a batch: on each device, or in all


class Curve(NamedTuple):
    """One quantity over another: `y` at each `x`."""

    title: str
    over: str
    unit: str
    x: Sequence[int]
    y: Sequence[float]

    @property
    def slopes(self) -> list[float]:
        """Between neighbours, on logarithmic axes."""
        pairs = list(zip(self.x, self.y, strict=True))
        return [math.log(b / a) / math.log(right / left) for (left, a), (right, b) in itertools.pairwise(pairs)]


def main(arguments: list[str] | None = None) -> list[Curve]:
    """Prints a table a curve; with --svg draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="a file for the picture")
    parser.add_argument("--rounds", type=int, default=5, help="the fastest of so many counts")
    parser.add_argument("--most", type=float, default=1e7, help="the largest x of each curve: a short form")
    parser.add_argument("--size", choices=SIZES, default="miniature")
    parser.add_argument("--plan", default="clipcap_eim_coco", help="the preset compiled for several devices")
    options = parser.parse_args(arguments)
    found = [
        loss_over_keys(few(KEYS, options.most), options.rounds),
        *steps("text slots", few(SLOTS, options.most), options, lambda n: {"length": n}),
        *steps("rows of a batch", few(BATCHES, options.most), options, lambda n: {"batch": n}),
    ]
    # A process of its own: one that pretends to have many devices shares its cores among them.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone_process:
        found += alone_process.submit(over_devices, few(DEVICES, options.most), options.plan).result()
    cpu = f"{cpu_model()} ({', '.join(vector_units())}), {os.cpu_count()} cores"
    print(f"\n{datetime.date.today()} | {cpu} | jax {jax.__version__}\n")
    for curve in found:
        print(table(curve), "\n")
    if options.svg:
        options.svg.write_text(alone(drawn(found)), encoding="utf-8")
    return found


def few(values: Sequence[int], most: float) -> tuple[int, ...]:
    """Those that are not larger than `most`; two at the least."""
    return tuple(n for i, n in enumerate(values) if n <= most or i < 2)


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds."""
    return 1e3 * min(measure({"it": Side(run)}, rounds)["it"])


def loss_over_keys(numbers: Sequence[int], rounds: int) -> Curve:
    """The queue loss and its gradient alone, float32 keys."""

    def loss(query, keys, index):
        nce = queue_nce(query, keys, index, count=len(keys), tau=TAU)
        return nce.loss / nce.weight

    step = jax.jit(jax.value_and_grad(loss))
    query = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    times = []
    for number in numbers:
        keys = unit_keys((number, WIDTH), jnp.float32, jax.random.key(0, impl="rbg"))
        index = jnp.arange(BATCH) * (number // BATCH)
        times.append(fastest(lambda keys=keys, index=index: step(query, keys, index), rounds))
    return Curve("queue loss and gradient", "keys", "ms", numbers, times)


def steps(over: str, numbers: Sequence[int], options: argparse.Namespace, fields: Callable) -> list[Curve]:
    """Time and temporaries of whole steps."""
    times, memory = [], []
    for number in numbers:
        given = {"batch": BATCH, **fields(number)}
        size = SIZES[options.size]
        size = size._replace(length=given.get("length", size.length))
        made = Updates(clipcap_case(size, "ie", batch=given["batch"], dtype="float32", dropout=0.0))
        times.append(fastest(made.run, options.rounds))
        memory.append(made.buffers["temporaries"] / 2**20)
    return [
        Curve("a step", over, "ms", numbers, times),
        Curve("a step's temporaries", over, "MiB", numbers, memory),
    ]


def over_devices(numbers: Sequence[int], preset: str) -> list[Curve]:
    """Each device's memory and what it sends a step, data parallel, compiled for devices that are not here."""
    jax.config.update("jax_num_cpu_devices", max(numbers))
    config = from_config_dict(importlib.import_module(f"configs.{preset}").get_config())
    each, fixed, sent = [], [], []
    for number in numbers:
        one = compiled_for(config, number, EACH * number)
        each.append(one.memory.peak / 2**30)
        sent.append(max(sum(one.sent.values()), 1.0) / 2**20)
        fixed.append(compiled_for(config, number, ALL).memory.peak / 2**30)
    return [
        Curve(f"a device's memory, {EACH} rows each", "devices", "GiB", numbers, each),
        Curve(f"a device's memory, {ALL} rows in all", "devices", "GiB", numbers, fixed),
        Curve("sent by a device in a step", "devices", "MiB", numbers[1:], sent[1:]),
    ]


def compiled_for(config: Config, devices: int, batch: int) -> plan.StagePlan:
    """The plan of the last stage of the config's last arm, whose stages all take this batch."""
    arm = config.arms[-1]
    last = config.arm[arm].sequence[-1]
    stages = {name: dataclasses.replace(stage, batch=batch) for name, stage in config.stages.items()}
    config = dataclasses.replace(config, stages=stages, mesh=(devices, 1, 1))
    [found], _ = plan.plan(config, target(f"cpu:{devices}"), arms=(arm,), only=(last,))
    return found


def table(curve: Curve) -> str:
    """In Markdown, the slope to the value before in brackets."""
    shown = [f"{curve.y[0]:.3g}", *(f"{y:.3g} ({s:.2f})" for y, s in zip(curve.y[1:], curve.slopes, strict=True))]
    heads = [f"{curve.title}, {curve.unit}", *(f"{x:,}" for x in curve.x)]
    rows = [heads, ["---"] * len(heads), [curve.over, *shown]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def short(value: float) -> str:
    """A number on an axis.

    >>> short(30), short(316_228), short(10_000_000)
    ('30', '316k', '10M')
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def drawn(curves: Sequence[Curve]) -> str:
    """A panel each, both axes logarithmic; the dashed line is linear growth from the first value."""
    across = 3
    with text_style("growth", 8.5):
        figure = Figure(figsize=(9.6, 2.3 * math.ceil(len(curves) / across)), layout="constrained")
        for place, curve in enumerate(curves):
            axes = figure.add_subplot(math.ceil(len(curves) / across), across, place + 1)
            axes.plot(curve.x, curve.y, color=LINES[0], marker="o", markersize=3)
            linear = [curve.y[0] * x / curve.x[0] for x in curve.x]
            axes.plot(curve.x, linear, color=INK, linewidth=0.7, linestyle="--")
            axes.set(xscale="log", yscale="log", title=curve.title, ylabel=curve.unit, xlabel=curve.over)
            axes.set_ylim(min(curve.y) / 2, max(curve.y) * 2)
            axes.xaxis.set_major_locator(FixedLocator(curve.x[:: 2 if len(curve.x) > 4 else 1]))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
                axis.set_minor_locator(NullLocator())
            axes.grid(True, color=GRID, linewidth=0.6)
            axes.patch.set_alpha(0)
            axes.tick_params(which="both", colors=INK, width=0.6)
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
                text.set_color(INK)
            for spine in axes.spines.values():
                spine.set_color(INK)
        told = "; ".join(
            f"{c.title}, {c.unit}: {c.y[0]:.3g} at {c.x[0]:,} {c.over}, {c.y[-1]:.3g} at {c.x[-1]:,}" for c in curves
        )
        return inline_svg(figure, "growth", told)


if __name__ == "__main__":
    main()

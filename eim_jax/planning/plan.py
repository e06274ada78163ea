"""What every stage of a run would cost on hardware that need not be here: memory, arithmetic, traffic, time.

Each stage's own step (training.assembly) is compiled for the topology from shapes alone: no weight is allocated, no
data read. Memory and collectives come from the compiled program, FLOPs from the traced one. Times are what the
published peak rates would allow at best, the larger of arithmetic, memory traffic and collectives, and what can be
expected of them (expected.py).
"""

import functools
import math
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eim_jax.config import Config, ConfigError, Stage
from eim_jax.data import loader
from eim_jax.losses.table import queues_of
from eim_jax.models.language import family_of
from eim_jax.models.products import compiling_for
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import make_mesh, param_shardings, parts_of
from eim_jax.planning import gpus
from eim_jax.planning.collectives import KINDS, moved
from eim_jax.planning.expected import expected_seconds, lower_bounds
from eim_jax.planning.shapes import abstract_inputs, batch_shapes, queue_encoder, queue_shapes, replicated
from eim_jax.planning.targets import Target
from eim_jax.training import partition
from eim_jax.training.arm import plan_arm, resolved
from eim_jax.training.arm_model import model, shapes
from eim_jax.training.assembly import assemble
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console
from eim_jax.utils.flops import work

USABLE = 0.96  # of a chip's memory; libtpu itself allows 15.75 of a v5e's 16 GiB and 30.75 of a v4's 32


class Memory(NamedTuple):
    """Bytes on each device while the stage trains.

    `kept`: what lies beside the step, the trained leaves as the stage found them and the towers' as they were loaded.
    `temporaries`: activations, gradients, gathered leaves, and the program itself.
    """

    trained: int
    frozen: int
    optimizer: int
    batch: int
    queue: int
    kept: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self)


class Build(NamedTuple):
    """What building one of a stage's queues takes, on each device: its encoder at the longest texts.

    `peak` is all that is there then: the towers, the stage's leaves and queues, and the encoder's temporaries.
    """

    queue: str
    rows: int  # that a device encodes at a time
    temporaries: int
    peak: int
    fits: bool


class StagePlan(NamedTuple):
    """One stage's costs; `sent` is bytes a device sends a step, by kind of collective.

    `seconds` are lower bounds; `expected` is what a step can be expected to take.
    """

    arm: str
    stage: str
    memory: Memory
    capacity: int
    fits: bool
    knob: str
    flops: float
    sent: dict[str, float]
    seconds: dict[str, float]  # compute, memory, links
    expected: float
    steps_per_epoch: int
    steps: int
    notes: tuple[str, ...]
    builds: tuple[Build, ...] = ()

    @property
    def step_seconds(self) -> float:
        """The slowest of the three."""
        return max(self.seconds.values())

    @property
    def epoch_seconds(self) -> float:
        """A step's time as often as an epoch has steps."""
        return self.step_seconds * self.steps_per_epoch


class Program(NamedTuple):
    """A stage's jitted step and the shapes of its arguments, with shardings; `kept` lies beside them."""

    step: object
    arguments: tuple
    kept: Flat


def plan(config: Config, target: Target, *, samples: int = 0, arms=(), only=()) -> tuple[list[StagePlan], list[str]]:
    """Plans the stages of the config's arms (`arms`, `only`: of these alone) on the target; also notes on sources.

    Raises ConfigError, PartitionError or ValueError as training would.
    """
    mesh = make_mesh(config.mesh, target.devices)
    inputs, notes = abstract_inputs(config, mesh, samples, platform=target.platform)
    if config.data.pack != "off":
        notes.append("compiled with each sample in a row of its own; packed (config.data.pack) they take fewer slots")
    known = {stage for name in arms or config.arms for stage in config.arm[name].sequence}
    if unknown := [stage for stage in only if stage not in known]:
        raise ConfigError(f"--stages={','.join(unknown)}: the planned arms have {', '.join(sorted(known))}")
    plans, encoders = [], {}
    for name in arms or config.arms:
        arm = config.arm[name]
        vlm = model(inputs, arm)
        params = placed(shapes(inputs, arm, vlm), mesh)
        before: set[str] = set()
        for info in plan_arm(inputs, name):
            stage = resolved(config.stages[info.name], inputs)
            if not only or info.name in only:
                program = stage_program(inputs, vlm, stage, params, info.steps, before)
                found = _stage_plan(inputs, target, name, info.name, stage, program, info.steps)
                plans.append(_with_builds(found, inputs, vlm, stage, target, encoders))
            before |= {path for group in partition.groups(stage, params) for path in group.paths}
    return plans, notes


def placed(flat: Flat, mesh) -> Flat:
    """The shapes with their shardings."""
    where = param_shardings(flat, mesh)
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[path]) for path, x in flat.items()}


def stage_program(inputs: Inputs, vlm: VLM, stage: Stage, params: Flat, steps: int, before=frozenset()) -> Program:
    """The step that training would compile, and its arguments' shapes; `before`: paths that earlier stages trained."""
    mesh = inputs.mesh
    queue_of = functools.partial(queue_shapes, inputs, vlm)
    made = assemble(vlm, stage, inputs.config.losses, params, steps, queue_of, mesh)
    key = replicated(jax.eval_shape(lambda: jax.random.key(0, impl="rbg")), mesh)
    number = replicated(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    batch = batch_shapes(inputs, vlm, stage, params)
    # run_arm holds the parameters as the stage found them, and Inputs the towers as they were loaded.
    kept = {f"found/{path}": leaf for path, leaf in made.trained.items()}
    kept |= {f"towers/{path}": params[path] for path in before if path in inputs.towers}
    return Program(made.step, (made.trained, made.opt_state, made.frozen, batch, made.queues, key, number), kept)


def local_bytes(tree) -> int:
    """Bytes that each device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _stage_plan(
    inputs: Inputs, target: Target, arm: str, name: str, stage: Stage, program: Program, steps: int
) -> StagePlan:
    trained, state, frozen, batch, queues, _, _ = program.arguments
    held = [local_bytes(part) for part in (trained, frozen, state, batch, queues, program.kept)]
    console.print(f"compiling {arm} {name} for {target.name}", soft_wrap=True)
    with compiling_for(target.platform):
        traced = program.step.trace(*program.arguments)
    done, devices, notes = work(traced.jaxpr), len(target.devices), []
    capacity = int(USABLE * target.chip.memory)
    sent = dict.fromkeys(KINDS, 0.0)
    try:
        compiled, text = _compile(traced.lower(), target)
    except Exception as error:  # the TPU compiler refuses a program that exceeds the memory
        used = out_of_memory(str(error))
        if used is None:
            raise
        temporaries = max(0, used - sum(held[:5]))
        notes.append("the compiler refuses it: temporaries are at least this, collectives are not known")
        known = False
    else:
        found = moved(text, devices)
        sent = {kind: found.total(kind) for kind in KINDS}
        if found.counted_once:
            notes.append(f"{found.counted_once} loop(s) of unknown length: a loop body counted once")
        temporaries = _temporaries(compiled, sum(held[:5]))
        known = True
    if done.unknown:
        notes.append(f"{done.unknown} loop(s) whose arithmetic is counted once")
    memory = Memory(*held, temporaries)
    state = {"trained": memory.trained, "optimizer": memory.optimizer}
    seconds = lower_bounds(done, target.chip, devices, sent=sent, **state)
    fits = known and memory.peak <= capacity
    return StagePlan(
        arm,
        name,
        memory,
        capacity,
        fits,
        "" if fits else knob(inputs, name, stage, memory),
        done.flops,
        sent,
        seconds,
        expected_seconds(seconds, target.platform),
        loader.steps_per_epoch(inputs.train, stage.batch),
        steps,
        tuple(notes),
    )


def _with_builds(
    plan: StagePlan, inputs: Inputs, vlm: VLM, stage: Stage, target: Target, encoders: dict[str, tuple[int, int, bool]]
) -> StagePlan:
    """The stage's plan with what building its queues takes; `encoders` keeps those that are compiled."""
    builds, notes = [], [*plan.notes]
    towers = placed(inputs.towers, inputs.mesh)
    # The optimizer's state and the first batch come after the queues.
    beside = plan.memory.peak - plan.memory.temporaries - plan.memory.optimizer - plan.memory.batch
    for kind in queues_of(stage):
        if kind.name not in encoders:
            console.print(f"compiling the encoder of {kind.symbol} for {target.name}", soft_wrap=True)
            step, arguments = queue_encoder(inputs, vlm, kind, towers)
            with compiling_for(target.platform):
                encoders[kind.name] = (arguments[3].shape[1], *_encoder_temporaries(step, arguments, target))
        rows, temporaries, known = encoders[kind.name]
        peak = beside + temporaries
        builds.append(Build(kind.symbol, rows, temporaries, peak, known and peak <= plan.capacity))
        if not builds[-1].fits:
            notes.append(f"building {kind.symbol}, {rows} rows at a time on each device, takes {peak / 2**30:.2f} GiB")
    fits = plan.fits and all(build.fits for build in builds)
    advice = plan.knob or (
        "" if fits else "more devices, a smaller --config.data.max_tokens, or chips with more memory"
    )
    return plan._replace(builds=tuple(builds), notes=tuple(notes), fits=fits, knob=advice)


def _encoder_temporaries(step, arguments: tuple, target: Target) -> tuple[int, bool]:
    """What encoding takes besides the towers, keys and texts, and whether the compiler takes it at all."""
    held = local_bytes(arguments)
    try:
        return _temporaries(step.lower(*arguments).compile(compiler_options=_options(target)), held), True
    except Exception as error:  # as of a stage's step
        used = out_of_memory(str(error))
        if used is None:
            raise
        return max(0, used - held), False


def _compile(lowered, target: Target):
    """The compiled program and its text.

    For TPUs the text is what the compiler itself writes to a file: libtpu 0.0.51's programs with asynchronous updates
    (v5p, v6e) cannot be read back by JAX's as_text.
    """
    if target.platform != "tpu" or not target.exact:  # without libtpu the CPU's compiler stands in
        compiled = lowered.compile(compiler_options=_options(target))
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        [file] = Path(folder).glob("*.jit_step.*.after_optimizations.txt")  # others are parts for SparseCores
        return compiled, file.read_text()


def _options(target: Target) -> dict | None:
    """The compiler's options for GPUs that are not here."""
    elsewhere = target.platform == "cuda" and target.exact and target.name.startswith("gpu:")
    return gpus.OPTIONS if elsewhere else None


def _temporaries(compiled, arguments: int) -> int:
    """What the program needs besides its arguments, their padding and the program itself included."""
    analysis = compiled.memory_analysis()
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    padding = max(0, analysis.argument_size_in_bytes - arguments)
    return int(analysis.temp_size_in_bytes + max(0, fresh) + padding + analysis.generated_code_size_in_bytes)


def out_of_memory(message: str) -> int | None:
    """The bytes that a program would hold on a chip, from the TPU compiler's refusal; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    # libtpu calls arguments, results and temporaries together "HLO temporaries".
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message) or re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def knob(inputs: Inputs, name: str, stage: Stage, memory: Memory) -> str:
    """The first setting to change when a stage does not fit, by what takes most of the memory."""
    config, mesh = inputs.config, inputs.mesh
    shares = {
        "temporaries": memory.temporaries,
        "frozen": memory.frozen,
        "state": memory.trained + memory.optimizer + memory.kept,
        "queue": memory.queue,
    }
    most = max(shares, key=shares.get)
    rows = parts_of(mesh)
    if most == "temporaries":
        if config.towers.remat != "full":
            return "--config.towers.remat=full"
        for parts in range(stage.accumulate + 1, stage.batch // rows + 1):
            if stage.batch % parts == 0 and stage.batch // parts % rows == 0:
                return f"--config.stages.{name}.accumulate={parts}"
        return "more devices, or a smaller --config.data.max_tokens"
    if most == "queue" and config.losses.queue_dtype != "int8":
        return "--config.losses.queue_dtype=int8"
    if most in ("frozen", "state") and mesh.shape["data"] > 1:
        return '--config.mesh="(1,-1,1)": parameters are split over all devices'
    if most == "frozen" and family_of(inputs.lm.config).quantised and config.towers.quant == "none":
        return "--config.towers.quant=nf4"
    return "more devices, or chips with more memory"

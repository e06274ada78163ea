"""Training in segmented stages: one stage, and the sequence of an arm.

A stage starts from what the previous stage left, with a new optimizer, and holds only the queues its losses read.
"""

import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.config import ConfigError, Stage
from eim_jax.data import loader
from eim_jax.losses import objectives
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.parallel.sharding import batch_sharding, param_shardings, parts_of
from eim_jax.parallel.signals import Interrupted, Signals
from eim_jax.training import partition
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.log import RunLog, StageInfo, Trained
from eim_jax.training.monitor import Meter, check_finite
from eim_jax.training.partition import Flat
from eim_jax.training.profile import Profile
from eim_jax.training.setup import Inputs, model, shapes, stage_features, start
from eim_jax.training.step import jit_step
from eim_jax.utils.console import console
from eim_jax.utils.files import write_json


def run_arm(inputs: Inputs, name: str) -> tuple[VLM, Flat]:
    """Trains one arm through its sequence of stages, resuming where an earlier run stopped; writes its run.json."""
    config, directory = inputs.config, inputs.workdir / name
    arm = config.arm[name]
    plan = plan_arm(inputs, name)
    vlm, params = start(inputs, arm)
    checkpoints = [directory / "checkpoints" / f"{i}-{s}" for i, s in enumerate(arm.sequence)]
    summaries = []
    resume = _resume_point(checkpoints)
    with RunLog.open(directory, plan, resume, enabled=processes.is_first()) as log, Signals() as signals:
        for i, (stage_name, folder) in enumerate(zip(arm.sequence, checkpoints, strict=True)):
            stage = config.stages[stage_name]
            with StageCheckpoints(folder) as store:
                if store.finished:
                    trained, _ = partition.split(params, partition.groups(stage, params))
                    trained, summary = store.result(trained)
                    store.drop_steps()
                    params = {**params, **trained}
                    console.print(f"{name} {stage_name}: already trained, its result is restored", soft_wrap=True)
                else:
                    params, summary = _run_stage(inputs, vlm, i, plan[i], params, store, log, signals)
            summaries.append(summary)
            if processes.is_first():
                total = sum(int(leaf.size) for leaf in params.values())
                record = {"arm": name, "description": arm.description, "total_params": total, "stages": summaries}
                write_json(directory / "run.json", record)
    return vlm, params


def plan_arm(inputs: Inputs, name: str) -> list[StageInfo]:
    """What an arm's stages will do, checked before any of them runs: patterns, steps, schedule, batch against devices.

    Allocates nothing. Raises PartitionError, ConfigError or ValueError naming the stage's field.
    """
    config = inputs.config
    arm = config.arm[name]
    params = shapes(inputs, arm, model(inputs, arm))
    plan = []
    for stage_name in arm.sequence:
        stage, where = resolved(config.stages[stage_name], inputs), f"config.stages.{stage_name}"
        rows = parts_of(inputs.mesh)
        if stage.batch // stage.accumulate % rows:
            raise ConfigError(
                f"{where}: a batch of {stage.batch} in {stage.accumulate} parts does not divide over {rows} devices"
            )
        blind = [name for name in ("ie", "st") if name in objectives.weights(stage)]
        if blind and not len(inputs.train.images):
            raise ConfigError(f"{where}: no training sample has an image, so loss_{blind[0].upper()} has no rows")
        info = stage_info(inputs, stage, stage_name, params)
        try:
            partition.learning_rate(stage, info.steps)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        plan.append(info)
    return plan


def resolved(stage: Stage, inputs: Inputs) -> Stage:
    """The stage with its warm-up in steps."""
    if not stage.warmup_epochs:
        return stage
    return replace(stage, warmup_steps=round(stage.warmup_epochs * loader.steps_per_epoch(inputs.train, stage.batch)))


def stage_info(inputs: Inputs, stage: Stage, name: str, params: Flat | dict[str, jax.ShapeDtypeStruct]) -> StageInfo:
    """What the stage trains and for how many steps."""
    found = partition.groups(stage, params)
    trained = tuple(Trained(g.pattern, len(g.paths), sum(int(params[p].size) for p in g.paths)) for g in found)
    per_epoch = loader.steps_per_epoch(inputs.train, stage.batch)
    steps = stage.steps or stage.epochs * per_epoch
    return StageInfo(
        name=name,
        losses=objectives.weights(stage),
        trained=trained,
        total_params=sum(int(leaf.size) for leaf in params.values()),
        steps=steps,
        epochs=round(steps / per_epoch, 3),
        batch=stage.batch,
    )


def place_batch(batch: Batch, mesh) -> Batch:
    """The process's rows of a batch as global arrays, rows over the mesh's data axes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def _run_stage(
    inputs: Inputs,
    vlm: VLM,
    index: int,
    info: StageInfo,
    params: Flat,
    store: StageCheckpoints,
    log: RunLog,
    signals: "Signals",
) -> tuple[Flat, dict]:
    prepared = time.monotonic()
    config, mesh = inputs.config, inputs.mesh
    stage = resolved(config.stages[info.name], inputs)
    found = partition.groups(stage, params)
    trained, frozen = partition.split(params, found)
    # A stage donates its trained leaves' buffers; the copies keep `params` whole for whoever still holds it.
    trained = jax.tree.map(jnp.copy, trained)
    proof = partition.digest(frozen)
    log.start_stage(index)

    needed = objectives.fields(stage, config.losses)
    features = stage_features(inputs, vlm, stage, params) if "image" in needed else None
    if features is not None:
        needed = (needed - {"image"}) | {"features"}
    queues = {kind: inputs.queue(vlm, kind) for kind in objectives.queue_kinds(stage)}

    tx = partition.optimizer(stage, found, params, info.steps)
    leaves = {**trained, **frozen}
    where = state_shardings(jax.eval_shape(tx.init, leaves), params, mesh)
    opt_state = jax.jit(tx.init, out_shardings=where)(leaves)
    key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), index)
    part, parts = processes.data_part(mesh)
    iterator = loader.batches(
        inputs.train,
        inputs.encoded,
        fields=needed,
        batch_size=stage.batch,
        seed=config.seed * 1000 + index,
        epochs=-(-info.steps // (len(inputs.train) // stage.batch)),
        features=features,
        image_size=vlm.visual.config.image_size,
        fit=config.data.fit,
        process_index=part,
        process_count=parts,
        threads=config.data.threads,
        buckets=config.data.buckets,
        window=config.data.length_window,
        place=lambda batch: place_batch(batch, mesh),
    )
    done, seconds = 0, 0.0
    if store.latest_step() is not None:
        done, trained, opt_state, record = store.restore(trained, opt_state, iterator)
        seconds = record["seconds"]
        console.print(f"resuming {info.name} after step {done} of {info.steps}", soft_wrap=True)

    step = jit_step(vlm, stage, config.losses, tx, mesh, (trained, opt_state))
    programs = {}  # one for each width of texts
    meter = Meter(info, inputs.train)
    rates = {group.name: group.factor for group in found}
    schedule = partition.learning_rate(stage, info.steps)
    prepare_seconds = time.monotonic() - prepared
    begun = time.monotonic()

    def save(number):
        meter.check()
        check_finite(trained, info.name, number)
        store.save(number, trained, opt_state, iterator, {"seconds": seconds + time.monotonic() - begun})

    signals.stepping = True
    traces = inputs.workdir / log.arm / "profile" / f"{index}-{info.name}"
    # Closed, so that its threads end with the stage, also where that ends early.
    with closing(iterator), Profile(config.profile, traces) as profile:
        for number in range(done, info.steps):
            profile.before(number)
            with meter.waiting():
                batch, placed = next(iterator)
            meter.rows(number, batch)
            arguments = (trained, opt_state, frozen, placed, queues, key, jnp.int32(number))
            width = 0 if batch.tokens is None else batch.tokens.shape[1]
            if width not in programs:  # compiled ahead of time: another shape is an error, not a silent compilation
                with meter.compiling():
                    programs[width] = _compile(info.name, step, arguments, width, len(programs), config.data.buckets)
            with meter.stepping(), jax.profiler.StepTraceAnnotation("train", step_num=number):
                trained, opt_state, metrics = programs[width](*arguments)
            profile.after(number, metrics)
            meter.add(metrics)
            reached, last = number + 1, number + 1 == info.steps
            if reached % config.log_every == 0 or last:
                means = meter.read()
                lr = {f"lr/{name}": factor * float(schedule(number)) for name, factor in rates.items()}
                place = {"stage": info.name, "stage_index": index, "step": reached}
                log.write({**place, "epoch": round(reached * stage.batch / len(inputs.train), 4), **means, **lr})
            if signals.stop() and not last:
                save(reached)
                store.wait()
                message = f"stopped after step {reached} of {info.name}, saved: the same command continues"
                raise Interrupted(message, together=True)
            if reached % config.checkpoint.every_steps == 0 and not last:
                save(reached)
    meter.check()
    check_finite(trained, info.name, info.steps)
    if partition.digest(frozen) != proof:
        raise RuntimeError(
            f"stage {info.name} changed a frozen parameter: this is a defect of eim_jax, please report it"
        )
    seconds += time.monotonic() - begun
    summary = {
        **asdict(info),
        "trained_params": info.trained_params,
        "seconds": seconds,
        "prepare_seconds": prepare_seconds,
        "examples_per_second": info.steps * stage.batch / seconds,
        "peak_memory_bytes": max(filter(None, map(_peak_memory, programs.values())), default=None),
        **meter.shares(),
        "frozen_unchanged": True,
    }
    store.finish(trained, summary)
    signals.stepping = False
    signals.check()
    return {**params, **trained}, summary


def state_shardings(opt_state: Any, params: Flat, mesh) -> Any:
    """Optimizer moments lie where their parameter lies; counters are replicated."""
    shardings = param_shardings(params, mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(where, leaf):
        path = next((k.key for k in reversed(where) if isinstance(k, jax.tree_util.DictKey) and k.key in params), None)
        return shardings[path] if path is not None and leaf.shape == params[path].shape else whole

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _compile(stage: str, step, arguments: tuple, width: int, before: int, most: int):
    """The stage's step for texts of `width` tokens, of which there are at most `most`."""
    if before == (most if width else 1):
        raise RuntimeError(
            f"stage {stage}: texts of {width} tokens are a width beyond the {before} that config.data.buckets allows: "
            "this is a defect of eim_jax, please report it"
        )
    texts = f" for texts of {width} tokens" if width and most > 1 else ""
    console.print(f"compiling {stage}{texts}", soft_wrap=True)
    return step.lower(*arguments).compile()


def _peak_memory(compiled) -> int | None:
    """Bytes that the compiled step holds on each device: arguments + temporaries + outputs not aliased."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return int(held + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)


def _resume_point(folders: list[Path]) -> tuple[int, int] | None:
    """(stage, first step that will run again) for the log; None when nothing was saved."""
    for i, folder in enumerate(folders):
        with StageCheckpoints(folder) as store:
            if not store.finished:
                step = store.latest_step()
                # Records carry the number of steps done: those up to the checkpoint stay.
                return (i, step + 1) if step is not None else ((i, 0) if i else None)
    return (len(folders), 0)

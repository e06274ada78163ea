"""An arm's sequence of stages: checked before any of them runs, then trained one after the other, or resumed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from eim_jax.config import ConfigError, Losses, Stage, as_dict
from eim_jax.config.checks import warmup_problem
from eim_jax.data import loader
from eim_jax.losses import table as losses
from eim_jax.losses.negatives import InBatch, negatives_of
from eim_jax.losses.table import losses_of, weights
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.parallel.sharding import parts_of
from eim_jax.parallel.signals import Signals, doing
from eim_jax.training import initial, low_rank, partition
from eim_jax.training.arm_model import model, shapes, start
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.context import check_context
from eim_jax.training.log import RunLog, StageInfo, Trained, read_metrics
from eim_jax.training.packing import check_packing
from eim_jax.training.partition import Flat
from eim_jax.training.scorer import Scorer
from eim_jax.training.setup import Inputs
from eim_jax.training.stage import run_stage
from eim_jax.utils.console import console
from eim_jax.utils.files import write_json


def run_arm(inputs: Inputs, name: str, scorer: Scorer | None = None, ahead: int = 0) -> tuple[VLM, Flat]:
    """Trains one arm through its sequence of stages, resuming where an earlier run stopped; writes its run.json.

    A stage starts from what the previous one left, with a new optimizer. `scorer` scores each while it trains. `ahead`
    examples of other arms follow, for the estimates of the time.
    """
    doing(f"preparing arm {name}")
    config, directory = inputs.config, inputs.workdir / name
    arm = config.arm[name]
    plan = plan_arm(inputs, name)
    vlm, params = start(inputs, arm)
    if said := low_rank.described(vlm.parts):
        console.print(f"{name}: {said}", soft_wrap=True)
    checkpoints = [directory / "checkpoints" / f"{i}-{s}" for i, s in enumerate(arm.sequence)]
    summaries = []
    resume = _resume_point(checkpoints)
    if lost := _lost(directory / "metrics.jsonl", resume):
        console.print(f"{name} {lost}", soft_wrap=True)
    to = {"trackers": config.logging, "config": as_dict(config)}
    with RunLog.open(directory, plan, resume, enabled=processes.is_first(), **to) as log, Signals() as signals:
        for i, (stage_name, folder) in enumerate(zip(arm.sequence, checkpoints, strict=True)):
            stage = resolved(config.stages[stage_name], inputs)
            with StageCheckpoints(folder) as store:
                if store.finished:
                    trained, _ = partition.split(params, partition.groups(stage, params))
                    trained, summary = store.result(trained)
                    store.drop_steps()
                    params = {**params, **trained}
                    console.print(f"{name} {stage_name}: already trained, its result is restored", soft_wrap=True)
                else:
                    after, last = ahead + examples(plan[i + 1 :]), i == len(plan) - 1
                    params, summary = run_stage(
                        inputs, vlm, stage, i, plan[i], params, store, log, signals, scorer, choose=last, ahead=after
                    )
            summaries.append(summary)
            if processes.is_first():
                total = sum(int(leaf.size) for leaf in params.values())
                record = {"arm": name, "description": arm.description, "total_params": total, "stages": summaries}
                write_json(directory / "run.json", record)
    return vlm, params


def examples(stages: Sequence[StageInfo]) -> int:
    """How many examples these stages train on, each as often as it is read."""
    return sum(stage.steps * stage.batch for stage in stages)


def plan_arm(inputs: Inputs, name: str) -> list[StageInfo]:
    """What an arm's stages will do, checked before any of them runs.

    That is patterns, steps, schedule, batch against devices, samples against losses, texts against the LM's context.
    Allocates nothing.

    Raises:
      PartitionError, ConfigError, ValueError: naming the stage's field.
    """
    config = inputs.config
    arm = config.arm[name]
    vlm = model(inputs, arm)
    params = shapes(inputs, arm, vlm)
    initial.check(inputs, arm, vlm, params)
    low_rank.check_trained(arm, name, config.stages, vlm.parts, config.init)
    losses.check_trained(name, {stage: config.stages[stage] for stage in arm.sequence}, params)
    plan = []
    for stage_name in arm.sequence:
        stage, where = resolved(config.stages[stage_name], inputs), f"config.stages.{stage_name}"
        rows = parts_of(inputs.mesh)
        if stage.batch // stage.accumulate % rows:
            raise ConfigError(
                f"{where}: a batch of {stage.batch} in {stage.accumulate} parts does not divide over {rows} devices"
            )
        blind = [loss.title for loss in losses_of(stage) if loss.needs_image]
        if blind and not len(inputs.samples.images):
            raise ConfigError(f"{where}: no training sample has an image, so {blind[0]} has no rows")
        check_contrast(stage, config.losses, len(inputs.samples), where)
        check_packing(vlm, stage, config)
        if inputs.encoded is not None:  # a plan has no texts
            check_siblings(stage, config.losses, inputs.samples.groups, where)
            check_context(vlm, stage, config.losses, params, inputs.encoded, inputs.samples, where)
        info = stage_info(inputs, stage, stage_name, params)
        per_epoch = loader.steps_per_epoch(inputs.samples, stage.batch)
        if problem := warmup_problem(config.stages[stage_name], per_epoch):
            raise ConfigError(f"{where}.{problem}")
        plan.append(info)
    return plan


def check_contrast(stage: Stage, settings: Losses, samples: int, where: str) -> None:
    """Raises ConfigError for a stage whose losses contrast keys where there is only one to contrast."""
    contrasted = [loss.title for loss in losses_of(stage) if loss.queue is not None]
    if contrasted and samples == 1:
        raise ConfigError(
            f"{where}: {contrasted[0]} contrasts a sample's key with other samples', and there is 1 training sample: "
            "give it more, or leave the loss out"
        )
    alone = [x.title for x in losses_of(stage) if x.queue is not None and negatives_of(settings, x.name) == InBatch()]
    if alone and stage.batch == 1:
        raise ConfigError(
            f"{where}.batch=1: by config.losses.negatives {alone[0]} contrasts a sample's key with those of its batch, "
            "and there are none: take a larger batch, or queue"
        )


def check_siblings(stage: Stage, settings: Losses, groups: Sequence[int] | np.ndarray, where: str) -> None:
    """Raises ConfigError for a loss that draws to a picture's other captions where no picture has two."""
    asked = [x.title for x in losses_of(stage) if x.queue is not None and settings.of("positives", x.name) == "others"]
    if asked and len(np.unique(groups)) == len(groups):
        raise ConfigError(
            f"{where}: by config.losses.positives {asked[0]} draws a sample to the other captions of its picture, but "
            "no two training samples share one: choose self"
        )


def resolved(stage: Stage, inputs: Inputs) -> Stage:
    """The stage with its warm-up in steps."""
    if not stage.warmup_epochs:
        return stage
    return replace(stage, warmup_steps=round(stage.warmup_epochs * loader.steps_per_epoch(inputs.samples, stage.batch)))


def stage_info(inputs: Inputs, stage: Stage, name: str, params: Flat | dict[str, jax.ShapeDtypeStruct]) -> StageInfo:
    """What the stage trains and for how many steps."""
    found = partition.groups(stage, params)
    trained = tuple(Trained(g.pattern, len(g.paths), sum(int(params[p].size) for p in g.paths)) for g in found)
    per_epoch = loader.steps_per_epoch(inputs.samples, stage.batch)
    steps = stage.steps or stage.epochs * per_epoch
    return StageInfo(
        name=name,
        losses=weights(stage),
        trained=trained,
        total_params=sum(int(leaf.size) for leaf in params.values()),
        steps=steps,
        epochs=round(steps / per_epoch, 3),
        batch=stage.batch,
    )


def _lost(metrics: Path, resume: tuple[int, int] | None) -> str:
    """What is said of steps that the log has and no checkpoint; "" where there are none."""
    index, first = resume or (0, 0)
    found = [row for row in read_metrics(metrics) if row.get("stage_index") == index and row.get("step", 0) >= first]
    if not found:
        return ""
    stage, last, done = found[-1]["stage"], found[-1]["step"], max(first - 1, 0)
    kept = f"goes on after step {done}, its newest checkpoint" if done else "starts again: it had no checkpoint yet"
    return (
        f"{stage} was stopped without a save after step {last} or later, and {kept} (config.checkpoint says how often "
        "one is made)"
    )


def _resume_point(folders: list[Path]) -> tuple[int, int] | None:
    """(stage, first step that will run again) for the log; None when nothing was saved."""
    for i, folder in enumerate(folders):
        with StageCheckpoints(folder) as store:
            if not store.finished:
                step = store.latest_step()
                # Records carry the number of steps done: those up to the checkpoint stay.
                return (i, step + 1) if step is not None else ((i, 0) if i else None)
    return (len(folders), 0)

"""One stage of training: assembled, run step by step, finished with the proof that frozen leaves kept their bits.

It holds only the queues that its losses read.
"""

import functools
import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eim_jax.config import Stage
from eim_jax.data import loader
from eim_jax.losses import objective
from eim_jax.losses.table import losses_of
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.parallel.chips import chip_of
from eim_jax.parallel.sharding import batch_sharding
from eim_jax.parallel.signals import Interrupted, Signals, doing, spent
from eim_jax.training import partition
from eim_jax.training.assembly import assemble
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.compiled_step import Program, compile_step, peak_memory, shape_of
from eim_jax.training.log import RunLog, StageInfo
from eim_jax.training.monitor import Meter, check_finite
from eim_jax.training.packing import stage_packer
from eim_jax.training.partition import Flat
from eim_jax.training.profile import Profile
from eim_jax.training.queue_report import queue_name, tell_queue
from eim_jax.training.scorer import Best, Scorer, is_due
from eim_jax.training.setup import Inputs
from eim_jax.training.vision_features import stage_features
from eim_jax.utils.console import console, duration


def run_stage(
    inputs: Inputs,
    vlm: VLM,
    stage: Stage,
    index: int,
    info: StageInfo,
    params: Flat,
    store: StageCheckpoints,
    log: RunLog,
    signals: Signals,
    scorer: Scorer | None = None,
    choose: bool = False,
    ahead: int = 0,
) -> tuple[Flat, dict]:
    """Trains the stage from where `store` holds it, or from its start.

    Args:
      inputs: what all arms share.
      vlm: the arm's modules.
      stage: its settings, the warm-up in steps.
      index: its place in the arm's sequence; decides its random numbers.
      info: its steps, as `arm.plan_arm` found them.
      params: all leaves as the stage before left them; they stay whole for whoever still holds them.
      store: its checkpoints.
      log: the arm's.
      signals: that may stop it.
      scorer: scores it while it trains, as config.eval says; None: nothing does.
      choose: whether config.checkpoint.keep decides which of its steps is left.
      ahead: examples that the run trains on after it, for its estimate of the time.

    Returns:
      All leaves after the stage, and its summary for run.json.

    Raises:
      Interrupted: a signal asked to stop; the state is saved.
      NonFinite: a loss or a parameter is not a number.
    """
    run = _StageRun(inputs, vlm, stage, index, info, params, store, log, scorer, choose, ahead)
    run.restore()
    run.loop(signals)
    signals.stepping = True
    trained, summary = run.finish()
    store.finish(trained, summary)
    signals.stepping = False
    signals.check()
    return {**params, **trained}, summary


WARM, MEASURED = 2, 5  # steps that are slower than those to come, and steps by which a stage says how long it will take


class _StageRun:
    """A stage under way: its state (`trained`, `opt_state`, `done`), its batches, its compiled programs."""

    def __init__(
        self,
        inputs: Inputs,
        vlm: VLM,
        stage: Stage,
        index: int,
        info: StageInfo,
        params: Flat,
        store: StageCheckpoints,
        log: RunLog,
        scorer: Scorer | None,
        choose: bool,
        ahead: int,
    ):
        self._prepared = time.monotonic()
        doing(f"preparing {info.name}")
        self.vlm, self.scorer, self.ahead, settings = vlm, scorer, ahead, inputs.config.checkpoint
        self.best = None
        if scorer is not None and choose and settings.keep == "best":
            self.best = Best(settings.metric, scorer.sense(settings.metric))
        self.inputs, self.stage, self.index, self.info, self.store, self.log = inputs, stage, index, info, store, log
        config = inputs.config
        trained, frozen = partition.split(params, partition.groups(stage, params))
        # A stage donates its trained leaves' buffers; the copies keep `params` whole for whoever still holds it.
        params = {**jax.tree.map(jnp.copy, trained), **frozen}
        self._proof = partition.digest(frozen)
        log.start_stage(index)
        self.iterator = _batches(inputs, vlm, stage, index, info, params)
        queue_of = functools.partial(inputs.queue, vlm)
        made = assemble(vlm, stage, config.losses, params, info.steps, queue_of, inputs.mesh)
        contrasts = [loss for loss in losses_of(stage) if loss.queue is not None]
        self.queues = {
            loss.name: tell_queue(inputs, loss, made.queues[queue_name(loss)], stage.batch) for loss in contrasts
        }
        doing(f"preparing {info.name}")
        self.trained, self.opt_state = made.trained, made.init_state()
        self.made = made._replace(trained={})  # a resumed stage would hold them beside those that it restores
        self.key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), index)
        self.done, self.seconds = 0, 0.0
        self.programs: dict[tuple, Program] = {}  # one for each width of texts, or shape of packed rows
        self.told = False  # what the time before the first step went to
        self.warm = (0.0, 0)  # seconds and steps up to where the pace is measured
        self.meter = Meter(info, inputs.samples, _peak_rate(inputs))

    @property
    def _per_epoch(self) -> int:
        return loader.steps_per_epoch(self.inputs.samples, self.stage.batch)

    def restore(self) -> None:
        """Goes on after the newest checkpoint, if there is one."""
        if self.store.latest_step() is not None:
            self.done, self.trained, self.opt_state, record = self.store.restore(
                self.trained, self.opt_state, self.iterator
            )
            self.seconds = record["seconds"]
            self.meter.restore(record.get("meter"))
            if self.best is not None:
                self.best.restore(record.get("best", {}))
            console.print(f"resuming {self.info.name} after step {self.done} of {self.info.steps}", soft_wrap=True)
        self.prepare_seconds = time.monotonic() - self._prepared

    def loop(self, signals: Signals) -> None:
        """Runs the steps that remain; logs, saves, and stops early where a signal asks for it."""
        config, steps = self.inputs.config, self.info.steps
        self._begun = self._saved = time.monotonic()
        traces = self.inputs.workdir / self.log.arm / "profile" / f"{self.index}-{self.info.name}"
        # Closed, so that its threads end with the stage, also where that ends early.
        with closing(self.iterator), Profile(config.profile, traces) as profile:
            for number in range(self.done, steps):
                # Before the first step is done nothing is lost by stopping at once, also while it is compiled; several
                # processes stop together all the same.
                signals.stepping = number > self.done or jax.process_count() > 1
                profile.before(number)
                metrics, flops = self._update(number)
                profile.after(number, metrics)
                self.meter.add(metrics, flops)
                if number == 0 and self.queues:
                    self._write_start(metrics)
                self._estimate(number + 1 - self.done, steps - number - 1)
                reached, last = number + 1, number + 1 == steps
                due = self.scorer is not None and is_due(config.eval, reached, steps, self._per_epoch)
                scores = self._score(reached) if due else {}
                if reached % config.log_every == 0 or last or due:
                    self._write(number, scores)
                # Of several processes only the first has all scores, so that `due` asks, which all know.
                better = due and self.best is not None and self.best.improves(reached, scores)
                if better and not last:
                    self.store.keep_best(reached, self.trained)
                if signals.stop() and not last:
                    self._save(reached)
                    self.store.wait()
                    message = f"stopped after step {reached} of {self.info.name}, saved: the same command continues"
                    raise Interrupted(message, together=True)
                # A best step counts when a checkpoint says so: one is made with it.
                if (reached % config.checkpoint.every_steps == 0 or self._is_time() or better) and not last:
                    self._save(reached)
                    if better:
                        self.store.drop_best(but=reached)

    def finish(self) -> tuple[Flat, dict]:
        """The trained leaves and the summary; refuses numbers that are not finite and frozen leaves that changed."""
        info = self.info
        spent()  # what the steps took is no part of the next stage's start
        self.meter.check()
        check_finite(self.trained, info.name, info.steps)
        if partition.digest(self.made.frozen) != self._proof:
            raise RuntimeError(
                f"stage {info.name} changed a frozen parameter: this is a defect of eim_jax, please report it"
            )
        self.seconds += time.monotonic() - self._begun
        kept = self._kept()
        summary = {
            **asdict(info),
            "trained_params": info.trained_params,
            "seconds": self.seconds,
            "prepare_seconds": self.prepare_seconds,
            "examples_per_second": info.steps * self.stage.batch / self.seconds,
            "peak_memory_bytes": max(
                filter(None, (peak_memory(program.compiled) for program in self.programs.values())), default=None
            ),
            **self.meter.shares(),
            "frozen_unchanged": True,
            **({"kept": kept} if kept else {}),
        }
        return self.trained, summary

    def _kept(self) -> dict:
        """Puts the leaves of the best step into place, where that is what the stage leaves; {} where it is its end."""
        if self.best is None:
            return {}
        if self.best.step is None:
            said = f"no {self.best.metric} of {self.info.name} was a number, so that its end is kept"
            console.print(said, soft_wrap=True)
            return {}
        if self.best.step != self.info.steps:
            self.trained = self.store.best(self.best.step, self.trained)
        kept = self.best.state()
        said = f"{kept['metric']} {kept['value']:.4f}"
        console.print(f"{self.info.name}: kept step {kept['step']} of {self.info.steps}, {said}", soft_wrap=True)
        return kept

    def _score(self, reached: int) -> dict[str, float]:
        """Scores after a step; their time is no part of the speed."""
        assert self.scorer is not None, "is asked where scores are due"
        self.meter.check()
        with self.meter.apart():
            doing(f"scoring stage {self.info.name} after step {reached}")
            found = self.scorer(self.vlm, {**self.made.frozen, **self.trained})
            doing(f"training {self.info.name}")
        return found

    def _estimate(self, here: int, left: int) -> None:
        """After `here` steps of this process says how long the rest takes at their pace, as soon as there is one."""
        if here == WARM:
            self.warm = self.meter.so_far()
        if here != WARM + MEASURED or not left:
            return
        (begun, before), (now, done) = self.warm, self.meter.so_far()
        pace = (now - begun) / (done - before)
        told = f"{self.info.name}: {pace:.2g} s a step, about {duration(pace * left)} to this stage's end"
        if self.ahead:
            told += f", {duration(pace * (left + self.ahead / self.stage.batch))} to the run's, if an example takes as "
            told += "long in what follows"
        console.print(f"{told} (scoring and compiling not counted)", soft_wrap=True)

    def _update(self, number: int) -> tuple[dict, float]:
        """One step: its metrics, which may still be under way, and its FLOPs."""
        with self.meter.waiting():
            batch, placed = next(self.iterator)
        self.meter.rows(number, batch)
        made = self.made
        arguments = (self.trained, self.opt_state, made.frozen, placed, made.queues, self.key, jnp.int32(number))
        shape = shape_of(batch)
        if shape not in self.programs:  # compiled ahead of time: another shape is an error, not a silent compilation
            with self.meter.apart():
                buckets = self.inputs.config.data.buckets
                alike = sum(bool(other[1:]) == bool(shape[1:]) for other in self.programs)
                self.programs[shape] = compile_step(self.info.name, made.step, arguments, shape, alike, buckets)
        with self.meter.stepping(), jax.profiler.StepTraceAnnotation("train", step_num=number):
            self.trained, self.opt_state, metrics = self.programs[shape].compiled(*arguments)
        if not self.told:
            jax.block_until_ready(metrics)
            self._tell_start()
        return metrics, self.programs[shape].flops

    def _tell_start(self) -> None:
        """Says what the time before the first step went to, since the process began or since the stage before."""
        self.told, parts = True, spent()
        total = sum(seconds for _, seconds in parts)
        said = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts if seconds >= 0.05)
        console.print(f"{self.info.name}: first step after {duration(total)}: {said}", soft_wrap=True)

    def _write(self, number: int, scores: dict[str, float]) -> None:
        """Writes the means since the last record, each group's learning rate, and scores where there are any."""
        reached, stage = number + 1, self.stage
        means = self.meter.read()
        rate = float(jnp.asarray(partition.learning_rate(stage, self.info.steps)(number)))
        rates = {f"lr/{group.name}": group.factor * rate for group in self.made.groups}
        epoch = round(reached * stage.batch / len(self.inputs.samples), 4)
        place = {"stage": self.info.name, "stage_index": self.index, "step": reached, "epoch": epoch}
        self.log.write({**place, **means, **rates, **scores})

    def _write_start(self, metrics: dict) -> None:
        """Writes step 0: what the first step found before its update, and what each queue loss lies between."""
        found = {"loss": 0.0, **{name: float(value) for name, value in jax.device_get(metrics).items()}}
        for loss, figures in self.queues.items():
            found |= {f"queue/{loss}/{name}": value for name, value in figures.items()}
        place = {"stage": self.info.name, "stage_index": self.index, "step": 0, "epoch": 0.0}
        self.log.write({**place, **found}, as_step=1)  # a tracker's number before is the last stage's last step

    def _is_time(self) -> bool:
        """Whether the newest checkpoint is too old; several processes, whose clocks differ, go by steps alone."""
        minutes = self.inputs.config.checkpoint.every_minutes
        return bool(minutes) and jax.process_count() == 1 and time.monotonic() - self._saved >= 60 * minutes

    def _save(self, number: int) -> None:
        record = {"meter": self.meter.state(), "seconds": self.seconds + time.monotonic() - self._begun}
        if self.best is not None:
            record["best"] = self.best.state()
        check_finite(self.trained, self.info.name, number)
        self.store.save(number, self.trained, self.opt_state, self.iterator, record)
        self._saved = time.monotonic()


def _batches(inputs: Inputs, vlm: VLM, stage: Stage, index: int, info: StageInfo, params: Flat) -> Any:
    """The stage's batches from its start, as NumPy arrays and as placed; cached features where they serve."""
    config, mesh = inputs.config, inputs.mesh
    needed = objective.fields(stage, config.losses)
    features = stage_features(inputs, vlm, stage, params) if "image" in needed else None
    if features is not None:
        needed = (needed - {"image"}) | {"features"}
    part, parts = processes.data_part(mesh)
    drawn: dict[str, Any] = {
        "fields": needed,
        "batch_size": stage.batch,
        "seed": config.seed * 1000 + index,
        "buckets": config.data.buckets,
        "window": config.data.length_window,
    }
    packer, said = stage_packer(inputs, vlm, stage, params, drawn, info.name)
    if said:
        console.print(said, soft_wrap=True)
    return loader.batches(
        inputs.samples,
        inputs.encoded,
        **drawn,
        epochs=-(-info.steps // (len(inputs.samples) // stage.batch)),
        features=features,
        image_size=vlm.visual.config.image_size,
        fit=inputs.fit,
        process_index=part,
        process_count=parts,
        threads=config.data.threads,
        before=objective.before(stage, config.losses),
        place=lambda batch: place_batch(batch, mesh),
        packer=packer,
    )


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The process's rows of a batch as global arrays, rows over the mesh's data axes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def _peak_rate(inputs: Inputs) -> float:
    """FLOP/s of all devices together, where they have published figures and compute in bfloat16; else 0."""
    chip = chip_of(inputs.mesh.devices.flat[0].device_kind)
    return 0.0 if chip is None or inputs.dtype != jnp.bfloat16 else chip.flops * inputs.mesh.size

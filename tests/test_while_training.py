"""Scores while a stage trains: when, of what, and that no parameter knows of them; the best step, also after a stop."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from eim_jax import config as settings
from eim_jax.evaluation.metrics import metric_of
from eim_jax.evaluation.while_training import while_training
from eim_jax.parallel.signals import Interrupted, Signals
from eim_jax.training import setup
from eim_jax.training import stage as one_stage
from eim_jax.training.arm import run_arm
from eim_jax.training.log import read_metrics
from eim_jax.training.scorer import Best
from eim_jax.utils.console import console


@pytest.fixture(scope="module")
def config():
    """One stage of four steps, scored after every second one."""
    values = importlib.import_module("configs.miniature").get_config()
    values.arms, values.data.scenes, values.log_every = ("baseline",), 16, 3
    values.towers.scan = True  # less to compile
    values.decode.update({"batch": 8, "max_tokens": 4})
    values.eval.update({"every_steps": 2, "limit": 8, "train": 8})
    values.checkpoint.update({"keep": "best", "every_minutes": 0.0})
    (name,) = values.arm.baseline.sequence
    values.stages[name].update({"steps": 4, "warmup_steps": 1, "batch": 16})
    return settings.from_config_dict(values)


class Told:
    """A scorer whose scores are given: the best step is known beforehand."""

    def __init__(self, values, real=lambda vlm, params: {}):
        self.values, self.calls, self.real = list(values), [], real

    def __call__(self, vlm, params):
        found = self.real(vlm, params)
        self.calls.append({path: np.asarray(leaf) for path, leaf in params.items()})
        return {**found, "eval/nll": self.values.pop(0)}

    def sense(self, key):
        return metric_of(key.partition("/")[2]).sense


@pytest.fixture(scope="module")
def inputs(config, tmp_path_factory):
    return setup.load(config, tmp_path_factory.mktemp("run"))


def trained(inputs, workdir, scorer, **changed):
    config = dataclasses.replace(inputs.config, **changed)
    _, params = run_arm(dataclasses.replace(inputs, config=config, workdir=workdir), "baseline", scorer)
    return {path: np.asarray(leaf) for path, leaf in params.items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


def test_scores_change_no_parameter_and_the_best_step_is_kept_as_it_was_also_after_a_stop(
    inputs, tmp_path, monkeypatch, capsys
):
    programs, make = {}, one_stage.compile_step

    def once(stage, step, arguments, width, *rest):  # all runs below are of one program for each width
        if width not in programs:
            programs[width] = make(stage, step, arguments, width, *rest)
        return programs[width]

    monkeypatch.setattr(one_stage, "compile_step", once)
    # Stopped after step 3, when the best one (2) is no longer the state: what goes on knows it, and scores once more.
    told, stops = Told([1.0], while_training(inputs)), iter([False] * 2 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "stop", lambda self: next(stops))
        with pytest.raises(Interrupted, match="stopped after step 3"):
            trained(inputs, tmp_path / "run", told)
    said = capsys.readouterr().out
    assert "eval/nll" in said and "looking at" not in said and not console.quiet
    after = Told([2.0])
    best = trained(inputs, tmp_path / "run", after)
    last = settings.Checkpoint(every_minutes=0.0)
    plain = trained(inputs, tmp_path / "plain", None, checkpoint=last, eval=settings.Eval())
    assert same(plain, after.calls[0])  # whoever looks changes nothing, nor does a stop
    assert same(best, told.calls[0]) and not same(best, plain)
    rows = read_metrics(tmp_path / "run/baseline/metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4] and ["eval/nll" in row for row in rows] == [1, 0, 1]
    assert {"eval/nll", "eval/CIDEr", "eval/distinct", "eval/shape_colour_f1", "train/nll"} <= rows[0].keys()
    stage = json.loads((tmp_path / "run/baseline/run.json").read_text())["stages"][0]
    assert stage["kept"] == {"step": 2, "metric": "eval/nll", "value": 1.0}
    (folder,) = (tmp_path / "run/baseline/checkpoints").iterdir()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_score_that_cannot_choose_is_refused_before_anything_trains(inputs):
    for name in ("eval/nll_shuffled", "eval/x"):
        chosen = dataclasses.replace(inputs.config.checkpoint, metric=name)
        with pytest.raises(settings.ConfigError, match=f"'{name}'.* one side is the better; such are eval/Bleu_1"):
            while_training(dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, checkpoint=chosen)))
    # A score of another task, or of texts that are not written: known on every process, before any model is asked.
    for name, method, there in (("eval/vqa_accuracy", "greedy", "eval/CIDEr"), ("eval/CIDEr", "none", "eval/nll")):
        checkpoint = dataclasses.replace(inputs.config.checkpoint, metric=name)
        scored = dataclasses.replace(inputs.config.eval, method=method)
        changed = dataclasses.replace(inputs.config, checkpoint=checkpoint, eval=scored)
        with pytest.raises(settings.ConfigError, match=f"'{name}' is no score of this run: it has .*{there}"):
            while_training(dataclasses.replace(inputs, config=changed))
    for name in ("eval/CIDEr", "eval/shape_colour_f1", "train/Bleu_4"):
        checkpoint = dataclasses.replace(inputs.config.checkpoint, metric=name)
        config = dataclasses.replace(inputs.config, checkpoint=checkpoint)
        chosen = while_training(dataclasses.replace(inputs, config=config))
        assert chosen is not None and chosen.sense(name)
    with pytest.raises(settings.ConfigError, match="chooses among scores while training, and there are none"):
        values = settings.as_dict(inputs.config) | {"eval": {}}
        settings.from_config_dict(values)


def test_what_chooses_a_step_decides_the_numbers_and_what_only_looks_does_not(inputs):
    def deciding(**changed):
        return settings.deciding(dataclasses.replace(inputs.config, **changed), ["baseline"])

    look = {"checkpoint": settings.Checkpoint()}
    assert deciding(**look) == deciding(**look, eval=settings.Eval(every_epochs=1.0))
    assert deciding() != deciding(eval=settings.Eval(every_steps=3)) and "checkpoint.metric" in deciding()


def test_the_best_is_the_first_of_equals_by_the_metrics_own_sense_and_no_number_never_is():
    for sense, values, step in ((1, [0.2, 0.5, 0.5, 0.1], 2), (-1, [0.2, 0.5, 0.1, float("nan")], 3)):
        best = Best("eval/x", sense)
        for number, value in enumerate(values, 1):
            best.improves(number, {"eval/x": value})
        assert best.state()["step"] == step
        other = Best("eval/y", sense)
        other.restore(best.state())
        assert other.state() == {}

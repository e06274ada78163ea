"""The loop on the miniature world, on eight devices: what it leaves behind, what it refuses."""

import dataclasses
import gzip
import importlib
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from eim_jax import config as settings
from eim_jax.commands import exporting
from eim_jax.parallel.sharding import make_mesh, shard_params
from eim_jax.pretrained import load_lm
from eim_jax.training import arm_model, assembly, partition
from eim_jax.training import setup as loading
from eim_jax.training.arm import run_arm
from eim_jax.training.compiled_step import compile_step
from eim_jax.training.log import read_metrics
from eim_jax.training.monitor import NonFinite


@pytest.fixture(scope="module")
def config():
    values = importlib.import_module("configs.miniature").get_config()
    values.arms = ("eim",)
    values.data.scenes = 16
    values.log_every = 2
    for name in ("st", "lm", "ie"):
        values.stages[name].update({"steps": 4, "warmup_steps": 1, "batch": 16})
    return settings.from_config_dict(values)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """(inputs, parameters at the start, at the end, calls of each stage's objective while it trained)."""
    inputs = loading.load(config, tmp_path_factory.mktemp("run"))
    traced = []
    make = assembly.make_objective

    def counting(vlm, stage, *rest):
        inner = make(vlm, stage, *rest)
        return lambda *arguments: (traced.append(stage.train), inner(*arguments))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "make_objective", counting)
        _, end = run_arm(inputs, "eim")
    _, begin = arm_model.start(inputs, config.arm["eim"])
    return inputs, begin, end, traced


def test_each_stage_is_traced_once(finished, config):
    assert finished[3] == [config.stages[name].train for name in ("st", "lm", "ie")]


def test_the_sequence_changes_its_own_leaves_and_no_bit_of_any_other(finished, config):
    _, begin, end, _ = finished
    owned = {p for name in ("st", "lm", "ie") for g in partition.groups(config.stages[name], begin) for p in g.paths}
    for path in begin:
        same = np.array_equal(np.asarray(begin[path]).view(np.uint32), np.asarray(end[path]).view(np.uint32))
        assert same != (path in owned), path


def test_parameters_and_moments_lie_on_all_devices_by_the_rules(finished):
    _, _, end, _ = finished
    kernel = end["lm/blocks_0/attn/qkv/kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.sharding.shard_shape(kernel.shape)[0] * 8 == kernel.shape[0]


def test_an_export_holds_what_training_changed_and_a_gpt2_that_loads(finished, config, tmp_path):
    inputs, begin, end, _ = finished
    exporting.write_arm(inputs, "eim", end, tmp_path / "out")
    found = load_file(tmp_path / "out" / exporting.LEAVES)
    changed = {p for p in begin if not np.array_equal(np.asarray(begin[p]), np.asarray(end[p]))}
    assert found.keys() == changed
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, np.asarray(end[path]))
    lm = partition.flatten({"lm": load_lm(tmp_path / "out" / "lm").params})
    assert lm.keys() == {p for p in end if p.startswith("lm/")}
    for path, leaf in lm.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(end[path]))
    words = "a red circle above two blue squares."
    again = AutoTokenizer.from_pretrained(tmp_path / "out" / "lm")
    assert again(words)["input_ids"] == inputs.lm_tokenizer(words)["input_ids"]
    assert json.loads((tmp_path / "out" / exporting.RECORD).read_text())["towers"]["lm"] == "miniature/gpt2"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    exporting.write_arm(inputs, "eim", end, tmp_path / "out")  # as after a kill behind the last rename: it is there
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before
    changed = {path: leaf + 1 if path.startswith("st/") else leaf for path, leaf in end.items()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for params, place in ((changed, "out"), (end, "mine")):
        with pytest.raises(settings.ConfigError, match="holds other files"):
            exporting.write_arm(inputs, "eim", params, tmp_path / place)


def test_the_arms_record_tells_what_each_stage_did(finished, config):
    inputs = finished[0]
    record = json.loads((inputs.workdir / "eim" / "run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["st", "lm", "ie"]
    for stage in record["stages"]:
        assert stage["steps"] == 4 and stage["frozen_unchanged"] and stage["peak_memory_bytes"] > 0
        assert 0 < stage["trained_params"] < stage["total_params"] == record["total_params"]
    lines = read_metrics(inputs.workdir / "eim" / "metrics.jsonl")
    assert [(line["stage"], line["step"]) for line in lines] == [(s, n) for s in ("st", "lm", "ie") for n in (0, 2, 4)]
    for line in lines[::3]:  # before the first step: what the queue losses lie between
        name = line["stage"]
        assert 0 <= line[f"queue/{name}/recall1"] <= 1 and 0 < line[f"queue/{name}/mean_norm"] < 1
        assert 0 < line[f"queue/{name}/floor"] < line[f"queue/{name}/chance"]
        assert line[f"queue/{name}/chance"] == pytest.approx(np.log(len(inputs.train)))
    assert {"loss/base", "loss/ie", "queue/ie/recall1", "queue/ie/effective", "lr/visual/prompt"} <= lines[-1].keys()


def test_texts_are_cut_to_the_configured_number_of_widths_and_steps_are_traced_by_a_profile(config, tmp_path, capsys):
    cut = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, buckets=2, length_window=2),
        arm={"eim": dataclasses.replace(config.arm["eim"], sequence=("lm",))},
        stages={"lm": dataclasses.replace(config.stages["lm"], steps=10)},
        losses=settings.Losses(center="lm:mean", positives="lm:others", queue_dtype="int8"),
        profile="7:9",
        log_every=5,
    )
    inputs = loading.load(cut, tmp_path)
    run_arm(inputs, "eim")
    said = capsys.readouterr().out
    [told] = [line for line in said.splitlines() if "first step after" in line]  # of one stage, however many widths
    assert told.startswith("lm: first step after ") and ", compiling lm " in told
    assert said.count("compiled lm for texts of") == said.count("compiling lm for texts of")
    widths = {
        int(line.split("texts of ")[1].split()[0]) for line in said.splitlines() if line.startswith("compiling lm")
    }
    assert len(widths) == 2 and max(widths) <= inputs.encoded.tokens.shape[1]
    lines = read_metrics(tmp_path / "eim" / "metrics.jsonl")
    (summary,) = json.loads((tmp_path / "eim" / "run.json").read_text())["stages"]
    for record in (*lines[1:], summary):
        shares = [record[kind] for kind in ("data_wait", "host", "device")]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        real, longest = inputs.encoded.valid.sum(1).mean(), inputs.encoded.tokens.shape[1]
        assert 0 <= record["padding"] < 1 - real / longest  # less than without cutting
    manifest = json.loads((tmp_path / "queues" / "hidden" / "manifest.json").read_text())
    assert manifest["center"] == "mean" and re.search(r"after centring \(.* loss_LM where the query is its own", said)
    assert lines[0]["queue/lm/recall1"] == 1.0 and lines[0]["queue/lm/mean_norm"] < 0.5  # the query is the own key
    assert f"trace in {tmp_path}" in said.replace("\n", "")
    (trace,) = (tmp_path / "eim" / "profile" / "0-lm").rglob("perfetto_trace.json.gz")
    marks = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "train" in marks
    assert list(trace.parent.glob("*.xplane.pb"))


def test_a_packed_stage_has_the_losses_of_one_that_is_not_and_says_what_it_saves(config, tmp_path, capsys):
    found, padding = [], []
    for pack in ("off", "on"):
        run = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, pack=pack),
            towers=dataclasses.replace(config.towers, dropout=0.0),
            arm={"eim": dataclasses.replace(config.arm["eim"], sequence=("lm",))},
            stages={"lm": dataclasses.replace(config.stages["lm"], steps=4, batch=32)},
        )
        run_arm(loading.load(run, tmp_path / pack), "eim")
        lines = read_metrics(tmp_path / pack / "eim" / "metrics.jsonl")
        found.append([line["loss/lm"] for line in lines])
        padding.append(lines[-1]["padding"])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and padding[1] < padding[0]
    said = capsys.readouterr().out
    assert re.search(r"lm: samples share rows: 4 in \d+ rows of .*; \d+% of the text is padding .* work\n", said)
    assert re.search(r"compiled lm for packed texts \(text \d+ x \d+ slots\)", said)


def test_a_width_beyond_the_configured_number_is_an_error(config):
    with pytest.raises(RuntimeError, match="stage lm: texts of 9 tokens are a width beyond the 2 that"):
        compile_step("lm", None, (), (9,), 2, 2)
    with pytest.raises(RuntimeError, match="a defect of eim_jax"):
        compile_step("st", None, (), (0,), 1, 4)  # without texts there is one


def test_a_second_start_restores_the_results_without_training(finished, monkeypatch):
    inputs, _, end, _ = finished
    monkeypatch.setattr("eim_jax.training.arm.run_stage", None)  # training again would fail
    _, again = run_arm(inputs, "eim")
    assert all(np.array_equal(end[path], again[path]) for path in end)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        # Which term overflows first, a loss or only its gradient, is a matter of rounding.
        ("ie", r"stage ie, step \d: .*(loss/base|grad_norm) = .*Samples of this batch: .*train-0-"),
        ("st", r"stage st, step \d.*not finite|stage st, step \d: "),
    ],
)
def test_a_run_that_diverges_stops_naming_term_step_and_samples_and_saves_nothing(
    finished, config, tmp_path, stage, message
):
    wild = dataclasses.replace(config.stages[stage], lr=1e38, schedule="constant")
    arm = dataclasses.replace(config.arm["eim"], sequence=(stage,), prompts=0 if stage == "st" else 4)
    changed = dataclasses.replace(config, stages={stage: wild}, arm={"eim": arm})
    inputs = dataclasses.replace(finished[0], config=changed, workdir=tmp_path)
    with pytest.raises(NonFinite, match=message):
        run_arm(inputs, "eim")
    assert not (tmp_path / "eim" / "checkpoints" / f"0-{stage}" / "result").exists()


@pytest.mark.exhaustive  # test_mesh_numbers compares a mesh of all axes with one device
def test_one_device_gives_the_eight_devices_losses(finished, config, tmp_path):
    """Sharding changes where numbers lie, not what they are."""
    inputs = finished[0]
    mesh = make_mesh((1, 1, 1), devices=jax.devices()[:1])
    alone = dataclasses.replace(inputs, mesh=mesh, workdir=tmp_path, towers=shard_params(inputs.towers, mesh))
    run_arm(alone, "eim")
    eight, one = (read_metrics(folder / "eim" / "metrics.jsonl") for folder in (inputs.workdir, tmp_path))
    assert [line["loss"] for line in eight] == pytest.approx([line["loss"] for line in one], rel=2e-4)

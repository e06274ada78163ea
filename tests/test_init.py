"""config.init: an arm that was exported is trained further, captioned by and scored without its work directory."""

import dataclasses
import json
import sys

import mains
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import config_of

from eim_jax import config as settings
from eim_jax.commands import caption, evaluate
from eim_jax.commands.exporting import LEAVES, RECORD, export, write_arm
from eim_jax.commands.trained_arms import check_identity, check_trainable, check_untrained
from eim_jax.config import ConfigError
from eim_jax.data.datasets import load_split
from eim_jax.models import vision
from eim_jax.pretrained import WeightsError, torch_files
from eim_jax.training import arm_model, setup
from eim_jax.training.arm import run_arm
from eim_jax.utils.files import read_json, write_json


def small(**changes):
    fields = {"arms": ("baseline",), "data.scenes": 16, "data.eval_limit": 4}
    fields |= {"decode.methods": ("greedy",), "decode.max_tokens": 6, "decode.java": False}
    stage = {"steps": 2, "warmup_steps": 1, "batch": 16}
    return config_of("miniature", **fields, **{f"stages.base.{k}": v for k, v in stage.items()}, **changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(inputs of a run of two steps, its parameters, its exported arm)."""
    workdir = tmp_path_factory.mktemp("run")
    config = small()
    inputs = setup.load(config, workdir)
    write_json(workdir / "run.json", {"config": settings.as_dict(config), "identity": inputs.identity()})
    _, params = run_arm(inputs, "baseline")
    write_arm(inputs, "baseline", params, workdir / "out")
    return inputs, params, workdir / "out"


def starting(inputs, file, **towers):
    """The inputs of a run that starts from a checkpoint."""
    config = dataclasses.replace(inputs.config, init=str(file))
    if towers:
        config = dataclasses.replace(config, towers=dataclasses.replace(config.towers, **towers))
        return setup.load(config, inputs.workdir, data=False)
    return dataclasses.replace(inputs, config=config)


@pytest.mark.parametrize("scan", [False, True])
def test_an_export_gives_back_every_leaf_whether_blocks_are_stacked_or_not(exported, scan):
    inputs, params, out = exported
    begun = starting(inputs, out, scan=True) if scan else starting(inputs, out / LEAVES)
    _, found = arm_model.start(begun, begun.config.arm["baseline"])
    for path, leaf in params.items():
        tower, _, rest = path.partition("/blocks_")
        layer, _, name = rest.partition("/")
        stacked = scan and rest and f"{tower}/blocks/{name}" in found
        theirs = found[f"{tower}/blocks/{name}"][int(layer)] if stacked else found[path]
        np.testing.assert_array_equal(theirs, leaf, err_msg=path)


def test_a_stacked_export_fills_single_blocks(exported, tmp_path):
    inputs, params, out = exported
    held = load_file(out / LEAVES)
    layers = max(int(path.split("blocks_")[1].split("/")[0]) for path in held if path.startswith("lm/blocks_")) + 1
    for name in {path.split("/", 2)[2] for path in held if path.startswith("lm/blocks_")}:
        held[f"lm/blocks/{name}"] = np.stack([held.pop(f"lm/blocks_{i}/{name}") for i in range(layers)])
    save_file(held, tmp_path / "stacked.safetensors")
    _, found = arm_model.start(starting(inputs, tmp_path / "stacked.safetensors"), inputs.config.arm["baseline"])
    for path in params:
        np.testing.assert_array_equal(found[path], params[path], err_msg=path)


def test_pictures_are_captioned_without_the_work_directory(exported, tmp_path):
    inputs, _, out = exported
    test = load_split(inputs.config, "test", tmp_path)
    test.images[0].save(tmp_path / "a.png")
    caption.caption(inputs.config, inputs.workdir, "baseline", [tmp_path / "a.png"], tmp_path / "run.json")
    flags = ["--config=configs/miniature.py", "--mode=caption", f"--init={out / LEAVES}", str(tmp_path / "a.png")]
    flags += [f"--out={tmp_path / 'init.json'}", "--arm=baseline", "--config.decode.methods=('greedy',)"]
    code, said = mains.run([*flags, "--config.decode.max_tokens=6"], tmp_path / "said.txt")
    assert code == 0 and "(an export of this package) fills" in said, said
    assert (tmp_path / "run.json").read_text() == (tmp_path / "init.json").read_text()


def test_scores_by_a_checkpoint_stand_in_a_directory_of_their_own(exported, tmp_path):
    inputs, _, out = exported
    config = dataclasses.replace(inputs.config, init=str(out))
    record = {"command": "", "config": settings.as_dict(config), "versions": {}, "machine": {}, "started": ""}
    evaluate.evaluate(config, tmp_path / "scores", record)
    assert read_json(tmp_path / "scores" / "run.json")["identity"]["init"]
    with pytest.raises(ConfigError, match="holds the scores of a checkpoint as it is"):
        check_trainable(tmp_path / "scores")
    assert (tmp_path / "scores" / "baseline" / "scores_test.json").exists()
    with pytest.raises(ConfigError, match="holds training of arm baseline"):
        check_untrained(config, inputs.workdir)


def test_training_starts_from_the_checkpoint_and_knows_it_again(exported, tmp_path):
    inputs, params, out = exported
    begun = setup.load(small(init=str(out)), tmp_path)
    _, found = arm_model.start(begun, begun.config.arm["baseline"])
    np.testing.assert_array_equal(found["st/up/kernel"], params["st/up/kernel"])
    _, after = run_arm(begun, "baseline")
    assert np.abs(np.asarray(after["st/up/kernel"]) - np.asarray(found["st/up/kernel"])).max() > 0
    assert begun.identity()["init"] and "init" not in inputs.identity()
    write_json(tmp_path / "run.json", {"identity": {**begun.identity(), "init": "another"}})
    with pytest.raises(ConfigError, match="trained with another init"):
        check_identity(begun)


def test_an_export_is_exported_again_without_the_work_directory(exported, tmp_path):
    inputs, _, out = exported
    export(dataclasses.replace(inputs.config, init=str(out)), None, "baseline", tmp_path / "again", init=True)
    first, again = load_file(out / LEAVES), load_file(tmp_path / "again" / LEAVES)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[path], again[path]) for path in first)


def test_what_does_not_fit_is_one_message(exported, tmp_path):
    inputs, _, out = exported
    arm, held = inputs.config.arm["baseline"], load_file(out / LEAVES)

    def refused(file, of=arm, error=WeightsError) -> str:
        config = dataclasses.replace(inputs.config, init=str(file), arm={"baseline": of})
        with pytest.raises(error) as raised:
            arm_model.start(dataclasses.replace(inputs, config=config), of)
        return str(raised.value)

    spoilt = {path: leaf for path, leaf in held.items() if path != "st/up/bias"}
    spoilt |= {"st/down/bias": held["st/down/bias"][:3], "st/other": held["st/up/bias"]}
    save_file(spoilt, tmp_path / "spoilt.safetensors")
    message = refused(tmp_path / "spoilt.safetensors")
    for part in (
        "nothing fills our st/up/bias",
        "'st/down/bias' (our st/down/bias) has shape (3,)",
        "'st/other' is un",
    ):
        assert part in message
    for path in (tmp_path / "none.pt", tmp_path):
        assert str(path) in refused(path)
    save_file({"model.embed_tokens.weight": held["st/up/bias"]}, tmp_path / "lm.safetensors")
    assert "give its folder as config.towers.lm" in refused(tmp_path / "lm.safetensors")
    other = dataclasses.replace(arm, st_tokens=7)
    assert "config.arm.baseline.st_tokens is 7" in refused(out, other) and "set it to 10" in refused(out, other)
    for free in ({"st_layers": 3}, {"adapter_dropout": 0.5, "adapter_rank": 3}, {"description": "other words"}):
        same = dataclasses.replace(arm, **free)  # what an arm of this kind does not compute by
        config = dataclasses.replace(inputs.config, init=str(out), arm={"baseline": same})
        arm_model.start(dataclasses.replace(inputs, config=config), same)
    record = json.loads((out / RECORD).read_text())
    save_file(held, tmp_path / LEAVES)
    (tmp_path / RECORD).write_text(json.dumps(record | {"identity": {"clip": "0", "lm": record["identity"]["lm"]}}))
    assert "trained on another clip: set config.towers" in refused(tmp_path, error=ConfigError)


def test_clips_resnets_are_refused_at_the_door():
    for name in ("RN50x4", "openai/RN50", "timm/resnet50_clip.openai"):
        config = small()
        config = dataclasses.replace(config, towers=dataclasses.replace(config.towers, clip=name))
        with pytest.raises(ConfigError, match="ResNet kind, which is not supported"):
            vision.check(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=caption", "a.jpg", "--init=x.pt"], "--config is missing: --init needs the config"),
        (["--mode=eval", "--init=x.pt", "--config=configs/miniature.py"], "--workdir is missing"),
        (["--mode=chat", "--init=x.pt", "--config=configs/miniature.py", "a.jpg", "b.jpg"], "about one image"),
        (["--mode=serve", "--init=x.pt", "--config=configs/miniature.py", "--workdir=x"], "takes no --init"),
        (
            ["--mode=export", "--init=no.pt", "--config=configs/miniature.py", "--out=x"],
            "config.init=no.pt: no such file",
        ),
    ],
)
def test_what_the_command_line_lacks_is_said(tmp_path, flags, message):
    code, said = mains.run(flags, tmp_path / "said.txt")
    assert code != 0 and message in said


def test_where_pytorch_is_absent_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").touch()
    with pytest.raises(WeightsError, match=r"a\.pt is a file of PyTorch's.*pip install '\.\[torch\]'"):
        torch_files.read(tmp_path / "a.pt")

"""ClipCap's checkpoints, loaded by config.init: the authors' own logits (shared/originals)."""

import dataclasses
import json
import re

import mains
import numpy as np
import pytest
from checkpoint_cases import LOGITS, changed, clip_folder, gpt2_folder, logits_of
from close import assert_close
from PIL import Image
from tiny import config_of

from eim_jax.commands.exporting import write_arm
from eim_jax.pretrained import WeightsError, torch_files
from eim_jax.training import arm_model, setup
from eim_jax.training.arm import run_arm

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")


@pytest.fixture
def clipcap(shared_original, tmp_path):
    """Returns a function: case -> (its folder, the config whose baseline is that ClipCap)."""

    def make(name: str, **changes):
        case = shared_original(name)
        theirs = json.loads((case / "config.json").read_text())
        args = theirs["args"]
        config = config_of(
            "clipcap_small_coco",
            **{
                "towers.clip": str(clip_folder(tmp_path / "clip", theirs["prefix_size"])),
                "towers.lm": str(
                    gpt2_folder(tmp_path / "gpt2", theirs["gpt2"], shared_original("tokenizers") / "gpt2")
                ),
                "arm.baseline.st": args["mapping_type"],
                "arm.baseline.st_tokens": args["prefix_length"],
                "arm.baseline.st_layers": args["num_layers"],
                "arm.baseline.st_clip_length": args["prefix_length_clip"],
                "arm.baseline.normalize_prefix": args["normalize_prefix"],
                "init": str(case / "weights.pt"),
                **changes,
            },
        )
        return case, config

    return make


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_clipcaps_files_give_the_authors_logits(clipcap, tmp_path, mapper):
    case, config = clipcap(f"clipcap_{mapper}")
    inputs = setup.load(config, tmp_path, data=False)
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
    theirs = np.load(case / "forward.npz")
    visual, logits = logits_of(vlm, params, theirs["prefix"], theirs["tokens"], theirs["mask"])
    assert_close(visual, theirs["mapped"], LOGITS)
    seen = theirs["mask"] > 0
    assert_close(np.asarray(logits)[seen], theirs["logits"][seen], LOGITS)
    if mapper == "transformer":
        asked = {
            "st": "mlp",
            "st_tokens": 10,
            "st_layers": 8,
            "st_clip_length": 10,
        }  # the preset's
        with pytest.raises(WeightsError) as error:
            arm_model.start(inputs, dataclasses.replace(config.arm["baseline"], **asked))
        for field, theirs in {"st": "'transformer'", "st_tokens": 6, "st_layers": 3, "st_clip_length": 8}.items():
            assert re.search(rf"\.{field} is .*: set it to {theirs}$", str(error.value), re.MULTILINE), field


def test_training_goes_on_from_a_clipcap_file_and_its_export_is_read_again(clipcap, tmp_path):
    case, config = clipcap("clipcap_mlp")
    stage = {"steps": 2, "warmup_steps": 0, "batch": 16, "lr": 1e-4}
    fields = {"towers.clip": config.towers.clip, "towers.lm": config.towers.lm, "init": config.init}
    fields |= {"arms": ("baseline",), "arm.baseline.st_tokens": 5, "data.scenes": 16, "data.eval_limit": 4}
    fields |= {"decode.methods": ("greedy",), "decode.max_tokens": 6, "decode.java": False}
    config = config_of("miniature", **fields, **{f"stages.base.{field}": value for field, value in stage.items()})
    inputs = setup.load(config, tmp_path / "run")
    _, before = arm_model.start(inputs, config.arm["baseline"])
    theirs = torch.load(case / "weights.pt", weights_only=True)
    np.testing.assert_array_equal(before["st/up/kernel"], theirs["clip_project.model.0.weight"].numpy().T)
    _, after = run_arm(inputs, "baseline")
    for path in ("st/up/kernel", "lm/blocks_1/mlp/up/kernel"):
        way = np.abs(np.asarray(after[path]) - np.asarray(before[path]))
        assert 1e-5 < way.max() < 2.1e-4  # at most the rate a step: it begins at the file's weights
    write_arm(inputs, "baseline", after, tmp_path / "out")
    again = dataclasses.replace(config, init=str(tmp_path / "out"))
    _, read = arm_model.start(dataclasses.replace(inputs, config=again), again.arm["baseline"])
    assert read.keys() == after.keys()
    for path, leaf in after.items():
        np.testing.assert_array_equal(read[path], leaf, err_msg=path)


def test_a_clipcap_file_is_captioned_by_without_a_work_directory(clipcap, tmp_path):
    case, config = clipcap("clipcap_mlp")
    picture, out = tmp_path / "a photo.png", tmp_path / "out.txt"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(picture)
    flags = [
        "--config=configs/clipcap_small_coco.py", "--mode=caption", f"--init={case / 'weights.pt'}", str(picture),
        f"--config.towers.clip={config.towers.clip}", f"--config.towers.lm={config.towers.lm}",
        "--config.arm.baseline.st_tokens=5", "--config.decode.max_tokens=8", f"--out={tmp_path / 'said.json'}",
    ]  # fmt: skip
    code, said = mains.run(flags, out)
    assert code == 0, said
    assert "made with config.decode.stop_at_period=True" in said
    [row] = json.loads((tmp_path / "said.json").read_text())
    assert row["image_id"] == str(picture) and f"a photo.png: {row['caption']}" in said
    code, said = mains.run([f for f in flags if "st_tokens" not in f], out)
    assert code != 0 and "config.arm.baseline.st_tokens is 10" in said and "set it to 5" in said


def test_what_does_not_fit_a_clipcap_file_is_one_message(clipcap, tmp_path):
    case, config = clipcap("clipcap_mlp")
    inputs = setup.load(dataclasses.replace(config, init=""), tmp_path, data=False)

    def refused(name, change):
        file = changed(case / "weights.pt", tmp_path / name, change)
        with pytest.raises(WeightsError) as error:
            arm_model.start(dataclasses.replace(inputs, config=dataclasses.replace(config, init=str(file))), arm)
        return str(error.value)

    arm = config.arm["baseline"]

    def spoil(held):
        held["clip_project.model.5.weight"] = held.pop("clip_project.model.0.bias")
        held["gpt.transformer.ln_f.weight"] = held["gpt.transformer.ln_f.weight"][:7]
        held["gpt.transformer.h.1.attn.bias"] = torch.zeros(3)  # the causal mask, by whatever shape

    message = refused("spoilt.pt", spoil)
    for part in (
        "'clip_project.model.0.bias' (our st/up/bias) is missing",
        "'gpt.transformer.ln_f.weight' (our lm/ln_f/scale) has shape (7,), not (24,)",
        "'clip_project.model.5.weight' is unexpected",
    ):
        assert part in message
    message = refused("untied.pt", lambda held: held.update({"gpt.lm_head.weight": held["gpt.lm_head.weight"] + 1}))
    assert "'gpt.lm_head.weight' differs" in message
    resnet = torch.zeros(60, 640)
    message = refused("resnet.pt", lambda held: held.update({"clip_project.model.0.weight": resnet}))
    assert "640 wide as those of RN50x4" in message and "ResNets are not supported, take a file" in message
    wide = torch.zeros(60, 13)
    message = refused("wide.pt", lambda held: held.update({"clip_project.model.0.weight": wide}))
    assert "are 13 wide, and those of config.towers.clip 12: set config.towers.clip to the CLIP" in message
    message = refused("other.pt", lambda held: [held.pop(key) for key in list(held)[:-1]])
    assert "is missing" in message
    message = refused("lm.pt", lambda held: [held.pop(key) for key in list(held) if key.startswith("clip_project")])
    assert "none of the forms" in message and "clip_project.*" in message


def test_a_mapper_alone_leaves_the_language_model_as_it_is(clipcap, tmp_path):
    case, config = clipcap("clipcap_mlp")
    file = changed(
        case / "weights.pt",
        tmp_path / "mapper.pt",
        lambda held: [held.pop(key) for key in list(held) if key.startswith("gpt.")],
    )
    inputs = setup.load(dataclasses.replace(config, init=str(file)), tmp_path, data=False)
    _, params = arm_model.start(inputs, config.arm["baseline"])
    theirs = torch.load(file, weights_only=True)
    np.testing.assert_array_equal(params["st/up/kernel"], theirs["clip_project.model.0.weight"].numpy().T)
    for path in ("lm/ln_f/scale", "lm/blocks_1/mlp/up/kernel"):
        np.testing.assert_array_equal(params[path], inputs.towers[path])


class Innocent:
    """What no reader of tensors builds."""


def test_nothing_but_tensors_is_unpickled(tmp_path):
    file = tmp_path / "model.pt"
    torch.save(Innocent(), file)
    with pytest.raises(WeightsError, match=r"holds test_checkpoints_clipcap\.Innocent beside tensors"):
        torch_files.read(file)
    torch.save({"clip_project.a": 3}, file)
    with pytest.raises(WeightsError, match=r"'clip_project\.a' is no tensor but int"):
        torch_files.WeightFile(torch_files.read(file), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"cannot be read by PyTorch.*download it again"):
        torch_files.read(file)

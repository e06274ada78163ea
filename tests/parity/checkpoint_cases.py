"""Towers around the originals' checkpoints, and what their logits are compared with."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import mains
import numpy as np
import pytest
from PIL import Image

from eim_jax.commands import exporting
from eim_jax.models.language.gpt2 import GPT2Config
from eim_jax.models.vision.clip import CLIPTextConfig, CLIPVisionConfig
from eim_jax.pretrained import (
    CLIP,
    LM,
    clip_shapes,
    export_clip,
    export_lm,
    lm_shapes,
    resolve,
)
from eim_jax.training import arm_model, partition, setup
from eim_jax.training.arm import run_arm

torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
# What float32 leaves between two implementations, as tests/originals has it: fractions of the largest number compared.
LOGITS, FEATURES = 3e-6, 2e-6


def noise(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(0.05 * rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in shapes.items()}


def clip_folder(place: pathlib.Path, joint: int) -> pathlib.Path:
    """A CLIP of noise whose image feature is so wide, with the miniature's tokenizer."""
    vision = CLIPVisionConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp=32, joint=joint)
    text = CLIPTextConfig(vocab=724, context=20, width=16, layers=1, heads=2, mlp=32, joint=joint, eos_id=723)
    params = partition.unflatten(noise(clip_shapes(vision, text)))
    export_clip(place, CLIP(vision, text, params))
    for file in resolve("miniature/clip").glob("tokenizer*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


def gpt2_folder(place: pathlib.Path, sizes: dict, tokenizer: pathlib.Path) -> pathlib.Path:
    """A GPT-2 of noise of the case's sizes: what a ClipCap user's config.towers.lm is before hers is loaded."""
    shape = GPT2Config(
        vocab=sizes["vocab_size"], context=sizes["n_positions"], width=sizes["n_embd"], layers=sizes["n_layer"],
        heads=sizes["n_head"],
    )  # fmt: skip
    export_lm(place, LM(shape, partition.unflatten(noise(lm_shapes(shape)))["lm"]))
    for file in tokenizer.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def logits_of(vlm, params, prefix, tokens, mask):
    """Logits at every position of prefix and caption, as ClipCaptionModel gives them."""
    tree = partition.unflatten(params)
    visual = vlm.st.apply({"params": tree["st"]}, jnp.asarray(prefix)[:, None])
    valid = jnp.asarray(mask[:, visual.shape[1] :] > 0)
    read = vlm.lm_input(tree, jnp.asarray(tokens), valid, visual=visual)
    return visual, vlm.logits(tree, vlm.run_lm(tree, read))


def changed(case: pathlib.Path, place: pathlib.Path, change) -> pathlib.Path:
    """A state_dict with its tensors changed."""
    held = torch.load(case, weights_only=True)
    change(held)
    torch.save(held, place)
    return place


def llama_folder(shared_original, place: pathlib.Path, case: pathlib.Path) -> pathlib.Path:
    """Meta's layout: a folder a size, and one tokenizer.model above them."""
    place.mkdir()
    (place / "tokenizer.model").symlink_to(shared_original("tokenizers") / "llama" / "tokenizer.model")
    (place / "7B").symlink_to(case / "7B")
    return place / "7B"


def asked(name: str, config, more: list[str], tmp_path) -> str:
    """What the README's command says to one question, by a checkpoint in place of a finished run."""
    (tmp_path / "asked.txt").write_text("What is this?\n")
    arm = ("adapter_rank", "adapter_temperature", "adapter_layers", "st_hidden", "st_heads")
    flags = [f"--config=configs/{name}.py", "--mode=chat", f"--init={config.init}", *more]
    flags += [f"--config.towers.{field}={getattr(config.towers, field)}" for field in ("clip", "lm", "scan")]
    flags += [f"--config.arm.baseline.{field}={getattr(config.arm['baseline'], field)}" for field in arm]
    process = mains.Main([*flags, "--config.decode.max_tokens=3"], tmp_path / "said.txt", stdin=tmp_path / "asked.txt")
    assert process.wait() == 0, process.said()
    return process.said()


LEARN = {
    "data.kind": "instruct", "data.max_tokens": 60, "data.max_tokens_text_only": 60, "stages.base.epochs": 0,
    "stages.base.steps": 2, "stages.base.batch": 8, "stages.base.lr": 1e-3, "stages.base.warmup_epochs": 0.0,
    "stages.base.warmup_steps": 0,
}  # fmt: skip


def rows_to_learn(place: pathlib.Path) -> pathlib.Path:
    """Four instructions about a picture and four without, as LLaVA's and Alpaca's files have them."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)).save(place / "a.png")
    asked = [
        ("What is it?", "Noise."),
        ("Say hello.", "Hello."),
        ("Name a colour.", "Red."),
        ("And a bird?", "A wren."),
    ]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in asked]
    for i, (question, answer) in enumerate(asked):
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": "a.png", "conversations": turns})
    (place / "rows.json").write_text(json.dumps(rows))
    return place / "rows.json"


def learns_from_its_init(config, place: pathlib.Path) -> set[str]:
    """Trains two steps, exports and reads the export again; returns the paths that moved, by no more than the rates."""
    inputs = setup.load(config, place / "run")
    _, before = arm_model.start(inputs, config.arm["baseline"])
    _, after = run_arm(inputs, "baseline")
    way = {path: float(np.abs(np.asarray(after[path]) - np.asarray(before[path])).max()) for path in after}
    assert max(way.values()) < 2.1e-3  # AdamW moves a leaf by at most the rate, 1e-3, in each step
    exporting.write_arm(inputs, "baseline", after, place / "out")
    again = dataclasses.replace(inputs, config=dataclasses.replace(config, init=str(place / "out")))
    _, read = arm_model.start(again, config.arm["baseline"])
    for path, leaf in after.items():
        np.testing.assert_array_equal(read[path], leaf, err_msg=path)
    return {path for path, far in way.items() if far > 1e-5}

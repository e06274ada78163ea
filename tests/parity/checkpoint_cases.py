"""Towers around the originals' checkpoints, and what their logits are compared with."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

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
from eim_jax.training import partition

torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install 'eim_jax[parity]'")
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

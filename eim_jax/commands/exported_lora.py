"""An arm's low-rank terms (LoRA) as PEFT's folders, and the vision tower that holds them in its kernels."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from eim_jax.config import ConfigError
from eim_jax.models.lora import Tuned
from eim_jax.models.vlm import VLM
from eim_jax.pretrained import export_clip, peft
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs

TERMS_FOLDER, VISION_FOLDER = "lora", "clip"


def tuned_towers(vlm: VLM) -> dict[str, Tuned]:
    """Returns the towers that have low-rank terms: "visual", "lm"."""
    return {name: part for name, part in vlm.parts if isinstance(part, Tuned)}


def check_merge(arm: str, tuned: Collection[str]) -> None:
    """Raises ConfigError where there is nothing to merge."""
    if not tuned:
        raise ConfigError(f"--merge: arm {arm} has no low-rank terms (config.arm.{arm}.lora): leave it out")


def write_terms(inputs: Inputs, tuned: Mapping[str, Tuned], params: Flat, trained: Collection[str], out: Path) -> None:
    """Writes lora/lm/ and lora/visual/, as PEFT has them, for the towers that have terms."""
    towers = inputs.config.towers
    for name, part in tuned.items():
        own = trained & {path for path in inputs.towers if path.startswith("lm/")}
        changed = name == "lm" and own  # then the terms' base is no longer the folder that was loaded
        base = None if changed else towers.lm if name == "lm" else towers.clip
        peft.write(out / TERMS_FOLDER / name, params, name, part.config, part.lora, base)


def with_merged_vision(vlm: VLM, params: Flat) -> Flat:
    """Returns all leaves, the vision tower's terms inside its kernels."""
    if not isinstance(vlm.visual, Tuned):
        return params
    seen = {path: np.asarray(leaf, np.float32) for path, leaf in params.items() if path.startswith("visual/")}
    merged = vlm.visual.merge(partition.unflatten(seen)["visual"])
    rest = {path: leaf for path, leaf in params.items() if path not in seen}
    return {**rest, **partition.flatten({"visual": merged})}


def write_merged_vision(inputs: Inputs, merged: Flat, out: Path) -> None:
    """Writes clip/: the vision tower, its terms inside, and the text tower that stands beside it in its folder."""
    beside = inputs.clip.text is not None and not inputs.config.towers.text
    kept = {path for path in inputs.towers if path.startswith(("visual/", "text/") if beside else "visual/")}
    trees = partition.unflatten({path: merged[path] for path in kept})
    clip = inputs.clip if beside else inputs.clip._replace(text=None)
    export_clip(out / VISION_FOLDER, clip._replace(params=trees))
    if beside:
        inputs.clip_tokenizer.save_pretrained(out / VISION_FOLDER)

"""A trained arm as plain files: what training changed as one safetensors file, a tuned LM as a folder of its own."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from eim_jax.commands.trained_arms import load_finished, trained
from eim_jax.config import Config, ConfigError
from eim_jax.models.lora import Tuned
from eim_jax.parallel.lock import held
from eim_jax.pretrained import LM, export_clip, export_lm, peft
from eim_jax.training import initial, partition, setup
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console
from eim_jax.utils.files import Damaged, new_folder, read_json

LEAVES, RECORD = "trained.safetensors", "arm.json"


def export(
    config: Config, workdir: Path | None, arm: str, out: Path, *, init: bool = False, merge: bool = False
) -> None:
    """Writes a trained arm as plain files; with `init` what config.init holds, in our form; `merge` as `write_arm`.

    Raises:
      InUse: another command writes there.
    """
    with held(out, wait=False):
        inputs = load_finished(config, workdir)
        vlm, params = trained(inputs, arm, init=init)
        write_arm(inputs, arm, params, out, kept=initial.given(inputs, config.arm[arm], vlm, params), merge=merge)
    console.print(f"written to {out}", soft_wrap=True)


def write_arm(
    inputs: Inputs, arm: str, params: Flat, out: Path, kept: Collection[str] = (), merge: bool = False
) -> None:
    """Writes the folder `out`: LEAVES, RECORD, where a stage trains the LM itself also lm/, for transformers.

    Low-rank terms are written as lora/lm/ and lora/visual/ too, for PEFT; with `merge` the towers that have them as lm/
    and clip/, the terms inside their kernels.

    LEAVES holds, in float32, in our shapes and by our paths ("st/...", "visual/prompt/...", "lm/..."), every leaf that
    a stage of the arm trains, every one that no tower has, and those of `kept` (config.init's); with the towers of
    RECORD they are the whole model (with towers.scan the blocks are stacked). For one process. A folder that is this
    export already stays as it is, as one does whose command was killed when all was written. Raises ConfigError where
    `out` holds other files.
    """
    config = inputs.config
    tuned = {name: part for name, part in setup.model(inputs, config.arm[arm]).parts if isinstance(part, Tuned)}
    if merge:
        _check_merge(config, arm, tuned)
    full = out.is_file() or (out.is_dir() and any(out.iterdir()))
    other = ConfigError(f"--out={out} holds other files: choose an empty folder")
    if full and not (out / RECORD).exists():
        raise other
    sequence = config.arm[arm].sequence
    trained = {path for name in sequence for g in partition.groups(config.stages[name], params) for path in g.paths}
    trained |= set(kept)
    leaves = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in params.items()
        if path in trained or path not in inputs.towers
    }
    language = {path for path in inputs.towers if path.startswith("lm/")}  # without adapters
    record = {
        "eim_jax": metadata.version("eim_jax"),
        "arm": arm,
        "model": dataclasses.asdict(config.arm[arm]),
        "stages": {name: dataclasses.asdict(config.stages[name]) for name in sequence},
        "towers": dataclasses.asdict(config.towers),
        "identity": inputs.fingerprints,
    } | ({"merged": True} if merge else {})
    if full:
        if not _is_there(out, leaves, record):
            raise other
        return
    with new_folder(out) as scratch:
        save_file(leaves, scratch / LEAVES)
        for name, part in tuned.items():
            own = name == "lm" and language & trained  # then its base is no longer the folder that was loaded
            base = None if own else getattr(config.towers, "lm" if name == "lm" else "clip")
            peft.write(scratch / "lora" / name, params, name, part.config, part.lora, base)
        if (language & trained or (merge and "lm" in tuned)) and config.towers.quant == "none":
            tree = _whole(params, "lm", language, tuned if merge else {})
            export_lm(scratch / "lm", LM(inputs.lm.config, tree), inputs.lm_tokenizer)
            inputs.lm_tokenizer.save_pretrained(scratch / "lm")
        if merge and "visual" in tuned:
            seen = {path for path in inputs.towers if path.startswith("visual/")}
            text = {path: params[path] for path in inputs.towers if path.startswith("text/")}
            trees = {"visual": _whole(params, "visual", seen, tuned), **partition.unflatten(text)}
            export_clip(scratch / "clip", inputs.clip._replace(params=trees))
            inputs.clip_tokenizer.save_pretrained(scratch / "clip")
        (scratch / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _check_merge(config: Config, arm: str, tuned: Collection[str]) -> None:
    """Raises ConfigError where there is nothing to merge, or nothing that it can be merged into."""
    if not tuned:
        raise ConfigError(f"--merge: arm {arm} has no low-rank terms (config.arm.{arm}.lora): leave it out")
    if "lm" in tuned and config.towers.quant != "none":
        raise ConfigError(
            f"--merge: config.towers.quant={config.towers.quant!r} holds the LM in 4 bits, into which no term can be "
            "merged. Export without it, then merge into the whole weights: --mode=export --merge --init=THAT_FOLDER "
            "--config=... --config.towers.quant=none --out=..."
        )


def _whole(params: Flat, tower: str, paths: Collection[str], tuned: Mapping[str, Tuned]) -> dict:
    """A tower's own tree in float32, with the low-rank terms of `tuned` inside its kernels."""
    part = tuned.get(tower)
    added = {f"{tower}/{path}" for layer in part.layers for path in layer.shapes(1)} if part else set()
    tree = partition.unflatten({path: params[path].astype(np.float32) for path in {*paths, *added}})[tower]
    return part.merge(tree) if part else tree


def _is_there(out: Path, kept: dict[str, np.ndarray], record: dict) -> bool:
    """Whether a folder, which is written whole or not at all, holds this export to the bit."""
    try:
        found = read_json(out / RECORD)
        leaves = load_file(out / LEAVES)
    except (Damaged, OSError, SafetensorError):
        return False
    same = leaves.keys() == kept.keys() and all(np.array_equal(leaves[path], kept[path]) for path in kept)
    return same and found == json.loads(json.dumps(record))

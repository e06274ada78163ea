"""A trained arm as plain files: what training changed as one safetensors file, a tuned LM as a folder of its own."""

import dataclasses
import json
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from eim_jax.commands.trained_arms import load_finished, trained
from eim_jax.config import Config, ConfigError
from eim_jax.pretrained import LM, export_lm
from eim_jax.training import initial, partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console
from eim_jax.utils.files import new_folder

LEAVES, RECORD = "trained.safetensors", "arm.json"


def export(config: Config, workdir: Path | None, arm: str, out: Path, *, init: bool = False) -> None:
    """Writes a trained arm as plain files; with `init` what config.init holds, in our form."""
    inputs = load_finished(config, workdir)
    vlm, params = trained(inputs, arm, init=init)
    write_arm(inputs, arm, params, out, kept=initial.given(inputs, config.arm[arm], vlm, params))
    console.print(f"written to {out}", soft_wrap=True)


def write_arm(inputs: Inputs, arm: str, params: Flat, out: Path, kept: Collection[str] = ()) -> None:
    """Writes the folder `out`: LEAVES, RECORD, where a stage trains the LM itself also lm/, for transformers.

    LEAVES holds, in float32, in our shapes and by our paths ("st/...", "visual/prompt/...", "lm/..."), every leaf that
    a stage of the arm trains, every one that no tower has, and those of `kept` (config.init's); with the towers of
    RECORD they are the whole model (with towers.scan the blocks are stacked). For one process. Raises ConfigError where
    `out` holds other files.
    """
    config = inputs.config
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out={out} holds other files: choose an empty folder")
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
    }
    with new_folder(out) as scratch:
        save_file(leaves, scratch / LEAVES)
        if language & trained and config.towers.quant == "none":
            lm = {path: params[path].astype(np.float32) for path in language}
            export_lm(scratch / "lm", LM(inputs.lm.config, partition.unflatten(lm)["lm"]))
            inputs.lm_tokenizer.save_pretrained(scratch / "lm")
        (scratch / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

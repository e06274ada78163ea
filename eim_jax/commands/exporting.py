"""A trained arm as plain files: what training changed as one safetensors file, models as folders of their own."""

import dataclasses
import json
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from eim_jax.commands import exported_lora, model_card, pushing
from eim_jax.commands.exported_chat import chat_template
from eim_jax.commands.exported_lms import LLAVA_FOLDER, WITH_IMAGE, language_models, made_whole
from eim_jax.commands.trained_arms import load_finished, trained
from eim_jax.config import Config, ConfigError
from eim_jax.data import rows
from eim_jax.losses.table import OWN
from eim_jax.parallel.lock import held
from eim_jax.pretrained import export_lm, llava, reader
from eim_jax.training import arm_model, initial, partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console
from eim_jax.utils.files import Damaged, new_folder, read_json

LEAVES, RECORD = "trained.safetensors", "arm.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the folders of models hold their weights (LEAVES is one file of float32).

    Attributes:
      dtype: one of DTYPES.
      shard: the largest file ("5GB"); more are several files and an index.
    """

    dtype: str = "float32"
    shard: str = reader.SHARD


DEFAULT = Weights()


def export(
    config: Config,
    workdir: Path | None,
    arm: str,
    out: Path,
    *,
    init: bool = False,
    merge: bool = False,
    weights: Weights = DEFAULT,
    push: str = "",
) -> None:
    """Writes a trained arm as plain files; with `init` what config.init holds, in our form.

    Args:
      config: the run's.
      workdir: of the finished run; may be None with `init`.
      arm: which of its arms.
      out: the folder.
      init: writes config.init as it is.
      merge: as `write_arm`.
      weights: how the models' folders hold their weights.
      push: the hub's repository that the folder is uploaded to; "" for none.

    Raises:
      InUse: another command writes there.
      ConfigError: as `write_arm`, or the hub did not take it.
    """
    if push:
        pushing.check(push)
    reader.check_shard(weights.shard)
    with held(out, wait=False):
        inputs = load_finished(config, workdir)
        vlm, params = trained(inputs, arm, init=init)
        kept = initial.given(inputs, config.arm[arm], vlm, params)
        write_arm(inputs, arm, params, out, kept=kept, merge=merge, weights=weights)
        console.print(f"written to {out}", soft_wrap=True)
        if push:
            pushing.push(out, push)


def write_arm(
    inputs: Inputs,
    arm: str,
    params: Flat,
    out: Path,
    kept: Collection[str] = (),
    *,
    merge: bool = False,
    weights: Weights = DEFAULT,
) -> None:
    """Writes the folder `out`: LEAVES, RECORD, a model card (README.md), and the models that transformers can hold.

    Those are the tuned LM as lm/, or with LaVIN's adapters folded in as lm_with_image/ and lm_text_only/, and the whole
    arm as llava/. What cannot be written is said in the log and in the card, with the reason.

    Low-rank terms are written as lora/lm/ and lora/visual/ too, for PEFT; with `merge` the towers that have them as lm/
    and clip/, the terms inside their kernels.

    LEAVES holds, in float32, in our shapes and by our paths ("st/...", "visual/prompt/...", "lm/..."), every leaf that
    a stage of the arm trains, every one that no tower has, and those of `kept` (config.init's), but not what losses
    have of their own ("loss/..."); with the towers of RECORD they are the whole model (with towers.scan the blocks are
    stacked). For one process. A folder that is this export already stays as it is, as one does whose command was killed
    when all was written. Raises ConfigError where `out` holds other files.
    """
    config = inputs.config
    if merge:
        exported_lora.check_merge(arm, exported_lora.tuned_towers(arm_model.model(inputs, config.arm[arm])))
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
        if (path in trained or path not in inputs.towers) and not path.startswith(OWN)
    }
    record = {
        "eim_jax": metadata.version("eim_jax"),
        "arm": arm,
        "model": dataclasses.asdict(config.arm[arm]),
        "stages": {name: dataclasses.asdict(config.stages[name]) for name in sequence},
        "towers": dataclasses.asdict(config.towers),
        "identity": inputs.fingerprints,
        "weights": dataclasses.asdict(weights),
    } | ({"merged": True} if merge else {})
    if full:
        if not _is_there(out, leaves, record):
            raise other
        return
    with new_folder(out) as scratch:
        save_file(leaves, scratch / LEAVES)
        notes = _write_models(inputs, arm, params, trained, scratch, weights, merge)
        (scratch / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folders = sorted(folder for folder in scratch.iterdir() if folder.is_dir())
        whole = made_whole(inputs, [folder.name for folder in folders])
        card = model_card.text(inputs, arm, [folder.name for folder in folders], notes, whole)
        for folder in (scratch, *folders):
            (folder / model_card.CARD).write_text(card, encoding="utf-8")
    if whole:
        console.print(whole, soft_wrap=True, markup=False)
    for note in notes:
        console.print(f"not written: {note}", soft_wrap=True)


def _write_models(
    inputs: Inputs, arm: str, params: Flat, trained: Collection[str], out: Path, weights: Weights, merge: bool
) -> list[str]:
    """Writes a folder for each model that transformers can hold; returns what is not written, and why."""
    vlm = arm_model.model(inputs, inputs.config.arm[arm])
    low_rank = exported_lora.tuned_towers(vlm)
    exported_lora.write_terms(inputs, low_rank, params, trained, out)
    merged = exported_lora.with_merged_vision(vlm, params)
    if merge and "visual" in low_rank:
        exported_lora.write_merged_vision(inputs, merged, out)
    found = language_models(inputs, vlm, params, trained, merge)
    dtype = None if weights.dtype == "float32" else weights.dtype
    for name, lm in found.folders.items():
        export_lm(out / name, lm, inputs.lm_tokenizer, dtype=dtype, shard=weights.shard)
        inputs.lm_tokenizer.save_pretrained(out / name)
    if (reason := llava.why_not(vlm, found.reads_images)) or found.reads_images is None:
        return [*found.notes, f"{LLAVA_FOLDER}/ (transformers' LlavaForConditionalGeneration): {reason}"]
    llava.export_llava(
        out / LLAVA_FOLDER,
        vlm,
        merged,
        found.reads_images,
        inputs.lm_tokenizer,
        template=chat_template(inputs, vlm, always_shown=WITH_IMAGE in found.folders),
        stretch=inputs.config.data.fit == "stretch",
        end=rows.end_id(inputs.config.data, inputs.lm_tokenizer),
        dtype=dtype,
        shard=weights.shard,
    )
    return found.notes


def _is_there(out: Path, kept: dict[str, np.ndarray], record: dict) -> bool:
    """Whether a folder, which is written whole or not at all, holds this export to the bit."""
    try:
        found = read_json(out / RECORD)
        leaves = load_file(out / LEAVES)
    except (Damaged, OSError, SafetensorError):
        return False
    same = leaves.keys() == kept.keys() and all(np.array_equal(leaves[path], kept[path]) for path in kept)
    return same and found == json.loads(json.dumps(record))

"""Checkpoints that a run may start from (config.init): ours, ClipCap's, LLaMA-Adapter's, LaVIN's, PEFT's; by keys.

A form is added by writing its file and one line in `FORMS`. Every key of a file is accounted for, and every leaf of the
arm that no tower has is filled, or the file is refused by one message.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from eim_jax.models.hugging_face import WeightsError
from eim_jax.pretrained import json_files, peft, reader, torch_files, weight_files
from eim_jax.pretrained.checkpoints.clipcap import CLIPCAP
from eim_jax.pretrained.checkpoints.form import EXPORT, Content, Form, Target
from eim_jax.pretrained.checkpoints.lavin import LAVIN
from eim_jax.pretrained.checkpoints.llama_adapter import LLAMA_ADAPTER
from eim_jax.pretrained.checkpoints.lora import PEFT
from eim_jax.pretrained.checkpoints.ours import OURS

__all__ = ["FORMS", "RECORD", "Checkpoint", "Content", "Form", "Target", "file_of", "open_checkpoint"]

FORMS: tuple[Form, ...] = (OURS, LAVIN, CLIPCAP, LLAMA_ADAPTER, PEFT)
RECORD = "arm.json"


class Checkpoint(NamedTuple):
    """An open checkpoint whose keys and shapes fit the arm; nothing is read yet.

    Attributes:
      path: the file.
      form: what it is.
      tensors: its keys.
      leaves: our paths -> what fills them.
      lacking: the beginning of our paths that such a file does not have, and that stay as they are drawn; "" for none.
      identity: the towers' fingerprints of the arm.json beside our own exports, {} where there is none.
    """

    path: Path
    form: Form
    tensors: weight_files.Tensors
    leaves: dict[str, reader.Leaf]
    lacking: str
    identity: Mapping[str, str]

    def read(self, dtype: Mapping[str, DTypeLike], place: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns our paths -> arrays, each of its dtype and where its sharding says."""
        return reader.read_leaves(self.tensors, self.leaves, dtype=dtype, shardings=place.__getitem__)


def file_of(path: Path) -> Path:
    """Returns the file of a checkpoint: itself, or the export that a folder holds.

    Raises:
      WeightsError: there is none.
    """
    if path.is_dir():
        for name in (EXPORT, peft.WEIGHTS):
            if (path / name).is_file():
                return path / name
        raise WeightsError(
            f"config.init={path}: the folder holds no {EXPORT} or {peft.WEIGHTS}; give a checkpoint's file (.pt, .pth, "
            ".safetensors), or a folder that --mode=export or PEFT wrote. A language model's folder is config.towers.lm"
        )
    if not path.is_file():
        raise WeightsError(f"config.init={path}: no such file; give a checkpoint (.pt, .pth, .safetensors)")
    return path


def open_checkpoint(path: Path, target: Target, stack: contextlib.ExitStack) -> Checkpoint:
    """Opens a checkpoint and compares every key and shape with the arm's leaves.

    Args:
      path: the file, or the folder of an export.
      target: the arm that it is to fill.
      stack: keeps the file open.

    Raises:
      WeightsError: no known form, fields of the config that contradict it, or keys and shapes that do not fit.
    """
    path = file_of(path)
    tensors, content = _content(path, stack)
    form = next((form for form in FORMS if form.fits(content.shapes)), None)
    if form is None:
        raise WeightsError(f"config.init={path}: {_unknown(list(content.shapes))}")
    if problems := form.problems(content, target):
        raise WeightsError(f"config.init={path} ({form.title}) does not fit the arm:\n  " + "\n  ".join(problems))
    leaves, lacking = form.leaves(content, target), form.lacking(content)
    missing = [
        ours
        for ours in target.shapes
        if ours not in leaves and ours not in target.towers and not (lacking and ours.startswith(lacking))
    ]
    # A leaf that the arm does not have leaves its keys unexpected.
    leaves = {ours: leaf for ours, leaf in leaves.items() if ours in target.shapes}
    weight_files.check_keys(
        path,
        tensors,
        leaves,
        target.shapes,
        form.ignored(content, target),
        missing=missing,
        advice=f"Check that config.arm.{target.name} and config.towers are those of this checkpoint.",
    )
    _check_tied(path, tensors, form.tied(content))
    identity = content.record.get("identity", {})
    return Checkpoint(path, form, tensors, leaves, lacking, identity if isinstance(identity, Mapping) else {})


def _content(path: Path, stack: contextlib.ExitStack) -> tuple[weight_files.Tensors, Content]:
    settings, record, prefix = {}, {}, ""
    if path.suffix == ".safetensors":
        tensors = weight_files.Tensors(weight_files.open_files([path], stack))
        if (path.parent / RECORD).is_file():
            record = json_files.read_json(path.parent / RECORD)
        if path.name == peft.WEIGHTS and (path.parent / peft.CONFIG).is_file():
            settings = json_files.read_json(path.parent / peft.CONFIG)
    else:
        held = torch_files.read(path)
        if isinstance(held, Mapping) and isinstance(held.get("model"), Mapping):  # beside an optimizer, an epoch, ...
            held, settings = held["model"], _plain(held.get("args"))
        names = list(held) if isinstance(held, Mapping) else []
        if names and all(isinstance(name, str) and name.startswith("module.") for name in names):
            prefix = "module."  # DistributedDataParallel's
        tensors = weight_files.Tensors({path: torch_files.WeightFile(held, path)}, prefix)
    return tensors, Content(path, {key: tensors.shape(key) for key in tensors}, settings, record)


def _plain(args: Any) -> dict[str, Any]:
    """A command line's values."""
    return dict(vars(args)) if hasattr(args, "__dict__") else dict(args) if isinstance(args, Mapping) else {}


def _check_tied(path: Path, tensors: weight_files.Tensors, pair: tuple[str, str] | None) -> None:
    if pair is None or pair[0] not in tensors:
        return
    if not np.array_equal(tensors.read(pair[0]), tensors.read(pair[1])):
        raise WeightsError(f"{path}: key {pair[0]!r} differs from {pair[1]!r}, to which GPT-2's head is tied")


def _unknown(keys: list[str]) -> str:
    """Why keys are of no known form."""
    if any(re.match(r"visual\.layer\d\.", key) for key in keys):
        return "it is a CLIP of the ResNet kind (RN50, RN50x4, ...), which is not supported: take a ViT"
    if any(key in ("tok_embeddings.weight", "model.embed_tokens.weight", "wte.weight") for key in keys):
        return "it is a language model by itself: give its folder as config.towers.lm"
    if "visual.conv1.weight" in keys:
        return "it is OpenAI's CLIP: give a folder in Hugging Face's form as config.towers.clip"
    shown = ", ".join(map(repr, keys[:4])) or "none"
    return (
        "it is in none of the forms that are known: ours (st/..., lm/...), ClipCap's (clip_project.*), LLaMA-Adapter's "
        f"(adapter_query.weight), LaVIN's (adapter_modality_embedding.weight); its first keys are {shown}"
    )

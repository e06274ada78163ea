"""The language models that a trained arm leaves, each as one of its family without adapters."""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from eim_jax.models.language import family_of
from eim_jax.models.lora import A, B, Tuned, plain
from eim_jax.models.quant import dequantise
from eim_jax.models.vlm import VLM
from eim_jax.pretrained import LM
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs

LM_FOLDER, WITH_IMAGE, TEXT_ONLY, LLAVA_FOLDER = "lm", "lm_with_image", "lm_text_only", "llava"


class Exported(NamedTuple):
    """An arm's language models.

    Attributes:
      folders: name of a folder -> what is written there; empty where training left the LM as it was.
      reads_images: the LM that stands behind an image's tokens; None where no LM without adapters does what it does.
      notes: what is not there, or not whole, and why; for the log and the model card.
    """

    folders: dict[str, LM]
    reads_images: LM | None
    notes: list[str]


def language_models(inputs: Inputs, vlm: VLM, params: Flat, trained: Collection[str], merge: bool = False) -> Exported:
    """Returns an arm's language models in float32, kernels of 4 bits made whole, a router folded per modality.

    LaVIN's adapters give one model for rows with an image and one for text alone, or one for both where the two do not
    differ (no adapter was trained away from its start).

    Args:
      inputs: the run's.
      vlm: the arm's modules.
      params: all of its leaves.
      trained: the paths that its stages train.
      merge: lm/ has the low-rank terms inside its kernels. What else is written always has: nothing else holds them.
    """
    language = {path: leaf for path, leaf in params.items() if path.startswith("lm/")}
    tuned = bool(trained & language.keys() & inputs.towers.keys())
    flat = whole({path: jnp.asarray(leaf) for path, leaf in language.items()})
    tree = partition.unflatten(flat)["lm"]
    terms = isinstance(vlm.lm, Tuned)
    lm = LM(_unquantised(vlm.lm.config), vlm.lm.merge(tree) if terms else tree)
    adapter, module = lm.config.adapter, plain(vlm.lm).clone(config=lm.config)
    if terms and not merge:
        tree = partition.unflatten({path: leaf for path, leaf in flat.items() if not path.endswith((A, B))})["lm"]
    own = LM(lm.config, lm.params if merge else tree)
    tuned = tuned or (merge and terms)
    if adapter is None:
        return Exported({LM_FOLDER: own} if tuned else {}, lm, [])
    bare = LM(replace(own.config, adapter=None), {name: part for name, part in own.params.items() if name != "adapter"})
    try:
        text, image = (LM(*adapter.fold(module, lm.params, modality)) for modality in (0, 1))
    except ValueError as error:
        lacking = f"; {LM_FOLDER}/ is the tuned language model without them" if tuned else ""
        folders = {LM_FOLDER: bare} if tuned else {}
        return Exported(folders, None, [f"a language model that holds the adapters: {error}{lacking}"])
    if _same(text, image):
        return Exported({LM_FOLDER: image}, image, [])
    return Exported({WITH_IMAGE: image, TEXT_ONLY: text}, image, [])


def whole(flat: Flat) -> Flat:
    """Returns float32 leaves, with one kernel in place of the leaves that hold it in 4 bits, as the model computes."""
    found = {}
    for path, leaf in flat.items():
        start, _, name = path.rpartition("/")
        if f"{start}/codes" not in flat:
            found[path] = leaf.astype(jnp.float32)
        elif name == "codes":
            parts = {part: flat[f"{start}/{part}"] for part in ("codes", "scale", "scale_scale", "scale_mean")}
            stacked = leaf.ndim == 3  # towers.scan
            found[f"{start}/kernel"] = jax.vmap(dequantise)(parts) if stacked else dequantise(parts)
        elif name == "bias":
            found[path] = leaf.astype(jnp.float32)
    return found


def made_whole(inputs: Inputs, folders: Collection[str]) -> str:
    """Returns what has to be said of the written folders where the LM was held in 4 bits; "" where nothing has.

    Args:
      inputs: the run's.
      folders: the names of all that were written.
    """
    models = [f"{name}/" for name in (LM_FOLDER, WITH_IMAGE, TEXT_ONLY, LLAVA_FOLDER) if name in folders]
    towers = inputs.config.towers
    if towers.quant == "none" or not models:
        return ""
    return (
        f"{', '.join(models)}: kernels that were held in 4 bits ({towers.quant}) are written whole, with the values "
        f"that their codes stand for: the arm was trained on those, not on {towers.lm}'s own. Low-rank terms are added "
        "to them"
    )


def _unquantised(config):
    """The LM's shape with whole kernels."""
    return replace(config, quant="none") if family_of(config).quantised else config


def _same(one: LM, other: LM) -> bool:
    """Whether two language models are one."""
    left, right = flatten_dict(one.params), flatten_dict(other.params)
    return one.config == other.config and all(np.array_equal(left[path], right[path]) for path in left)

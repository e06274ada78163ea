"""CLIP's features of a split, for the stages that leave CLIP.visual alone: cached, or computed into the cache."""

import functools
import hashlib

import jax

from eim_jax import pretrained
from eim_jax.config import Stage
from eim_jax.data.feature_cache import cached_features
from eim_jax.data.samples import Split
from eim_jax.models.lora import Tuned
from eim_jax.models.vlm import VLM
from eim_jax.parallel.signals import doing
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs


def reads_features(inputs: Inputs, stage: Stage, params: Flat) -> bool:
    """Whether the stage reads CLIP's features from the cache: it leaves CLIP.visual alone, and the cache is on."""
    trained = [path for group in partition.groups(stage, params) for path in group.paths]
    trains_visual = any(path.startswith("visual/") for path in trained)
    return not trains_visual and inputs.config.data.cache_features and len(inputs.samples.images) > 0


def stage_features(inputs: Inputs, vlm: VLM, stage: Stage, params: Flat):
    """Cached features [images n v] where the stage leaves CLIP.visual alone, else None (images are decoded)."""
    return features_of(inputs, vlm, inputs.samples, params) if reads_features(inputs, stage, params) else None


def features_of(inputs: Inputs, vlm: VLM, split: Split, params: Flat):
    """A split's features [images n v] under these visual parameters, from the cache or computed into it."""
    visual = {path: leaf for path, leaf in params.items() if path.startswith("visual/")}
    manifest = {
        "visual": pretrained.fingerprint(partition.unflatten(visual)),
        "tower": str(vlm.visual.config),
        "tokens": vlm.features,
    }
    if isinstance(vlm.visual, Tuned):  # the leaves are among the parameters, their factor is not
        manifest["lora"] = str(vlm.visual.lora)
    # One folder for each content: data sets and arms may share data.cache.
    name = hashlib.sha256(f"{manifest} {inputs.fit} {split.images.fingerprint()}".encode()).hexdigest()[:12]
    doing("computing the vision features")
    folder = inputs.cache / "features" / f"{split.name}-{name}"
    see = functools.partial(_see, vlm, partition.unflatten(visual))
    return cached_features(
        folder,
        split,
        see,
        manifest,
        image_size=vlm.visual.config.image_size,
        fit=inputs.fit,
        dtype=inputs.dtype.name,
        threads=inputs.config.data.threads,
        mesh=inputs.mesh,
    )


# Parameters are arguments: closed over, they would be compiled into the program as constants.
@functools.partial(jax.jit, static_argnums=0)
def _see(vlm: VLM, params: dict, images: jax.Array) -> jax.Array:
    return vlm.encode_image(params, images)

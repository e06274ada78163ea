"""Pretrained towers in and out: Hugging Face directories <-> our configurations and parameter trees."""

from eim_jax.models.hugging_face import WeightsError
from eim_jax.pretrained.clip import CLIP, clip_config, clip_shapes, export_clip, load_clip
from eim_jax.pretrained.fingerprints import fingerprint
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.image_processor import ImageProcessor, image_processor
from eim_jax.pretrained.language import LM, export_lm, lm_config, lm_shapes, load_lm, with_quant

__all__ = [
    "CLIP", "LM", "ImageProcessor", "WeightsError", "clip_config", "clip_shapes", "export_clip", "export_lm",
    "fingerprint", "image_processor", "lm_config", "lm_shapes", "load_clip", "load_lm", "resolve", "with_quant",
]  # fmt: skip

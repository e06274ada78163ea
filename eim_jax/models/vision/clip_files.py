"""CLIP in Hugging Face's form: its config.json, its keys, the published sizes, and the family's record."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import (
    FUSE_BIAS,
    FUSE_KERNEL,
    PATCHES,
    TRANSPOSE,
    Row,
    WeightsError,
    dense_rows,
    norm_rows,
    our_fields,
    their_fields,
)
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vision.tower import VisionFamily

# Their config.json fields -> ours. Where a file leaves a field out, their default is ours (ViT-B/32).
TOWER_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
}
VISION_FIELDS = {**TOWER_FIELDS, "image_size": "image_size", "patch_size": "patch_size"}
LARGEST_ID = 2  # the eos_token_id of OpenAI's configs, for which transformers pools at the largest id of a text
TEXT_FIELDS = {**TOWER_FIELDS, "vocab_size": "vocab", "max_position_embeddings": "context", "eos_token_id": "eos_id"}


def read_config(theirs: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """Returns both towers' shapes.

    Args:
      theirs: config.json's content.
      preprocessor: the channel statistics, image_mean and image_std; {} where the folder states none.

    Raises:
      WeightsError: it states what this CLIP cannot do.
    """
    vision, text = _tower(theirs, "vision_config"), _tower(theirs, "text_config")
    joint = our_fields(theirs, {"projection_dim": "joint"}, CLIPVisionConfig).get("joint", 512)
    for name, tower in (("vision_config", vision), ("text_config", text)):
        if tower.get("num_channels", 3) != 3:
            raise WeightsError(f"{name}.num_channels {tower['num_channels']!r} is not supported, only 3")
        if tower.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
            raise WeightsError(f"{name}.hidden_act {tower['hidden_act']!r} is neither 'quick_gelu' nor 'gelu'")
    t = CLIPTextConfig(**our_fields(text, TEXT_FIELDS, CLIPTextConfig, "text_config."), joint=joint)
    if t.eos_id == LARGEST_ID:
        t = dataclasses.replace(t, eos_id=None)
    elif t.eos_id is None or not 0 <= t.eos_id < t.vocab:
        raise WeightsError(f"text_config.eos_token_id {t.eos_id} is not in the vocabulary")
    statistics = our_fields(preprocessor, {"image_mean": "mean", "image_std": "std"})
    fields = our_fields(vision, VISION_FIELDS, CLIPVisionConfig, "vision_config.")
    fields |= {name: tuple(values) for name, values in statistics.items()}
    v = CLIPVisionConfig(**fields, joint=joint)
    for name, tower in (("vision_config", v), ("text_config", t)):
        if tower.width % tower.heads:
            raise WeightsError(
                f"{name}.hidden_size {tower.width} is not a multiple of num_attention_heads {tower.heads}"
            )
    return v, t


def _tower(theirs: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """A tower's part of config.json. An older file's `..._dict` beside it wins as a whole, as in transformers."""
    older = theirs.get(f"{field}_dict")
    part = (theirs.get(field) or {}) if older is None else older
    if not isinstance(part, Mapping):
        raise WeightsError(f"{field}{'' if older is None else '_dict'} is {part!r:.60}, not an object")
    return part


def write_config(v: CLIPVisionConfig, t: CLIPTextConfig, logit_scale: float) -> dict[str, Any]:
    """Returns config.json's content.

    Raises:
      WeightsError: the text tower's eos_id is 2, which the format reserves.
    """
    if t.eos_id == LARGEST_ID:
        raise WeightsError("eos_id 2 cannot be exported: Hugging Face's CLIP reads it as 'the largest id in the text'")
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": LARGEST_ID}  # as in OpenAI's
    if t.eos_id is not None:
        special = {"bos_token_id": t.eos_id - 1, "pad_token_id": t.eos_id}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": v.joint,
        "logit_scale_init_value": logit_scale,
        "vision_config": {
            **their_fields(v, VISION_FIELDS),
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "projection_dim": v.joint,
        },
        "text_config": {
            **their_fields(t, TEXT_FIELDS),
            **special,
            "model_type": "clip_text_model",
            "projection_dim": t.joint,
        },
    }


def write_preprocessor(v: CLIPVisionConfig) -> dict[str, Any]:
    """Returns preprocessor_config.json's content: CLIP's resize, crop and channel statistics."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": v.image_size},
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "resample": 3,  # PIL's bicubic
        "image_mean": list(v.mean),
        "image_std": list(v.std),
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
    }


def _blocks(tower: str, model: str) -> list[Row]:
    ours, theirs = f"{tower}/blocks_{{i}}", f"{model}.encoder.layers.{{i}}"
    qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
    return [
        *norm_rows(f"{ours}/ln_1", f"{theirs}.layer_norm1"),
        Row(f"{ours}/attn/qkv/kernel", tuple(f"{x}.weight" for x in qkv), FUSE_KERNEL),
        Row(f"{ours}/attn/qkv/bias", tuple(f"{x}.bias" for x in qkv), FUSE_BIAS),
        *dense_rows(f"{ours}/attn/out", f"{theirs}.self_attn.out_proj"),
        *norm_rows(f"{ours}/ln_2", f"{theirs}.layer_norm2"),
        *dense_rows(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *dense_rows(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


ROWS = (
    Row("visual/class_embedding", ("vision_model.embeddings.class_embedding",)),
    Row("visual/patch_embedding/kernel", ("vision_model.embeddings.patch_embedding.weight",), PATCHES),
    Row("visual/position_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    *norm_rows("visual/pre_ln", "vision_model.pre_layrnorm"),  # spelt so in every checkpoint
    *_blocks("visual", "vision_model"),
    *norm_rows("visual/post_ln", "vision_model.post_layernorm"),
    Row("visual/projection/kernel", ("visual_projection.weight",), TRANSPOSE),
    Row("text/token_embedding/embedding", ("text_model.embeddings.token_embedding.weight",)),
    Row("text/position_embedding", ("text_model.embeddings.position_embedding.weight",)),
    *_blocks("text", "text_model"),
    *norm_rows("text/final_ln", "text_model.final_layer_norm"),
    Row("text/projection/kernel", ("text_projection.weight",), TRANSPOSE),
)

_L14 = CLIPVisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp=4096, joint=768)
_L14_TEXT = CLIPTextConfig(width=768, heads=12, mlp=3072, joint=768)

CLIP_FAMILY = VisionFamily(
    model_type="clip",
    features=CLIPVision.features,
    build=CLIPVision,
    build_text=CLIPText,
    read=read_config,
    write=write_config,
    write_preprocessor=write_preprocessor,
    rows=ROWS,
    eos="eos_id",
    ignored=r"(vision|text)_model\.embeddings\.position_ids",  # 0, 1, 2, ...
    in_llava=True,
    published={
        "openai/clip-vit-base-patch32": (CLIPVisionConfig(), CLIPTextConfig()),
        "openai/clip-vit-base-patch16": (CLIPVisionConfig(patch_size=16), CLIPTextConfig()),
        "openai/clip-vit-large-patch14": (_L14, _L14_TEXT),
        "openai/clip-vit-large-patch14-336": (dataclasses.replace(_L14, image_size=336), _L14_TEXT),
    },
)

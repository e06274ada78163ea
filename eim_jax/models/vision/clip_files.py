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
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_new"}  # hidden_act -> ours
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
    vision, text = (read_tower(theirs, part, "quick_gelu") for part in ("vision_config", "text_config"))
    joint = our_fields(theirs, {"projection_dim": "joint"}, CLIPVisionConfig).get("joint", 512)
    t = CLIPTextConfig(**our_fields(text, TEXT_FIELDS, CLIPTextConfig, "text_config."), joint=joint)
    if t.eos_id == LARGEST_ID:
        t = dataclasses.replace(t, eos_id=None)
    elif t.eos_id is None or not 0 <= t.eos_id < t.vocab:
        raise WeightsError(f"text_config.eos_token_id {t.eos_id} is not in the vocabulary")
    statistics = our_fields(preprocessor, {"image_mean": "mean", "image_std": "std"})
    fields = our_fields(vision, VISION_FIELDS, CLIPVisionConfig, "vision_config.")
    fields |= {name: tuple(values) for name, values in statistics.items()}
    v = CLIPVisionConfig(**fields, joint=joint)
    check_heads(v, t)
    return v, t


def check_heads(v: Any, t: Any) -> None:
    """Raises WeightsError where a tower's heads do not divide its width."""
    for name, tower in (("vision_config", v), ("text_config", t)):
        if tower.width % tower.heads:
            raise WeightsError(
                f"{name}.hidden_size {tower.width} is not a multiple of num_attention_heads {tower.heads}"
            )


def read_tower(theirs: Mapping[str, Any], field: str, activation: str) -> dict[str, Any]:
    """Returns a tower's part of config.json, its `hidden_act` by our name.

    An older file's `..._dict` beside it wins as a whole, as in transformers.

    Args:
      theirs: config.json's content.
      field: "vision_config" or "text_config".
      activation: the `hidden_act` of a part that states none.

    Raises:
      WeightsError: it is no object, or states what none of these towers can do.
    """
    older = theirs.get(f"{field}_dict")
    part = (theirs.get(field) or {}) if older is None else older
    if not isinstance(part, Mapping):
        raise WeightsError(f"{field}{'' if older is None else '_dict'} is {part!r:.60}, not an object")
    if part.get("num_channels", 3) != 3:
        raise WeightsError(f"{field}.num_channels {part['num_channels']!r} is not supported, only 3")
    stated = part.get("hidden_act", activation)
    if not isinstance(stated, str) or stated not in ACTIVATIONS:
        raise WeightsError(f"{field}.hidden_act {stated!r} is not one of {', '.join(ACTIVATIONS)}")
    return {**part, "hidden_act": ACTIVATIONS[stated]}


def tower_fields(ours: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    """Returns a tower's part of config.json, its activation by the name there; `fields` as in `our_fields`."""
    names = {our: their for their, our in ACTIVATIONS.items()}
    return {**their_fields(ours, fields), "hidden_act": names[ours.activation]}


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
            **tower_fields(v, VISION_FIELDS),
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "projection_dim": v.joint,
        },
        "text_config": {
            **tower_fields(t, TEXT_FIELDS),
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


def encoder_rows(tower: str, model: str) -> list[Row]:
    """Returns the rows of all blocks of a tower that transformers writes as CLIP's."""
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
    *encoder_rows("visual", "vision_model"),
    *norm_rows("visual/post_ln", "vision_model.post_layernorm"),
    Row("visual/projection/kernel", ("visual_projection.weight",), TRANSPOSE),
    Row("text/token_embedding/embedding", ("text_model.embeddings.token_embedding.weight",)),
    Row("text/position_embedding", ("text_model.embeddings.position_embedding.weight",)),
    *encoder_rows("text", "text_model"),
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

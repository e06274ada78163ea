"""SigLIP in Hugging Face's form, and SigLIP 2 where its resolution is fixed, which is the same form."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import PATCHES, Layout, Row, WeightsError, dense_rows, norm_rows, our_fields
from eim_jax.models.vision.clip_files import TOWER_FIELDS, check_heads, encoder_rows, read_tower, tower_fields
from eim_jax.models.vision.siglip import SigLIPText, SigLIPTextConfig, SigLIPVision, SigLIPVisionConfig
from eim_jax.models.vision.tower import VisionFamily

VISION_FIELDS = {**TOWER_FIELDS, "image_size": "image_size", "patch_size": "patch_size"}
TEXT_FIELDS = {**TOWER_FIELDS, "vocab_size": "vocab", "max_position_embeddings": "context", "projection_size": "joint"}
# torch.nn.MultiheadAttention keeps the maps of query, key and value as one matrix [3 v, v], bias [3 v].
IN_KERNEL = Layout(
    lambda a: a[0].T.reshape(a[0].shape[1], 3, -1),
    lambda x: [x.reshape(x.shape[0], -1).T],
)
IN_BIAS = Layout(lambda a: a[0].reshape(3, -1), lambda x: [x.reshape(-1)])
ONE = Layout(lambda a: a[0].reshape(-1), lambda x: [x[None, None]])


def read_config(
    theirs: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> tuple[SigLIPVisionConfig, SigLIPTextConfig]:
    """Returns both towers' shapes; the arguments are those of `VisionFamily.read`.

    Raises:
      WeightsError: it states what this SigLIP cannot do.
    """
    vision = read_tower(theirs, "vision_config", "gelu_pytorch_tanh")
    text = read_tower(theirs, "text_config", "gelu_pytorch_tanh")
    if vision.get("vision_use_head") is False:
        raise WeightsError("vision_config.vision_use_head false is not supported: no head pools the image's vector")
    fields = our_fields(text, TEXT_FIELDS, SigLIPTextConfig, "text_config.")
    fields.setdefault("joint", fields.get("width", SigLIPTextConfig.width))
    t = SigLIPTextConfig(**fields)
    fields = our_fields(vision, VISION_FIELDS, SigLIPVisionConfig, "vision_config.")
    fields |= {k: tuple(x) for k, x in our_fields(preprocessor, {"image_mean": "mean", "image_std": "std"}).items()}
    v = SigLIPVisionConfig(**fields)
    check_heads(v, t)
    if v.joint != t.joint:
        raise WeightsError(
            f"text_config.projection_size {t.joint} is not vision_config.hidden_size {v.width}: SigLIP's image vector "
            "has no projection, so that the two share no space"
        )
    return v, t


def write_config(v: SigLIPVisionConfig, t: SigLIPTextConfig | None, logit_scale: float) -> dict[str, Any]:
    """Returns config.json's content."""
    assert t is not None, "both towers come from one folder"
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": {**tower_fields(v, VISION_FIELDS), "model_type": "siglip_vision_model", "num_channels": 3},
        "text_config": {
            **tower_fields(t, TEXT_FIELDS),
            **{"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1},  # of both tokenizers EOS is 1
            "model_type": "siglip_text_model",
        },
    }


def write_preprocessor(v: SigLIPVisionConfig) -> dict[str, Any]:
    """Returns preprocessor_config.json's content: the whole picture as a square, of any aspect."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": v.image_size, "width": v.image_size},
        "resample": 3,  # PIL's bicubic
        "image_mean": list(v.mean),
        "image_std": list(v.std),
        **{f"do_{step}": True for step in ("resize", "rescale", "normalize", "convert_rgb")},
    }


_HEAD = "vision_model.head"

ROWS = (
    *dense_rows("visual/patch_embedding", "vision_model.embeddings.patch_embedding", PATCHES),
    Row("visual/position_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    *encoder_rows("visual", "vision_model"),
    *norm_rows("visual/post_ln", "vision_model.post_layernorm"),
    Row("visual/pool/probe", (f"{_HEAD}.probe",), ONE),
    Row("visual/pool/qkv/kernel", (f"{_HEAD}.attention.in_proj_weight",), IN_KERNEL),
    Row("visual/pool/qkv/bias", (f"{_HEAD}.attention.in_proj_bias",), IN_BIAS),
    *dense_rows("visual/pool/out", f"{_HEAD}.attention.out_proj"),
    *norm_rows("visual/pool/ln", f"{_HEAD}.layernorm"),
    *dense_rows("visual/pool/mlp/up", f"{_HEAD}.mlp.fc1"),
    *dense_rows("visual/pool/mlp/down", f"{_HEAD}.mlp.fc2"),
    Row("text/token_embedding/embedding", ("text_model.embeddings.token_embedding.weight",)),
    Row("text/position_embedding", ("text_model.embeddings.position_embedding.weight",)),
    *encoder_rows("text", "text_model"),
    *norm_rows("text/final_ln", "text_model.final_layer_norm"),
    *dense_rows("text/projection", "text_model.head"),
)


def _sizes(vocab: int, image_size: int, patch: int, width: int, layers: int, heads: int, mlp: int) -> tuple[Any, Any]:
    """A published model's shapes: both towers have one width and depth."""
    vision = SigLIPVisionConfig(image_size, patch, width, layers, heads, mlp)
    return vision, SigLIPTextConfig(vocab, 64, width, layers, heads, mlp, joint=width)


_BASE, _LARGE, _SO = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)

SIGLIP_FAMILY = VisionFamily(
    model_type="siglip",
    features=SigLIPVision.features,
    build=SigLIPVision,
    build_text=SigLIPText,
    read=read_config,
    write=write_config,
    write_preprocessor=write_preprocessor,
    rows=ROWS,
    ignored=r"(vision|text)_model\.embeddings\.position_ids|logit_bias",
    processor="Siglip",
    pads=True,
    published={
        "google/siglip-base-patch16-224": _sizes(32000, 224, 16, *_BASE),
        "google/siglip-large-patch16-384": _sizes(32000, 384, 16, *_LARGE),
        "google/siglip-so400m-patch14-384": _sizes(32000, 384, 14, *_SO),
        "google/siglip2-base-patch16-224": _sizes(256000, 224, 16, *_BASE),
        "google/siglip2-large-patch16-384": _sizes(256000, 384, 16, *_LARGE),
        "google/siglip2-so400m-patch14-384": _sizes(256000, 384, 14, *_SO),
    },
)

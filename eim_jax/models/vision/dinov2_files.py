"""DINOv2 in Hugging Face's form: its config.json, its keys, the published sizes, and the family's record."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import (
    FUSE_BIAS,
    FUSE_KERNEL,
    PATCHES,
    Layout,
    Row,
    WeightsError,
    check_fixed,
    dense_rows,
    norm_rows,
    our_fields,
    their_fields,
)
from eim_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from eim_jax.models.vision.tower import VisionFamily

FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "use_swiglu_ffn": "gated",
    "qkv_bias": "qkv_bias",
}
FIRST = Layout(lambda a: a[0].reshape(a[0].shape[-2:]), lambda x: [x[None]])  # [1, n, v]
ONLY = Layout(lambda a: a[0].reshape(-1), lambda x: [x[None, None]])  # [1, 1, v]


def read_config(theirs: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> tuple[DINOv2Config, None]:
    """Returns the tower's shape, and None for the text tower; the arguments are those of `VisionFamily.read`.

    Raises:
      WeightsError: it states what this DINOv2 cannot do.
    """
    check_fixed(theirs, {"num_channels": 3, "hidden_act": "gelu"})
    fields = our_fields(theirs, FIELDS, DINOv2Config)
    fields |= {k: tuple(x) for k, x in our_fields(preprocessor, {"image_mean": "mean", "image_std": "std"}).items()}
    ratio = theirs.get("mlp_ratio", 4)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 64:
        raise WeightsError(f"mlp_ratio is {ratio!r:.60}, not a number above 0 and at most 64")
    width, heads = fields.get("width", DINOv2Config.width), fields.get("heads", DINOv2Config.heads)
    if width % heads:
        raise WeightsError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    mlp = int(width * ratio)
    if fields.get("gated"):  # two thirds, as there are two such layers, in whole eights
        mlp = (int(mlp * 2 / 3) + 7) // 8 * 8
        fields["activation"] = "silu"
    return DINOv2Config(**{"image_size": 224, **fields, "mlp": mlp}), None


def write_config(v: DINOv2Config, t: None, logit_scale: float) -> dict[str, Any]:
    """Returns config.json's content."""
    return {
        **their_fields(v, FIELDS),
        "hidden_act": "gelu",
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "mlp_ratio": 4 if v.gated else v.mlp // v.width,
        "num_channels": 3,
        "use_mask_token": False,  # it stands for patches that are hidden in its own training
    }


def write_preprocessor(v: DINOv2Config) -> dict[str, Any]:
    """Returns preprocessor_config.json's content: resize, a crop of 7/8 of it, ImageNet's statistics."""
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(v.image_size * 8 / 7)},
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "resample": 3,  # PIL's bicubic
        "image_mean": list(v.mean),
        "image_std": list(v.std),
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
    }


def rows(v: DINOv2Config) -> tuple[Row, ...]:
    """Returns the key table: its MLP has two forms, and query, key and value may have no biases."""
    ours, theirs = "visual/blocks_{i}", "encoder.layer.{i}"
    qkv = [f"{theirs}.attention.attention.{name}" for name in ("query", "key", "value")]
    up, down = ("weights_in", "weights_out") if v.gated else ("fc1", "fc2")
    biases = [Row(f"{ours}/attn/qkv/bias", tuple(f"{x}.bias" for x in qkv), FUSE_BIAS)] if v.qkv_bias else []
    return (
        Row("visual/class_embedding", ("embeddings.cls_token",), ONLY),
        *dense_rows("visual/patch_embedding", "embeddings.patch_embeddings.projection", PATCHES),
        Row("visual/position_embedding", ("embeddings.position_embeddings",), FIRST),
        *norm_rows(f"{ours}/ln_1", f"{theirs}.norm1"),
        Row(f"{ours}/attn/qkv/kernel", tuple(f"{x}.weight" for x in qkv), FUSE_KERNEL),
        *biases,
        *dense_rows(f"{ours}/attn/out", f"{theirs}.attention.output.dense"),
        Row(f"{ours}/ls_1/scale", (f"{theirs}.layer_scale1.lambda1",)),
        *norm_rows(f"{ours}/ln_2", f"{theirs}.norm2"),
        *dense_rows(f"{ours}/mlp/up", f"{theirs}.mlp.{up}"),
        *dense_rows(f"{ours}/mlp/down", f"{theirs}.mlp.{down}"),
        Row(f"{ours}/ls_2/scale", (f"{theirs}.layer_scale2.lambda1",)),
        *norm_rows("visual/post_ln", "layernorm"),
    )


DINOV2_FAMILY = VisionFamily(
    model_type="dinov2",
    features=DINOv2.features,
    build=DINOv2,
    build_text=None,
    read=read_config,
    write=write_config,
    write_preprocessor=write_preprocessor,
    rows=rows,
    ignored=r"embeddings\.mask_token",
    processor="DINOv2",
    resizes=True,
    drawn=("projection",),
    # Their image processors show 224 pixels.
    published={
        "facebook/dinov2-small": (DINOv2Config(224, width=384, heads=6, mlp=1536), None),
        "facebook/dinov2-base": (DINOv2Config(224), None),
        "facebook/dinov2-large": (DINOv2Config(224, width=1024, layers=24, heads=16, mlp=4096), None),
        "facebook/dinov2-giant": (
            DINOv2Config(224, width=1536, layers=40, heads=24, mlp=4096, activation="silu", gated=True),
            None,
        ),
    },
)

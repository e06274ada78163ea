"""Pretrained towers in and out: Hugging Face directories (config.json + safetensors) <-> our configurations and trees.

CLIP's `logit_scale` is no parameter of ours (EIM's tau is a constant): it is kept beside the trees and exported again.
Prompts, which Hugging Face's CLIP does not know, live in a file of their own, prompt.safetensors.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.parallel.processes import fetch
from eim_jax.pretrained import key_tables, reader
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.reader import WeightsError

PROMPT_FILE = "prompt.safetensors"
# Their config.json fields -> ours. Where a file leaves a field out, their default is ours (ViT-B/32, GPT-2 small).
TOWER_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
}
VISION_FIELDS = {**TOWER_FIELDS, "image_size": "image_size", "patch_size": "patch_size"}
TEXT_FIELDS = {**TOWER_FIELDS, "vocab_size": "vocab", "max_position_embeddings": "context", "eos_token_id": "eos_id"}


class CLIP(NamedTuple):
    """Both towers of a CLIP: configurations and params {"visual": ..., "text": ...}."""

    vision: CLIPVisionConfig
    text: CLIPTextConfig
    params: dict
    logit_scale: float = math.log(1 / 0.07)


def clip_config(
    path: str | pathlib.Path,
    *,
    scan: bool = False,
    remat: str = "none",
    attention: str = "softmax",
    dtype: DTypeLike = jnp.float32,
) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """Returns the configurations of a CLIP checkpoint without reading its weights; arguments as load_clip.

    Raises:
      WeightsError: a missing file or an unsupported field, by name.
    """
    directory = resolve(path)
    config = reader.hf_config(directory, "clip")
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    speed = {"joint": config.get("projection_dim", 512), "scan": scan, "remat": remat}
    speed |= {"attention": attention, "dtype": dtype}
    for name, tower in (("vision_config", vision), ("text_config", text)):
        if tower.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
            raise WeightsError(
                f"{directory}/config.json: {name}.hidden_act {tower['hidden_act']!r} is neither 'quick_gelu' nor 'gelu'"
            )
    t = CLIPTextConfig(**reader.ours(text, TEXT_FIELDS), **speed)
    if t.eos_id == 2:
        # OpenAI's configs give 2, which is not their [EOS]; transformers then pools at the largest id, which is.
        t = dataclasses.replace(t, eos_id=t.vocab - 1)
    if not 0 <= t.eos_id < t.vocab:
        raise WeightsError(f"{directory}/config.json: text_config.eos_token_id {t.eos_id} is not in the vocabulary")
    v = CLIPVisionConfig(**reader.ours(vision, VISION_FIELDS), **speed)
    preprocessor = directory / "preprocessor_config.json"
    if preprocessor.is_file():
        statistics = reader.ours(reader.read_json(preprocessor), {"image_mean": "mean", "image_std": "std"})
        v = dataclasses.replace(v, **{k: tuple(x) for k, x in statistics.items()})
    prompt = _read_prompt(directory)
    if prompt:
        hidden = prompt["up/bias"].shape[1] if "up/bias" in prompt else 0
        v = dataclasses.replace(v, prompts=prompt["tokens"].shape[1], prompt_hidden=hidden)
    return v, t


def _read_prompt(directory: pathlib.Path) -> dict[str, np.ndarray]:
    path = directory / PROMPT_FILE
    return load_file(path) if path.is_file() else {}


def load_clip(
    path: str | pathlib.Path,
    *,
    scan: bool = False,
    remat: str = "none",
    attention: str = "softmax",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32,
    shardings: Callable[[str], Any] | None = None,
) -> CLIP:
    """Loads both towers of a CLIP checkpoint.

    Args:
      path: anything `resolve` takes.
      scan: stack the layers' leaves.
      remat: the configurations' remat policy.
      attention: the configurations' attention.
      dtype: the configurations' compute dtype.
      param_dtype: of the leaves, or our path -> each leaf's.
      shardings: our path ("visual/blocks_0/attn/qkv/kernel") -> where the leaf goes; the default device if None.

    Raises:
      WeightsError: a missing file, a wrong or missing key or shape, an unsupported configuration.
    """
    directory = resolve(path)
    vision, text = clip_config(directory, scan=scan, remat=remat, attention=attention, dtype=dtype)
    leaves = key_tables.table_leaves(key_tables.CLIP_TABLE, {"visual": vision.layers, "text": text.layers}, scan)
    shapes = clip_shapes(vision, text)
    with contextlib.ExitStack() as stack:
        tensors = reader.Tensors(directory, stack)
        reader.check_keys(directory, tensors, leaves, shapes, f"{key_tables.CLIP_IGNORED}|logit_scale")
        flat = reader.read_leaves(tensors, leaves, dtype=param_dtype, shardings=shardings)
        scale = {"logit_scale": float(tensors.read("logit_scale"))} if "logit_scale" in tensors else {}
    prompt = {f"visual/prompt/{k}": x for k, x in _read_prompt(directory).items()}
    expected = {k: s.shape for k, s in shapes.items() if k.startswith("visual/prompt/")}
    if (found := {k: x.shape for k, x in prompt.items()}) != expected:
        raise WeightsError(f"{directory}/{PROMPT_FILE} holds {found}; with config.json it should be {expected}")
    for leaf, array in prompt.items():
        flat[leaf] = reader.place(
            array.astype(reader.kind_of(param_dtype, leaf)), shardings(leaf) if shardings else None
        )
    return CLIP(vision, text, unflatten_dict(flat, sep="/"), **scale)


def clip_shapes(vision: CLIPVisionConfig, text: CLIPTextConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns our paths ("visual/...", "text/...") -> shape and dtype, without allocating anything."""
    pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, text.context), jnp.int32)
    visual = jax.eval_shape(CLIPVision(vision).init, jax.random.key(0), pixels)
    caption = jax.eval_shape(CLIPText(text).init, jax.random.key(0), tokens)
    return flatten_dict({"visual": visual["params"], "text": caption["params"]}, sep="/")


def export_clip(directory: str | pathlib.Path, clip: CLIP) -> None:
    """Writes both towers as a directory that transformers' CLIPModel and load_clip read.

    Prompts, folded or not, go to prompt.safetensors, which load_clip reads and transformers ignores.

    Raises:
      WeightsError: a leaf is missing or unexpected, or the text tower's eos_id is 2, which the format reserves.
    """
    v, t = clip.vision, clip.text
    if t.eos_id == 2:
        raise WeightsError("eos_id 2 cannot be exported: Hugging Face's CLIP reads it as 'the largest id in the text'")
    flat = flatten_dict(clip.params, sep="/")
    prompt = {
        k.removeprefix("visual/prompt/"): np.asarray(x) for k, x in flat.items() if k.startswith("visual/prompt/")
    }
    leaves = key_tables.table_leaves(key_tables.CLIP_TABLE, {"visual": v.layers, "text": t.layers}, v.scan)
    tensors = reader.write_leaves({k: x for k, x in flat.items() if not k.startswith("visual/prompt/")}, leaves)
    tensors["logit_scale"] = np.asarray(clip.logit_scale, np.float32)
    special = {"bos_token_id": t.eos_id - 1, "pad_token_id": t.eos_id}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": v.joint,
        "logit_scale_init_value": clip.logit_scale,
        "vision_config": {
            **reader.theirs(v, VISION_FIELDS),
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "projection_dim": v.joint,
        },
        "text_config": {
            **reader.theirs(t, TEXT_FIELDS),
            **special,
            "model_type": "clip_text_model",
            "projection_dim": t.joint,
        },
    }
    directory = reader.write(directory, config, tensors)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": v.image_size},
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "resample": 3,  # PIL's bicubic
        "image_mean": list(v.mean),
        "image_std": list(v.std),
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2, sort_keys=True) + "\n")
    (directory / PROMPT_FILE).unlink(missing_ok=True)
    if prompt:
        save_file(prompt, directory / PROMPT_FILE)


def fingerprint(source: str | pathlib.Path | dict) -> str:
    """Returns 16 hex digits of SHA-256 over a checkpoint, for manifests that must notice other weights.

    Args:
      source: what `resolve` takes: the bytes of the safetensors files and the configuration count, not names or
        versions noted in it; or a parameter tree: paths, dtypes, shapes and bytes count. The two never agree.
    """
    digest = hashlib.sha256()
    if isinstance(source, dict):
        for path, leaf in sorted(flatten_dict(source, sep="/").items()):
            array = fetch(leaf)
            digest.update(f"{path} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]
    directory = resolve(source)
    config = reader.read_json(directory / "config.json")
    meaning = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(meaning, sort_keys=True).encode())
    prompt = directory / PROMPT_FILE
    for path in [*reader.weight_files(directory), *([prompt] if prompt.is_file() else [])]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]

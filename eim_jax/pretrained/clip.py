"""The two towers of image and text in and out: Hugging Face directories <-> our shapes and parameter trees.

What tells one family of towers from another is in its record (`models/vision.VISION_TOWERS`); nothing here names one.
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
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from eim_jax.models.hugging_face import WeightsError
from eim_jax.models.stacks import Form
from eim_jax.models.vision import VISION_TOWERS
from eim_jax.parallel.processes import fetch
from eim_jax.pretrained import json_files, reader, weight_files
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.image_processor import image_processor
from eim_jax.pretrained.language import config_file

PROMPT_FILE = "prompt.safetensors"


class CLIP(NamedTuple):
    """Both towers of a CLIP: their shapes and params {"visual": ..., "text": ...}."""

    vision: Any
    text: Any
    params: dict
    logit_scale: float = math.log(1 / 0.07)


def clip_config(path: str | pathlib.Path, **form: Unpack[Form]) -> tuple[Any, Any]:
    """Returns the shapes of a checkpoint's vision and text tower without reading its weights.

    Args:
      path: anything `resolve` takes.
      **form: how they are computed (`stacks.Form`).

    Raises:
      WeightsError: a missing file or an unsupported field, by name.

    >>> vision, text = clip_config("miniature/clip")
    >>> vision.image_size, text.context
    (32, 32)
    """
    directory = resolve(path)
    family, theirs = json_files.of_table(directory, VISION_TOWERS, "the pair of image and text towers")
    pictures = image_processor(directory)
    statistics = {"image_mean": pictures.mean, "image_std": pictures.std} if pictures.file else {}
    with json_files.naming(directory / "config.json"):
        v, t = family.read(theirs, statistics)
    weight_files.check_depth(directory, {"visual": v.layers, "text": t.layers})
    from eim_jax.pretrained import tokenizer  # here, so that towers without a folder need no transformers

    if family.eos and (end := tokenizer.eos_id(directory)) is not None:
        if end >= t.vocab:
            raise WeightsError(
                f"{directory}: its tokenizer's EOS is {end}, but config.json's text_config.vocab_size is {t.vocab}: "
                "the tokenizer files are another model's"
            )
        t = dataclasses.replace(t, **{family.eos: end})
    v, t = dataclasses.replace(v, **form), dataclasses.replace(t, **form)
    prompt = _read_prompt(directory)
    if prompt:
        hidden = prompt["up/bias"].shape[1] if "up/bias" in prompt else 0
        v = dataclasses.replace(v, prompts=prompt["tokens"].shape[1], prompt_hidden=hidden)
    return v, t


def _read_prompt(directory: pathlib.Path) -> dict[str, np.ndarray]:
    path = directory / PROMPT_FILE
    try:
        found = load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); export it again") from error
    shapes = {key: array.shape for key, array in found.items()}
    if shapes and (len(shapes.get("tokens", ())) != 3 or len(shapes.get("up/bias", (1, 1))) != 2):
        raise WeightsError(f"{path} holds {shapes}, not prompts; export it again")
    return found


def load_clip(
    path: str | pathlib.Path,
    *,
    param_dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32,
    shardings: Callable[[str], Any] | None = None,
    **form: Unpack[Form],
) -> CLIP:
    """Loads both towers of a checkpoint.

    Args:
      path: anything `resolve` takes.
      param_dtype: of the leaves, or our path -> each leaf's.
      shardings: our path ("visual/blocks_0/attn/qkv/kernel") -> where the leaf goes; the default device if None.
      **form: how they are computed (`stacks.Form`).

    Raises:
      WeightsError: a missing file, a wrong or missing key or shape, an unsupported configuration.
    """
    directory = resolve(path)
    vision, text = clip_config(directory, **form)
    family = VISION_TOWERS[vision.model_type]
    leaves = reader.leaves_of(family.rows, {"visual": vision.layers, "text": text.layers}, vision.scan)
    shapes = clip_shapes(vision, text)
    with contextlib.ExitStack() as stack:
        tensors = weight_files.Tensors(weight_files.open_weights(directory, stack))
        if "logit_scale" in tensors and math.prod(tensors.shape("logit_scale")) != 1:
            raise WeightsError(f"{directory}: key 'logit_scale' has shape {tensors.shape('logit_scale')}, not ()")
        weight_files.check_keys(directory, tensors, leaves, shapes, f"{family.ignored}|logit_scale")
        flat = reader.read_leaves(tensors, leaves, dtype=param_dtype, shardings=shardings)
        scale = {"logit_scale": tensors.read("logit_scale").item()} if "logit_scale" in tensors else {}
    prompt = {f"visual/prompt/{k}": x for k, x in _read_prompt(directory).items()}
    expected = {k: s.shape for k, s in shapes.items() if k.startswith("visual/prompt/")}
    if (found := {k: x.shape for k, x in prompt.items()}) != expected:
        raise WeightsError(f"{directory}/{PROMPT_FILE} holds {found}; with config.json it should be {expected}")
    for leaf, array in prompt.items():
        flat[leaf] = reader.place(
            array.astype(reader.kind_of(param_dtype, leaf)), shardings(leaf) if shardings else None
        )
    return CLIP(vision, text, unflatten_dict(flat, sep="/"), **scale)


def clip_shapes(vision: Any, text: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns our paths ("visual/...", "text/...") -> shape and dtype, without allocating anything."""
    family = VISION_TOWERS[vision.model_type]
    pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, text.context), jnp.int32)
    visual = jax.eval_shape(family.build(vision).init, jax.random.key(0), pixels)
    caption = jax.eval_shape(family.build_text(text).init, jax.random.key(0), tokens)
    return flatten_dict({"visual": visual["params"], "text": caption["params"]}, sep="/")


def export_clip(directory: str | pathlib.Path, clip: CLIP) -> None:
    """Writes both towers as a directory that transformers (CLIPModel) and load_clip read.

    Prompts, folded or not, go to prompt.safetensors, which load_clip reads and transformers ignores.

    Raises:
      WeightsError: a leaf is missing or unexpected, or a shape is not one that the format can state.
    """
    v, t = clip.vision, clip.text
    family = VISION_TOWERS[v.model_type]
    config = family.write(v, t, clip.logit_scale)
    flat = flatten_dict(clip.params, sep="/")
    prompt = {
        k.removeprefix("visual/prompt/"): np.asarray(x) for k, x in flat.items() if k.startswith("visual/prompt/")
    }
    leaves = reader.leaves_of(family.rows, {"visual": v.layers, "text": t.layers}, v.scan)
    tensors = reader.write_leaves({k: x for k, x in flat.items() if not k.startswith("visual/prompt/")}, leaves)
    tensors["logit_scale"] = np.asarray(clip.logit_scale, np.float32)
    directory = reader.write(directory, config, tensors)
    preprocessor = family.write_preprocessor(v)
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
    config = json_files.read_json(config_file(directory))
    meaning = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(meaning, sort_keys=True).encode())
    prompt = directory / PROMPT_FILE
    for path in [*weight_files.weight_files(directory), *([prompt] if prompt.is_file() else [])]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]

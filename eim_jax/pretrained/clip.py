"""The two towers of image and text in and out: Hugging Face directories <-> our shapes and parameter trees.

What tells one family of towers from another is in its record (`models/vision.VISION_TOWERS`); nothing here names one.
CLIP's `logit_scale` is no parameter of ours (EIM's tau is a constant): it is kept beside the trees and exported again.
Prompts, which Hugging Face's CLIP does not know, live in a file of their own, prompt.safetensors.
"""

import contextlib
import dataclasses
import functools
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
from eim_jax.models.vision import REFUSED, VISION_TOWERS, VisionFamily, build_text
from eim_jax.pretrained import json_files, reader, weight_files
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.image_processor import image_processor
from eim_jax.pretrained.positions import interpolated

PROMPT_FILE = "prompt.safetensors"
POSITIONS = "visual/position_embedding"
NUMBERS = ("logit_scale", "logit_bias")


class CLIP(NamedTuple):
    """A vision tower and the text tower beside it: their shapes and params {"visual": ..., "text": ...}.

    `text` is None, and params has none, for a vision tower without one. SigLIP's files hold a `logit_bias` too.
    """

    vision: Any
    text: Any
    params: dict
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None


def clip_config(
    path: str | pathlib.Path, *, text: str | pathlib.Path = "", image_size: int = 0, **form: Unpack[Form]
) -> tuple[Any, Any]:
    """Returns the shapes of a checkpoint's vision and text tower without reading its weights.

    Args:
      path: anything `resolve` takes.
      text: the checkpoint of the text tower, for a vision tower that has none; "" where it has one, or none is needed.
      image_size: the side of the pictures that the vision tower is to see; 0 for the checkpoint's own.
      **form: how they are computed (`stacks.Form`).

    Returns:
      The two shapes; None for the text tower where there is none.

    Raises:
      WeightsError: a missing file or an unsupported field, by name.

    >>> vision, text = clip_config("miniature/clip")
    >>> vision.image_size, text.context
    (32, 32)
    """
    directory = resolve(path)
    family, v, t = _read_config(directory)
    pictures = image_processor(directory)
    own = pictures.side if family.resizes and pictures.side else v.image_size
    if (image_size or own) < v.patch_size:
        raise WeightsError(f"{directory}: pictures of {image_size or own} pixels have no patch of {v.patch_size}")
    v = dataclasses.replace(v, image_size=image_size or own, **form)
    if text:
        if t is not None:
            raise WeightsError(f"{directory} has its own text tower: config.towers.text is for one that has none")
        t = _read_config(resolve(text))[2]
        if t is None:
            raise WeightsError(f"{text} has no text tower: give a CLIP's or SigLIP's folder as config.towers.text")
        v = dataclasses.replace(v, joint=t.joint)
    t = None if t is None else dataclasses.replace(t, **form)
    prompt = _read_prompt(directory)
    if prompt:
        hidden = prompt["up/bias"].shape[1] if "up/bias" in prompt else 0
        v = dataclasses.replace(v, prompts=prompt["tokens"].shape[1], prompt_hidden=hidden)
    return v, t


def _read_config(directory: pathlib.Path) -> tuple[VisionFamily, Any, Any]:
    """The family, and the shapes as the files of this folder alone state them."""
    family, theirs = json_files.of_table(directory, VISION_TOWERS, "the vision tower", REFUSED)
    pictures = image_processor(directory)
    statistics = {"image_mean": pictures.mean, "image_std": pictures.std}
    with json_files.naming(directory / "config.json"):
        v, t = family.read(theirs, statistics)
    weight_files.check_depth(directory, _layers(v, t))
    from eim_jax.pretrained import tokenizer  # here, so that towers without a folder need no transformers

    if t is not None and family.eos and (end := tokenizer.eos_id(directory)) is not None:
        if end >= t.vocab:
            raise WeightsError(
                f"{directory}: its tokenizer's EOS is {end}, but config.json's text_config.vocab_size is {t.vocab}: "
                "the tokenizer files are another model's"
            )
        t = dataclasses.replace(t, **{family.eos: end})
    return family, v, t


def _layers(v: Any, t: Any) -> dict[str, int]:
    return {"visual": v.layers} | ({} if t is None else {"text": t.layers})


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
    text: str | pathlib.Path = "",
    image_size: int = 0,
    param_dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32,
    shardings: Callable[[str], Any] | None = None,
    **form: Unpack[Form],
) -> CLIP:
    """Loads a vision tower, and the text tower beside it or that of `text`.

    Args:
      path: anything `resolve` takes.
      text: as in `clip_config`.
      image_size: as in `clip_config`; positions are interpolated to it.
      param_dtype: of the leaves, or our path -> each leaf's.
      shardings: our path ("visual/blocks_0/attn/qkv/kernel") -> where the leaf goes; the default device if None.
      **form: how they are computed (`stacks.Form`).

    Raises:
      WeightsError: a missing file, a wrong or missing key or shape, an unsupported configuration.
    """
    directory = resolve(path)
    vision, caption = clip_config(directory, text=text, image_size=image_size, **form)
    side = vision.image_size // vision.patch_size
    flat, numbers = _read_folder(directory, vision.scan, param_dtype, shardings, side=side)
    if text:
        flat |= _read_folder(resolve(text), vision.scan, param_dtype, shardings, only="text/")[0]
    prompt = {f"visual/prompt/{k}": x for k, x in _read_prompt(directory).items()}
    shapes = clip_shapes(vision, caption)
    expected = {k: s.shape for k, s in shapes.items() if k.startswith("visual/prompt/")}
    if (found := {k: x.shape for k, x in prompt.items()}) != expected:
        raise WeightsError(f"{directory}/{PROMPT_FILE} holds {found}; with config.json it should be {expected}")
    for leaf, array in prompt.items():
        flat[leaf] = reader.place(
            array.astype(reader.kind_of(param_dtype, leaf)), shardings(leaf) if shardings else None
        )
    return CLIP(vision, caption, unflatten_dict(flat, sep="/"), **numbers)


def _read_folder(
    directory: pathlib.Path,
    scan: bool,
    param_dtype: DTypeLike | Mapping[str, DTypeLike],
    shardings: Callable[[str], Any] | None,
    *,
    only: str = "",
    side: int = 0,
) -> tuple[dict[str, Any], dict[str, float]]:
    """A folder's leaves below `only` (all are checked), and its numbers that are no parameters.

    Positions are interpolated to a grid of `side` x `side` patches; 0 leaves them as they are.
    """
    family, v, t = _read_config(directory)
    v, t = dataclasses.replace(v, scan=scan), None if t is None else dataclasses.replace(t, scan=scan)
    leaves = reader.leaves_of(family.rows_of(v), _layers(v, t), scan)
    numbers = {}
    with contextlib.ExitStack() as stack:
        tensors = weight_files.Tensors(weight_files.open_weights(directory, stack))
        for name in NUMBERS:
            if name not in tensors:
                continue
            if math.prod(tensors.shape(name)) != 1:
                raise WeightsError(f"{directory}: key {name!r} has shape {tensors.shape(name)}, not ()")
            numbers[name] = tensors.read(name).item()
        ignored = "|".join([family.ignored, *NUMBERS])
        weight_files.check_keys(directory, tensors, leaves, clip_shapes(v, t), ignored)
        wanted, own = (
            {path: leaf for path, leaf in leaves.items() if path.startswith(only)},
            v.image_size // v.patch_size,
        )
        moved = wanted.pop(POSITIONS) if side not in (0, own) else None
        flat = reader.read_leaves(tensors, wanted, dtype=param_dtype, shardings=shardings)
        if moved is not None:
            table = moved.layout.load([tensors.read(key) for key in moved.keys[0]]).astype(np.float32)
            table = interpolated(table, own, side, family.build(v).has_cls)
            kind = reader.kind_of(param_dtype, POSITIONS)
            flat[POSITIONS] = reader.place(table.astype(kind), shardings(POSITIONS) if shardings else None)
    return flat, numbers


def clip_shapes(vision: Any, text: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns our paths ("visual/...", "text/...") -> shape and dtype, without allocating anything."""
    return {**_shapes(vision, text)}


@functools.lru_cache(maxsize=8)  # a start asks three times, and towers are traced for it
def _shapes(vision: Any, text: Any) -> dict[str, jax.ShapeDtypeStruct]:
    family = VISION_TOWERS[vision.model_type]
    pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    made = {"visual": jax.eval_shape(family.build(vision).init, jax.random.key(0), pixels)["params"]}
    if text is not None:
        tokens = jax.ShapeDtypeStruct((1, text.context), jnp.int32)
        captions = build_text(vision, text)
        made["text"] = jax.eval_shape(captions.init, jax.random.key(0), tokens)["params"]
    return flatten_dict(made, sep="/")


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
    leaves = reader.leaves_of(family.rows_of(v), _layers(v, t), v.scan)
    tensors = reader.write_leaves({k: x for k, x in flat.items() if not k.startswith("visual/prompt/")}, leaves)
    if t is not None:
        # SigLIP's two numbers are vectors of one element.
        shape = () if clip.logit_bias is None else (1,)
        tensors["logit_scale"] = np.full(shape, clip.logit_scale, np.float32)
    if clip.logit_bias is not None:
        tensors["logit_bias"] = np.full((1,), clip.logit_bias, np.float32)
    directory = reader.write(directory, config, tensors)
    preprocessor = family.write_preprocessor(v)
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2, sort_keys=True) + "\n")
    (directory / PROMPT_FILE).unlink(missing_ok=True)
    if prompt:
        save_file(prompt, directory / PROMPT_FILE)

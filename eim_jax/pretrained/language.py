"""Language models in and out: Hugging Face directories <-> our shapes and parameter trees, for any known family.

What tells one family from another is in its record (`models/language.FAMILIES`); nothing here names one.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from eim_jax.models.hugging_face import WeightsError
from eim_jax.models.language import FAMILIES, Family, family_of
from eim_jax.models.quant import quantise
from eim_jax.models.stacks import Form
from eim_jax.pretrained import json_files, reader, weight_files
from eim_jax.pretrained.hub import resolve

EMBEDDING, HEAD_KEY = "lm/token_embedding/embedding", "lm_head.weight"
LAST_NORM = {"lm/norm_f/scale", "lm/ln_f/scale"}


class LM(NamedTuple):
    """A language model: the shape, of one of the families, and its parameters (the tree below "lm/")."""

    config: Any
    params: dict


def lm_config(path: str | pathlib.Path, *, quant: str = "none", **form: Unpack[Form]) -> Any:
    """Returns the shape of a checkpoint's language model without reading its weights.

    Args:
      path: anything `resolve` takes.
      quant: "nf4" holds the linear layers in 4 bits, where the family can.
      **form: how it is computed (`stacks.Form`).

    Raises:
      WeightsError: a missing file, another model, or an unsupported field, by name.

    >>> lm_config("miniature/gpt2").width
    128
    """
    return _lm_config(resolve(path), quant, form)[1]


def _lm_config(directory: pathlib.Path, quant: str, form: Form) -> tuple[Family, Any]:
    if (own := _authors(directory)) is not None:
        return own, with_quant(dataclasses.replace(_read_authors(directory, own), **form), quant, str(directory))
    family, theirs = json_files.of_table(directory, FAMILIES, "the language model")
    with json_files.naming(directory / "config.json"):
        ours = dataclasses.replace(family.read(theirs), **form)
    weight_files.check_depth(directory, {"lm": ours.layers})
    return family, with_quant(ours, quant, str(directory))


def with_quant(config: Any, quant: str, name: str) -> Any:
    """Returns a language model's shape with its linear layers held as `quant` says.

    Raises:
      WeightsError: its family has none that could be, or their width is no multiple of a block; `name` is the
        checkpoint's, for the message.
    """
    family = family_of(config)
    if family.quantised:
        held = dataclasses.replace(config, quant=quant)
        if quant != "none":
            try:
                lm_shapes(held)
            except ValueError as error:
                raise WeightsError(f"{name}: {error}; set config.towers.quant to 'none'") from error
        return held
    if quant != "none":
        able = ", ".join(f.title for f in FAMILIES.values() if f.quantised)
        raise WeightsError(f"{name}: quant {quant!r} is for the linear layers of {able}, this is a {family.title}")
    return config


def load_lm(
    path: str | pathlib.Path,
    *,
    param_dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32,
    quant: str = "none",
    shardings: Callable[[str], Any] | None = None,
    **form: Unpack[Form],
) -> LM:
    """Loads the language model of a checkpoint, of the family that its config.json names.

    Args:
      path: anything `resolve` takes.
      param_dtype: of the leaves, or our path -> each leaf's.
      quant: "nf4" holds the linear layers in 4 bits, where the family can.
      shardings: our path ("lm/...") -> where the leaf goes; the default device if None.
      **form: how it is computed (`stacks.Form`).

    Raises:
      WeightsError: a missing file, a wrong or missing key or shape, a head that differs from the embedding it is tied
        to, an unsupported model or field.
    """
    directory = resolve(path)
    family, config = _lm_config(directory, quant, form)
    shards = family.shards if _authors(directory) is not None else None
    table, ignored = (shards.rows, shards.ignored) if shards else (family.rows, family.ignored)
    leaves = reader.leaves_of(table(config), {"lm": config.layers}, config.scan)
    whole = lm_shapes(dataclasses.replace(config, quant="none") if quant != "none" else config)
    tied = all(HEAD_KEY not in keys for leaf in leaves.values() for keys in leaf.keys)
    with contextlib.ExitStack() as stack:
        files = weight_files.open_weights(directory, stack)
        if shards:
            files = {directory: weight_files.Joined(files, lambda key, shape: shards.axis(key, shape, config))}
        tensors = weight_files.Tensors(files, family.prefix)
        weight_files.check_keys(
            directory, tensors, leaves, whole, rf"{ignored}|{re.escape(HEAD_KEY)}" if tied else ignored
        )
        _check_whole(directory, tensors, leaves)
        if tied and HEAD_KEY in tensors:
            embedding = leaves[EMBEDDING].keys[0][0]
            if not np.array_equal(tensors.read(HEAD_KEY), tensors.read(embedding)):
                raise WeightsError(
                    f"{directory}: key {HEAD_KEY!r} differs from {embedding!r}, but its config.json ties the "
                    "head to the embedding (tie_word_embeddings)"
                )
        packed = {path for path in leaves if quant != "none" and re.fullmatch(family.quantised, path)}
        plain = {path: leaf for path, leaf in leaves.items() if path not in packed}
        flat = reader.read_leaves(tensors, plain, dtype=param_dtype, shardings=shardings)
        for path, leaf in leaves.items():
            if path in packed:
                flat |= _read_quantised(directory, tensors, path, leaf, shardings)
    return LM(config, unflatten_dict(flat, sep="/")["lm"])


def config_file(directory: pathlib.Path) -> pathlib.Path:
    """Returns the file that states a checkpoint's sizes: config.json, or that of its authors' own form."""
    own = _authors(directory)
    return directory / (own.shards.sizes if own is not None and own.shards is not None else "config.json")


def _authors(directory: pathlib.Path) -> Family | None:
    """The family whose authors' own files the folder holds, in place of Hugging Face's."""
    if (directory / "config.json").is_file():
        return None
    families = [family for family in FAMILIES.values() if family.shards is not None]
    if not list(directory.glob("consolidated.*.pth")):
        within = sorted(at.parent for f in families if f.shards for at in directory.glob(f"*/{f.shards.sizes}"))
        if within:  # they lay out a folder a size, below the tokenizer
            raise WeightsError(f"{directory} holds models in folders of their own: give one, such as {within[0]}")
        return None
    found = next((f for f in families if f.shards and (directory / f.shards.sizes).is_file()), None)
    if found is None:
        sizes = " or ".join(family.shards.sizes for family in families if family.shards)
        raise WeightsError(f"{directory} holds consolidated.*.pth without {sizes}, which belongs to them: download it")
    return found


def _read_authors(directory: pathlib.Path, family: Family) -> Any:
    """The shape that the authors' file of sizes states."""
    shards, first = family.shards, weight_files.weight_files(directory)[0]
    assert shards is not None, "asked for a family that _authors found"
    theirs = json_files.read_json(directory / shards.sizes)

    def shape_of(key: str) -> tuple[int, ...]:
        with contextlib.ExitStack() as stack:
            tensors = weight_files.Tensors(weight_files.open_files([first], stack))
            if key not in tensors:
                raise WeightsError(f"key {key!r} is missing in {first.name}; download it again")
            return tensors.shape(key)

    with json_files.naming(directory / shards.sizes):
        return shards.read(theirs, shape_of)


def _check_whole(directory: pathlib.Path, tensors: weight_files.Tensors, leaves: Mapping[str, reader.Leaf]) -> None:
    """Refuses differences to another model's weights (a delta), which have the keys and shapes of a whole model.

    The last norm's scales are near 1 or above in a model; in a difference, given out in 16 bits, they are near 0 and of
    either sign.
    """
    for path in LAST_NORM & leaves.keys():
        key = leaves[path].keys[0][0]
        scale = np.asarray(tensors.read(key), np.float32)
        if tensors.dtype(key) != "F32" and np.abs(scale).mean() < 0.1 and scale.min() < 0:
            raise WeightsError(
                f"{directory} holds differences to another model's weights (a delta, as Vicuna's v0 and v1.1 were "
                "given out), not a model: add them to the base once (python -m fastchat.model.apply_delta), or take "
                "whole weights (lmsys/vicuna-7b-v1.3)"
            )


def lm_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns our paths ("lm/...") -> shape and dtype for a language model's shape, without allocating anything."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    made = jax.eval_shape(family_of(config).build(config).init, jax.random.key(0), tokens)
    return flatten_dict({"lm": made["params"]}, sep="/")


def export_lm(
    directory: str | pathlib.Path,
    lm: LM,
    tokenizer: Any = None,
    *,
    dtype: DTypeLike | None = None,
    shard: str = reader.SHARD,
) -> None:
    """Writes a language model as a directory that transformers and `load_lm` read.

    Args:
      directory: made if it is not there.
      lm: shape and parameters.
      tokenizer: whose BOS and EOS config.json names; None for the family's own.
      dtype: of the weights; None for the parameters' own.
      shard: the largest file of weights ("5GB"); more are several files and an index.

    Raises:
      WeightsError: a leaf is missing or unexpected (an adapter: fold it first), or the weights are quantised.
    """
    content, tensors = lm_files(lm, dtype)
    if tokenizer is not None:
        content |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    prefix = FAMILIES[content["model_type"]].prefix
    reader.write(directory, content, {f"{prefix}{key}": x for key, x in tensors.items()}, shard)


def lm_files(lm: LM, dtype: DTypeLike | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns what `export_lm` writes: config.json's content, and key -> array without the family's prefix.

    Raises:
      As `export_lm`.
    """
    family = family_of(lm.config)
    if family.quantised and lm.config.quant != "none":
        raise WeightsError("4-bit weights are not exported: the directory they were read from holds them whole")
    c = family.stated(lm.config)
    flat = flatten_dict({"lm": lm.params}, sep="/")
    if c != lm.config:  # the biases that its files hold beside those that it has
        flat = {path: jnp.zeros(leaf.shape) for path, leaf in lm_shapes(c).items() if path.endswith("/bias")} | flat
    leaves = reader.leaves_of(family_of(c).rows(c), {"lm": c.layers}, c.scan)
    tensors, content = reader.write_leaves(flat, leaves), family_of(c).write(c)
    if dtype is not None:
        tensors = {key: x.astype(dtype) for key, x in tensors.items()}
        content |= {name: jnp.dtype(dtype).name for name in ("dtype", "torch_dtype")}  # transformers 5, 4
    return content, tensors


def _read_quantised(directory, tensors, path: str, leaf: reader.Leaf, shardings) -> dict[str, jax.Array]:
    """A kernel's NF4 leaves, quantised layer by layer as they are read."""
    layers = []
    for keys in leaf.keys:
        try:
            layers.append(quantise(leaf.layout.load([tensors.read(k) for k in keys])))
        except ValueError as error:
            raise WeightsError(f"{directory}: key {keys[0]!r} cannot be held in 4 bits: {error}") from error
    found = {}
    for name in layers[0]:
        array = np.stack([layer[name] for layer in layers]) if leaf.stacked else np.asarray(layers[0][name])
        ours = path.removesuffix("kernel") + name
        found[ours] = reader.place(array, shardings(ours) if shardings else None)
    return found

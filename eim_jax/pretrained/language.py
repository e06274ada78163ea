"""Language models in and out: Hugging Face directories of GPT-2 and LLaMA <-> our configurations and trees."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.layers import ACTIVATIONS
from eim_jax.models.quant import quantise
from eim_jax.pretrained import key_tables, reader
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.reader import WeightsError

GPT2_FIELDS = {
    "vocab_size": "vocab",
    "n_positions": "context",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "resid_pdrop": "dropout",
    "n_inner": "mlp",
    "activation_function": "activation",
    "layer_norm_epsilon": "eps",
}
# Values that a GPT-2 config.json may not change; their default first.
GPT2_FIXED = {
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
LLAMA_FIELDS = {
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
    "rms_norm_eps": "eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied",
}
# Values that a LLaMA config.json may not change.
LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class LM(NamedTuple):
    """A language model: configuration and parameters."""

    config: GPT2Config | LlamaConfig
    params: dict


class _Kind(NamedTuple):
    """What tells the checkpoints of one model_type from the others'."""

    read_config: Callable[[pathlib.Path, dict], GPT2Config | LlamaConfig]  # (directory, config.json)
    ignored: str  # keys that hold no parameter
    embedding: str  # the key of the embedding, which a tied head repeats if the file holds one


def lm_config(
    path: str | pathlib.Path,
    *,
    scan: bool = False,
    remat: str = "none",
    attention: str = "softmax",
    dtype: DTypeLike = jnp.float32,
    quant: str = "none",
) -> GPT2Config | LlamaConfig:
    """Returns the configuration of a GPT-2 or LLaMA checkpoint without reading its weights; arguments as load_lm.

    Raises:
      WeightsError: a missing file, another model, or an unsupported field, by name.
    """
    directory = resolve(path)
    kind, config = _kind(directory)
    ours = dataclasses.replace(
        kind.read_config(directory, config), scan=scan, remat=remat, attention=attention, dtype=dtype
    )
    if isinstance(ours, LlamaConfig):
        return dataclasses.replace(ours, quant=quant)
    if quant != "none":
        raise WeightsError(f"{directory}: quant {quant!r} is for the linear layers of a LLaMA, this is a GPT-2")
    return ours


def load_lm(
    path: str | pathlib.Path,
    *,
    scan: bool = False,
    remat: str = "none",
    attention: str = "softmax",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32,
    quant: str = "none",
    shardings: Callable[[str], Any] | None = None,
) -> LM:
    """Loads the language model of a checkpoint, a GPT-2 or a LLaMA by its config.json.

    Args:
      path: anything `resolve` takes.
      scan: stack the layers' leaves.
      remat: the configuration's remat policy.
      attention: the configuration's attention.
      dtype: the configuration's compute dtype.
      param_dtype: of the leaves, or our path -> each leaf's.
      quant: "nf4" holds a LLaMA's linear layers in 4 bits.
      shardings: our path ("lm/...") -> where the leaf goes; the default device if None.

    Raises:
      WeightsError: a missing file, a wrong or missing key or shape, a head that differs from the embedding it is tied
        to, an unsupported model or field.
    """
    directory = resolve(path)
    kind, _ = _kind(directory)
    config = lm_config(directory, scan=scan, remat=remat, attention=attention, dtype=dtype, quant=quant)
    leaves = key_tables.table_leaves(_table(config), {"lm": config.layers}, scan)
    whole = lm_shapes(dataclasses.replace(config, quant="none") if quant != "none" else config)
    tied = "lm/head/kernel" not in leaves
    with contextlib.ExitStack() as stack:
        tensors = reader.Tensors(directory, stack)
        reader.check_keys(
            directory, tensors, leaves, whole, rf"{kind.ignored}|lm_head\.weight" if tied else kind.ignored
        )
        if tied and "lm_head.weight" in tensors:
            head, embedding = tensors.read("lm_head.weight"), tensors.read(kind.embedding)
            if not np.array_equal(head, embedding):
                raise WeightsError(
                    f"{directory}: key 'lm_head.weight' differs from {kind.embedding!r}, but its config.json ties the "
                    "head to the embedding (tie_word_embeddings)"
                )
        plain = {path: leaf for path, leaf in leaves.items() if quant == "none" or not _is_linear(path)}
        flat = reader.read_leaves(tensors, plain, dtype=param_dtype, shardings=shardings)
        for path, leaf in leaves.items():
            if path not in plain:
                flat |= _read_quantised(directory, tensors, path, leaf, shardings)
    return LM(config, unflatten_dict(flat, sep="/")["lm"])


def lm_shapes(config: GPT2Config | LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns our paths ("lm/...") -> shape and dtype, without allocating anything."""
    module = Llama(config) if isinstance(config, LlamaConfig) else GPT2(config)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return flatten_dict({"lm": jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]}, sep="/")


def export_lm(directory: str | pathlib.Path, lm: LM) -> None:
    """Writes a language model as a directory that transformers' GPT2LMHeadModel or LlamaForCausalLM and load_lm read.

    A GPT-2's last id is declared <|endoftext|>, as in GPT-2; a LLaMA's BOS and EOS are 1 and 2.

    Raises:
      WeightsError: a leaf is missing or unexpected (an adapter: fold it first), or the weights are quantised.
    """
    c = lm.config
    if isinstance(c, LlamaConfig) and c.quant != "none":
        raise WeightsError("4-bit weights are not exported: the directory they were read from holds them whole")
    leaves = key_tables.table_leaves(_table(c), {"lm": c.layers}, c.scan)
    tensors = reader.write_leaves(flatten_dict({"lm": lm.params}, sep="/"), leaves)
    if isinstance(c, LlamaConfig):
        reader.write(directory, _llama_json(c), tensors)
    else:
        reader.write(directory, _gpt2_json(c), {f"transformer.{k}": x for k, x in tensors.items()})


def _kind(directory: pathlib.Path) -> tuple[_Kind, dict]:
    """Returns what the checkpoint is, and its config.json; raises WeightsError for another model."""
    if not (directory / "config.json").is_file() and list(directory.glob("consolidated.*.pth")):
        raise WeightsError(
            f"{directory} holds Meta's own files (consolidated.*.pth), which are not read: convert them once with "
            "transformers' convert_llama_weights_to_hf.py"
        )
    config = reader.read_json(directory / "config.json")
    name = config.get("model_type")
    if name not in _KINDS:
        raise WeightsError(
            f"{directory}/config.json: model_type is {name!r}; the language model is a 'gpt2' or 'llama'"
        )
    return _KINDS[name], config


def _table(config: GPT2Config | LlamaConfig) -> tuple[key_tables.Row, ...]:
    if isinstance(config, GPT2Config):
        return key_tables.GPT2_TABLE
    return key_tables.LLAMA_TABLE if config.tied else (*key_tables.LLAMA_TABLE, key_tables.LLAMA_HEAD)


def _check_fixed(directory: pathlib.Path, config: dict, fixed: dict) -> None:
    for field, value in fixed.items():
        if config.get(field, value) != value:
            raise WeightsError(f"{directory}/config.json: {field} {config[field]!r} is not supported, only {value!r}")


def _gpt2_config(directory: pathlib.Path, config: dict) -> GPT2Config:
    _check_fixed(directory, config, GPT2_FIXED)
    dropouts = {k: config.get(k, 0.1) for k in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(dropouts.values())) > 1:
        raise WeightsError(
            f"{directory}/config.json: {dropouts} differ; this GPT-2 has one dropout rate, set them equal"
        )
    ours = GPT2Config(**reader.ours(config, GPT2_FIELDS))
    if ours.activation not in ACTIVATIONS:
        raise WeightsError(
            f"{directory}/config.json: activation_function {ours.activation!r} is not one of {sorted(ACTIVATIONS)}"
        )
    return ours


def _gpt2_json(c: GPT2Config) -> dict:
    return {
        **reader.theirs(c, GPT2_FIELDS),
        **GPT2_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_inner": c.mlp or None,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "bos_token_id": c.vocab - 1,
        "eos_token_id": c.vocab - 1,
    }


def _llama_config(directory: pathlib.Path, config: dict) -> LlamaConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, transformers 4
    kind = rope.get("rope_type", rope.get("type", "default"))
    theirs = {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta"))}
    if kind != "default":
        raise WeightsError(f"{directory}/config.json: rope_type {kind!r} is not supported, only 'default'")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1
    if partial != 1:
        raise WeightsError(f"{directory}/config.json: partial_rotary_factor {partial} is not supported, only 1")
    _check_fixed(directory, config, LLAMA_FIXED)
    try:
        ours = LlamaConfig(**reader.ours(theirs, LLAMA_FIELDS))
    except ValueError as error:
        raise WeightsError(f"{directory}/config.json: {error}") from error
    if config.get("head_dim") not in (None, ours.head_width):
        raise WeightsError(
            f"{directory}/config.json: head_dim {config['head_dim']} is not hidden_size / num_attention_heads = "
            f"{ours.head_width}, which is all that is supported"
        )
    return ours


def _llama_json(c: LlamaConfig) -> dict:
    return {
        **reader.theirs(c, {field: name for field, name in LLAMA_FIELDS.items() if field != "rope_theta"}),
        **LLAMA_FIXED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": c.rope_theta,  # transformers 4
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},  # transformers 5
        "head_dim": c.head_width,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _is_linear(path: str) -> bool:
    """Whether a leaf is the kernel of a block's linear layer: what `quant` stores in 4 bits."""
    return path.startswith("lm/blocks") and path.endswith("/kernel")


def _read_quantised(directory, tensors, path: str, leaf: key_tables.Leaf, shardings) -> dict[str, jax.Array]:
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


_KINDS = {
    "gpt2": _Kind(_gpt2_config, key_tables.GPT2_IGNORED, "wte.weight"),
    "llama": _Kind(_llama_config, key_tables.LLAMA_IGNORED, "model.embed_tokens.weight"),
}

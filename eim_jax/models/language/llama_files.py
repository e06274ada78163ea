"""Hugging Face files of LLaMA and of the families built like it: fields of config.json, keys of the weights, both ways.

A family's own file (llama_family.py, mistral.py, qwen.py, ...) says in which fields of `LlamaConfig` it differs, and
what transformers' configuration class takes for a field that a file leaves out.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eim_jax.models.hugging_face import (
    TRANSPOSE,
    Row,
    WeightsError,
    check_fixed,
    dense_rows,
    our_fields,
    their_fields,
)
from eim_jax.models.language.family import Family
from eim_jax.models.language.llama import Llama
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.rope import RopeScaling

FIELDS = {
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "own_head_width",
    "intermediate_size": "mlp",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied",
}
# Values that a config.json may not change, in any of the families.
FIXED = {"hidden_act": "silu", "mlp_bias": False}
UNBIASED = {**FIXED, "attention_bias": False}  # of families whose attention has no biases, whatever the file says
LAYER_TYPES = ("full_attention", "sliding_attention")
_LINEAR = {"factor": "factor"}
_LLAMA3 = {"low_freq_factor": "low", "high_freq_factor": "high", "original_max_position_embeddings": "original"}


def llama_like(
    model_type: str,
    title: str,
    read: Callable[[Mapping[str, Any]], LlamaConfig],
    write: Callable[[LlamaConfig], dict[str, Any]],
    **more: Any,
) -> Family:
    """Returns the record of a family whose decoder is `Llama`.

    Args:
      model_type: config.json's name for it.
      title: its name in messages.
      read: config.json's content -> shape; `read_shape` with what is the family's own.
      write: shape -> config.json's content; `write_shape` with what is the family's own.
      **more: further fields of `Family`.
    """
    return Family(
        model_type=model_type,
        title=title,
        build=Llama,
        read=read,
        write=write,
        rows=key_rows,
        ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # computed, not trained
        quantised=r"lm/blocks.*/kernel",
        takes_adapters=True,
        **{"stated": with_attention_bias, **more},
    )


def with_attention_bias(c: LlamaConfig) -> LlamaConfig:
    """Returns the shape with all biases that config.json's `attention_bias` means, where it has some (`stated`)."""
    return dataclasses.replace(c, out_bias=True) if c.qkv_bias else c


def as_qwen2(c: LlamaConfig) -> LlamaConfig:
    """Returns the shape as a Qwen2's where it has biases: the same decoder, whose files can state them (`stated`)."""
    return dataclasses.replace(c, model_type="qwen2") if c.qkv_bias else c


def read_shape(theirs: Mapping[str, Any], fixed: Mapping[str, Any] = FIXED, **ours: Any) -> LlamaConfig:
    """Returns the shape that a config.json states.

    Args:
      theirs: the file's content.
      fixed: values that it may not change.
      **ours: fields of the shape that the family decides; `rope_theta` and `rope_scaling` are read here if not given,
        and the biases (`attention_bias`) if neither `fixed` nor the family decides them.

    Raises:
      WeightsError: it states what cannot be done.
    """
    check_fixed(theirs, fixed)
    if "attention_bias" not in fixed and "qkv_bias" not in ours:
        biased = our_fields(theirs, {"attention_bias": "out_bias"}, LlamaConfig).get("out_bias", False)
        ours |= {"qkv_bias": biased, "out_bias": biased}
    if "rope_theta" not in ours:
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # transformers 5, transformers 4
        ours["rope_theta"], ours["rope_scaling"] = read_rope(theirs, rope)
    try:
        return LlamaConfig(**{**our_fields(theirs, FIELDS, LlamaConfig), **ours})
    except ValueError as error:
        raise WeightsError(str(error)) from error


def read_rope(
    theirs: Mapping[str, Any], rope: Any, theta: str = "rope_theta", otherwise: float = 10000.0
) -> tuple[float, RopeScaling | None]:
    """Returns RoPE's theta and how its frequencies are scaled.

    Args:
      theirs: the content of config.json, which states theta where `rope` does not.
      rope: rope_parameters, rope_scaling, or one kind of layers' part of them.
      theta: theta's name in `theirs`.
      otherwise: theta where nothing states it.

    Raises:
      WeightsError: a kind of scaling that is not supported, or a field of the wrong type.
    """
    if not isinstance(rope, Mapping):
        raise WeightsError(f"rope_parameters or rope_scaling is {rope!r:.60}, not an object")
    partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor")) or 1
    if partial != 1:
        raise WeightsError(f"partial_rotary_factor {partial} is not supported, only 1")
    stated = {theta: rope.get("rope_theta", theirs.get(theta))}
    found = our_fields(stated, {theta: "rope_theta"}, LlamaConfig).get("rope_theta", otherwise)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found, None
    fields = {**_LINEAR, **(_LLAMA3 if kind == "llama3" else {})}
    try:
        scaling = RopeScaling(kind, **our_fields(rope, fields, RopeScaling, "rope_parameters."))
        if missing := [field for field in fields if rope.get(field) is None]:
            raise WeightsError(
                f"rope_type {kind!r} without {', '.join(missing)}: nothing says how far RoPE is stretched"
            )
        return found, scaling
    except ValueError as error:
        raise WeightsError(str(error)) from error


def layer_flags(theirs: Mapping[str, Any], field: str, yes: Any, values: Sequence[Any]) -> tuple[bool, ...]:
    """Returns for each layer whether a field's list says `yes`; () where the field is absent or says it nowhere.

    Raises:
      WeightsError: the field is no list of `values`.
    """
    listed = theirs.get(field)
    if listed is None:
        return ()
    if not isinstance(listed, list) or any(value not in values for value in listed):
        raise WeightsError(f"{field} is {listed!r:.80}, not a list of {' and '.join(repr(v) for v in values)}")
    flags = tuple(value == yes for value in listed)
    return flags if any(flags) else ()


def read_window(theirs: Mapping[str, Any]) -> tuple[int, tuple[bool, ...]]:
    """Returns the sliding window, 0 for none, and in which layers it holds (() for all).

    By `layer_types` (transformers 4.53 and later), else in all layers. Where `use_sliding_window` is false there is
    none, whatever `sliding_window` says.
    """
    window = our_fields(theirs, {"sliding_window": "window"}, LlamaConfig).get("window", 0)
    if not window or theirs.get("use_sliding_window") is False:
        return 0, ()
    narrow = layer_flags(theirs, "layer_types", "sliding_attention", LAYER_TYPES)
    if theirs.get("layer_types") is not None and not narrow:
        return 0, ()
    return window, () if all(narrow) else narrow


def layer_types(c: LlamaConfig) -> list[str]:
    """Returns config.json's `layer_types`: which layers have the sliding window."""
    return [LAYER_TYPES[flag] for flag in c.narrow or (c.window > 0,) * c.layers]


def write_shape(c: LlamaConfig, architecture: str, fixed: Mapping[str, Any] = FIXED, **more: Any) -> dict[str, Any]:
    """Returns config.json's content as transformers 4 and 5 read it.

    Args:
      c: the shape.
      architecture: transformers' class.
      fixed: as `read_shape`'s.
      **more: the family's own fields; `attention_bias` is written here where it is not among `fixed`.
    """
    rope = {"rope_type": "default"} if c.rope_scaling is None else c.rope_scaling.as_theirs()
    found = {
        **their_fields(c, FIELDS),
        "head_dim": c.head_width,
        "attention_bias": c.out_bias,
        **fixed,
        "architectures": [architecture],
        "model_type": c.model_type,
        "rope_theta": c.rope_theta,  # transformers 4
        "rope_parameters": {"rope_theta": c.rope_theta, **rope},  # transformers 5
    }
    if c.rope_scaling is not None:
        found["rope_scaling"] = rope  # transformers 4
    return {**found, **more}


def _kernel(ours: str, theirs: str) -> Row:
    return Row(f"lm/blocks_{{i}}/{ours}/kernel", (f"model.layers.{{i}}.{theirs}_proj.weight",), TRANSPOSE)


def _scale(ours: str, theirs: str) -> Row:
    return Row(f"lm/blocks_{{i}}/{ours}/scale", (f"model.layers.{{i}}.{theirs}.weight",))


def key_rows(c: LlamaConfig) -> tuple[Row, ...]:
    """Returns the key table of a shape; q and k rows are in the order of rotated halves, as our RoPE turns them."""
    rows = [Row("lm/token_embedding/embedding", ("model.embed_tokens.weight",))]
    rows += [_scale("norm_1", "input_layernorm")]
    for name in "qkv":
        if c.qkv_bias:
            rows += dense_rows(f"lm/blocks_{{i}}/attn/{name}", f"model.layers.{{i}}.self_attn.{name}_proj")
        else:
            rows += [_kernel(f"attn/{name}", f"self_attn.{name}")]
    if c.out_bias:
        rows += dense_rows("lm/blocks_{i}/attn/out", "model.layers.{i}.self_attn.o_proj")
    else:
        rows += [_kernel("attn/out", "self_attn.o")]
    if c.qk_norm:
        rows += [_scale(f"attn/{name}", f"self_attn.{name}") for name in ("q_norm", "k_norm")]
    if c.post_norms:
        rows += [_scale("post_1", "post_attention_layernorm"), _scale("norm_2", "pre_feedforward_layernorm")]
        rows += [_scale("post_2", "post_feedforward_layernorm")]
    else:
        rows += [_scale("norm_2", "post_attention_layernorm")]
    rows += [_kernel(f"mlp/{name}", f"mlp.{name}") for name in ("gate", "up", "down")]
    rows += [Row("lm/norm_f/scale", ("model.norm.weight",))]
    if not c.tied:
        rows += [Row("lm/head/kernel", ("lm_head.weight",), TRANSPOSE)]
    return tuple(rows)

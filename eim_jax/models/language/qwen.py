"""Qwen2, Qwen2.5 (biases of query, key and value maps) and Qwen3 (norms of queries and keys instead)."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import our_fields
from eim_jax.models.language.family import Family
from eim_jax.models.language.llama import Llama
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    FIXED,
    IGNORED,
    LAYER_TYPES,
    QUANTISED,
    key_rows,
    read_shape,
    read_window,
    write_shape,
)


def _read(theirs: Mapping[str, Any], model_type: str, **ours: Any) -> LlamaConfig:
    """The shape; the window is off unless `use_sliding_window` says otherwise."""
    window, narrow = read_window({"use_sliding_window": False, **theirs})
    if window and "layer_types" not in theirs:  # before transformers 4.53: from a layer on
        counts = our_fields(theirs, {"num_hidden_layers": "layers"}, LlamaConfig)
        first = theirs.get("max_window_layers", 28)
        narrow = tuple(i >= first for i in range(counts.get("layers", LlamaConfig().layers)))
        window = window if any(narrow) else 0
    fixed = {name: value for name, value in FIXED.items() if name != "attention_bias" or model_type == "qwen3"}
    return read_shape(theirs, fixed, model_type=model_type, window=window, narrow=narrow if window else (), **ours)


def _write(c: LlamaConfig, architecture: str) -> dict[str, Any]:
    narrow = c.narrow or (c.window > 0,) * c.layers
    return write_shape(
        c,
        architecture,
        use_sliding_window=c.window > 0,
        sliding_window=c.window or None,
        layer_types=[LAYER_TYPES[flag] for flag in narrow],
        max_window_layers=c.layers if not c.window else narrow.index(True),
    )


QWEN2_FAMILY = Family(
    model_type="qwen2",
    title="Qwen2",
    build=Llama,
    read=lambda theirs: _read(theirs, "qwen2", qkv_bias=True),
    write=lambda c: _write(c, "Qwen2ForCausalLM"),
    rows=key_rows,
    ignored=IGNORED,
    quantised=QUANTISED,
    takes_adapters=True,
)
QWEN3_FAMILY = Family(
    model_type="qwen3",
    title="Qwen3",
    build=Llama,
    read=lambda theirs: _read(theirs, "qwen3", qk_norm=True),
    write=lambda c: _write(c, "Qwen3ForCausalLM"),
    rows=key_rows,
    ignored=IGNORED,
    quantised=QUANTISED,
    takes_adapters=True,
)

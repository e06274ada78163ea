"""Qwen2, Qwen2.5 (biases of query, key and value maps) and Qwen3 (norms of queries and keys instead)."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import WeightsError, our_fields
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    FIXED,
    layer_types,
    llama_like,
    read_shape,
    read_window,
    write_shape,
)

DEFAULTS = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
DEFAULTS |= {"num_hidden_layers": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_FIXED = {"hidden_act": FIXED["hidden_act"]}  # Qwen2's biases are where they are, whatever the file says


def _read(
    theirs: Mapping[str, Any],
    model_type: str,
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any] = DEFAULTS,
    **ours: Any,
) -> LlamaConfig:
    """The shape; the window is off unless `use_sliding_window` says otherwise."""
    theirs = {**defaults, **theirs}
    window, narrow = read_window(theirs)
    if window and theirs.get("layer_types") is None:  # before transformers 4.53: from a layer on
        first = theirs["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int):
            raise WeightsError(f"max_window_layers is {first!r:.60}, not a whole number")
        layers = our_fields(theirs, {"num_hidden_layers": "layers"}, LlamaConfig)["layers"]
        narrow = tuple(i >= first for i in range(layers))
        window, narrow = (window, narrow) if any(narrow) else (0, ())
    return read_shape(theirs, fixed, model_type=model_type, window=window, narrow=narrow, **ours)


def _write(c: LlamaConfig, architecture: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    narrow = c.narrow or (c.window > 0,) * c.layers
    return write_shape(
        c,
        architecture,
        fixed,
        use_sliding_window=c.window > 0,
        sliding_window=c.window or None,
        layer_types=layer_types(c),
        max_window_layers=narrow.index(True) if c.window else c.layers,
    )


QWEN2_FAMILY = llama_like(
    "qwen2",
    "Qwen2",
    read=lambda theirs: _read(theirs, "qwen2", _FIXED, qkv_bias=True),
    write=lambda c: _write(c, "Qwen2ForCausalLM", _FIXED),
    stated=lambda c: c,  # its own biases are those of a folded adapter
)
QWEN3_FAMILY = llama_like(
    "qwen3",
    "Qwen3",
    read=lambda theirs: _read(theirs, "qwen3", FIXED, {**DEFAULTS, "head_dim": 128}, qk_norm=True),
    write=lambda c: _write(c, "Qwen3ForCausalLM", FIXED),
)

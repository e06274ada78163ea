"""SmolLM3: a LLaMA in which every fourth layer turns nothing."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import our_fields
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    layer_flags,
    layer_types,
    llama_like,
    read_shape,
    read_window,
    write_shape,
)

DEFAULTS = {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
DEFAULTS |= {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6}
DEFAULTS |= {"tie_word_embeddings": True, "no_rope_layer_interval": 4, "use_sliding_window": False}


def _read(theirs: Mapping[str, Any]) -> LlamaConfig:
    """The shape: `no_rope_layers` has a 0 for a layer without RoPE; where it is absent that is every fourth."""
    theirs = {**DEFAULTS, **theirs}
    if theirs.get("no_rope_layers") is None:
        layers = our_fields(theirs, {"num_hidden_layers": "layers"}, LlamaConfig)["layers"]
        every = our_fields(theirs, {"no_rope_layer_interval": "layers"}, LlamaConfig)["layers"]
        theirs["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(layers)]
    window, narrow = read_window(theirs)
    no_rope = layer_flags(theirs, "no_rope_layers", 0, (0, 1))
    return read_shape(theirs, model_type="smollm3", no_rope=no_rope, window=window, narrow=narrow)


SMOLLM3_FAMILY = llama_like(
    "smollm3",
    "SmolLM3",
    read=_read,
    write=lambda c: write_shape(
        c,
        "SmolLM3ForCausalLM",
        no_rope_layers=[int(not flag) for flag in c.no_rope or (False,) * c.layers],
        use_sliding_window=c.window > 0,
        sliding_window=c.window or None,
        layer_types=layer_types(c),
        pad_token_id=None,  # transformers' own lies outside a smaller vocabulary
    ),
)

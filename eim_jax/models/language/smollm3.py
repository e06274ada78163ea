"""SmolLM3: a LLaMA in which every fourth layer turns nothing."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import our_fields
from eim_jax.models.language.family import Family
from eim_jax.models.language.llama import Llama
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    IGNORED,
    LAYER_TYPES,
    QUANTISED,
    key_rows,
    layer_flags,
    read_shape,
    read_window,
    write_shape,
)


def _read(theirs: Mapping[str, Any]) -> LlamaConfig:
    """The shape: `no_rope_layers` has a 0 for a layer without RoPE; where it is absent that is every fourth."""
    layers = our_fields(theirs, {"num_hidden_layers": "layers"}, LlamaConfig).get("layers", 36)
    every = our_fields(theirs, {"no_rope_layer_interval": "layers"}, LlamaConfig).get("layers", 4)
    if theirs.get("no_rope_layers") is None:
        listed = [int((i + 1) % every != 0) for i in range(layers)]
        theirs = {**theirs, "no_rope_layers": listed}
    window, narrow = read_window({"use_sliding_window": False, **theirs})
    return read_shape(
        theirs,
        model_type="smollm3",
        no_rope=layer_flags(theirs, "no_rope_layers", 0, (0, 1)),
        window=window,
        narrow=narrow,
    )


def _write(c: LlamaConfig) -> dict[str, Any]:
    return write_shape(
        c,
        "SmolLM3ForCausalLM",
        no_rope_layers=[int(not flag) for flag in c.no_rope or (False,) * c.layers],
        use_sliding_window=c.window > 0,
        sliding_window=c.window or None,
        layer_types=[LAYER_TYPES[flag] for flag in c.narrow or (c.window > 0,) * c.layers],
        pad_token_id=None,
    )


SMOLLM3_FAMILY = Family(
    model_type="smollm3",
    title="SmolLM3",
    build=Llama,
    read=_read,
    write=_write,
    rows=key_rows,
    ignored=IGNORED,
    quantised=QUANTISED,
    takes_adapters=True,
)

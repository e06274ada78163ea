"""Gemma 3's text model: norms that add to 1, two more of them a block, scaled embeddings, narrow and wide layers."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import WeightsError, our_fields
from eim_jax.models.language.family import Family
from eim_jax.models.language.llama import Llama
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    IGNORED,
    LAYER_TYPES,
    QUANTISED,
    key_rows,
    layer_flags,
    read_rope,
    read_shape,
    write_shape,
)

_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def _read(theirs: Mapping[str, Any]) -> LlamaConfig:
    """The shape: without `layer_types` every sixth layer is wide (`sliding_window_pattern`)."""
    # What transformers takes for a field that the file leaves out.
    theirs = {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, **theirs}
    theirs = {"query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True, **theirs}
    counts = our_fields(
        theirs,
        {"num_hidden_layers": "layers", "sliding_window": "window", "query_pre_attn_scalar": "query_scale"},
        LlamaConfig,
    )
    layers, every = counts["layers"], theirs.get("sliding_window_pattern", theirs.get("_sliding_window_pattern", 6))
    if theirs.get("layer_types") is None:
        theirs = {**theirs, "layer_types": [LAYER_TYPES[(i + 1) % every != 0] for i in range(layers)]}
    rope = theirs.get("rope_parameters") or {}
    if "full_attention" in rope:  # transformers 5: by the layers' kind
        wide, narrow = rope["full_attention"], rope.get("sliding_attention", {})
    else:
        wide, narrow = rope or theirs.get("rope_scaling") or {}, {}
    theta, scaling = read_rope(theirs, wide, otherwise=1e6)
    narrow_theta, narrow_scaling = read_rope({**theirs, "rope_theta": None}, narrow, "rope_local_base_freq")
    narrow_layers = layer_flags(theirs, "layer_types", "sliding_attention", LAYER_TYPES)
    if narrow_scaling is not None:
        raise WeightsError("rope_parameters.sliding_attention is scaled, which is not supported")
    return read_shape(
        theirs,
        _FIXED,
        model_type="gemma3_text",
        rope_theta=theta,
        rope_scaling=scaling,
        window=counts["window"] if narrow_layers else 0,
        narrow=() if all(narrow_layers) else narrow_layers,
        narrow_theta=narrow_theta if narrow_layers else 0.0,
        query_scale=counts["query_scale"],
        qk_norm=True,
        norm_offset=True,
        post_norms=True,
        activation="gelu_new",
        embedding_scaled=True,
    )


def _write(c: LlamaConfig) -> dict[str, Any]:
    content = write_shape(
        c,
        "Gemma3ForCausalLM",
        **_FIXED,
        query_pre_attn_scalar=c.query_scale,
        sliding_window=c.window or 4096,
        layer_types=[LAYER_TYPES[flag] for flag in c.narrow or (c.window > 0,) * c.layers],
        rope_local_base_freq=c.narrow_theta or 10000.0,  # transformers 4
    )
    narrow = {"rope_type": "default", "rope_theta": c.narrow_theta or 10000.0}
    content["rope_parameters"] = {"full_attention": content["rope_parameters"], "sliding_attention": narrow}
    return {name: value for name, value in content.items() if name not in ("hidden_act", "mlp_bias")}


GEMMA3_FAMILY = Family(
    model_type="gemma3_text",
    title="Gemma 3",
    build=Llama,
    read=_read,
    write=_write,
    rows=key_rows,
    ignored=IGNORED,
    quantised=QUANTISED,
    takes_adapters=True,
)

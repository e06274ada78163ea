"""Gemma 3's text model: norms that add to 1, two more of them a block, scaled embeddings, narrow and wide layers."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import WeightsError, our_fields
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    LAYER_TYPES,
    layer_flags,
    layer_types,
    llama_like,
    read_rope,
    read_shape,
    write_shape,
)

DEFAULTS = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
DEFAULTS |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072}
DEFAULTS |= {"query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True}
_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
_OWN = {"num_hidden_layers": "layers", "sliding_window": "window", "query_pre_attn_scalar": "query_scale"}


def _read(theirs: Mapping[str, Any]) -> LlamaConfig:
    """The shape: without `layer_types` every sixth layer is wide (`sliding_window_pattern`)."""
    theirs = {**DEFAULTS, **theirs}
    if theirs.get("use_bidirectional_attention"):  # EmbeddingGemma's
        raise WeightsError("use_bidirectional_attention is not supported: an LM sees what came before")
    own = our_fields(theirs, _OWN, LlamaConfig)
    if theirs.get("layer_types") is None:
        pattern = next((f for f in ("sliding_window_pattern", "_sliding_window_pattern") if theirs.get(f)), "")
        every = our_fields(theirs, {pattern: "layers"}, LlamaConfig).get("layers", 6)
        theirs["layer_types"] = [LAYER_TYPES[(i + 1) % every != 0] for i in range(own["layers"])]
    narrow_layers = layer_flags(theirs, "layer_types", "sliding_attention", LAYER_TYPES)
    theta, scaling, narrow_theta = _read_ropes(theirs)
    return read_shape(
        theirs,
        _FIXED,
        model_type="gemma3_text",
        rope_theta=theta,
        rope_scaling=scaling,
        window=own["window"] if narrow_layers else 0,
        narrow=() if all(narrow_layers) else narrow_layers,
        narrow_theta=narrow_theta if narrow_layers else 0.0,
        query_scale=own["query_scale"],
        qk_norm=True,
        norm_offset=True,
        post_norms=True,
        activation="gelu_new",
        embedding_scaled=True,
    )


def _read_ropes(theirs: Mapping[str, Any]):
    """Theta and scaling of the wide layers, theta of the narrow ones."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    by_kind = isinstance(rope, Mapping) and "full_attention" in rope  # transformers 5; before, what is stated is wide
    wide, narrow = (rope["full_attention"], rope.get("sliding_attention", {})) if by_kind else (rope, {})
    theta, scaling = read_rope(theirs, wide, otherwise=1e6)
    narrow_theta, narrow_scaling = read_rope(theirs, narrow, "rope_local_base_freq")
    if narrow_scaling is not None:
        raise WeightsError("rope_parameters.sliding_attention is scaled, which is not supported")
    return theta, scaling, narrow_theta


def _write(c: LlamaConfig) -> dict[str, Any]:
    narrow_theta = c.narrow_theta or 10000.0
    content = write_shape(
        c,
        "Gemma3ForCausalLM",
        _FIXED,
        query_pre_attn_scalar=c.query_scale,
        sliding_window=c.window or DEFAULTS["sliding_window"],
        layer_types=layer_types(c),
        rope_local_base_freq=narrow_theta,  # transformers 4
    )
    narrow = {"rope_type": "default", "rope_theta": narrow_theta}
    return {
        **content,
        "rope_parameters": {"full_attention": content["rope_parameters"], "sliding_attention": narrow},
    }


GEMMA3_FAMILY = llama_like("gemma3_text", "Gemma 3", read=_read, write=_write)

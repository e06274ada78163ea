"""Gemma 2: capped scores and logits, norms that add to 1, two more of them a block, every other layer narrow."""

from collections.abc import Mapping
from typing import Any

from eim_jax.models.hugging_face import WeightsError, our_fields
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    LAYER_TYPES,
    layer_types,
    llama_like,
    read_shape,
    read_window,
    write_shape,
)

DEFAULTS = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
DEFAULTS |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192}
DEFAULTS |= {"query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True}
# A file that says null caps nothing; one that does not say has these.
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_FIXED = {"hidden_activation": "gelu_pytorch_tanh"}
_OWN = {
    "num_hidden_layers": "layers",
    "query_pre_attn_scalar": "query_scale",
    "attn_logit_softcapping": "attention_cap",
    "final_logit_softcapping": "logit_cap",
}


def _read(theirs: Mapping[str, Any]) -> LlamaConfig:
    """The shape: without `layer_types` the first layer is narrow, the second wide, and so on."""
    theirs = {**DEFAULTS, **CAPS, **theirs}
    if theirs.get("use_bidirectional_attention"):
        raise WeightsError("use_bidirectional_attention is not supported: an LM sees what came before")
    own = our_fields(theirs, _OWN, LlamaConfig)
    layers = own.pop("layers")
    if theirs.get("layer_types") is None:
        theirs["layer_types"] = [LAYER_TYPES[(i + 1) % 2] for i in range(layers)]
    window, narrow = read_window(theirs)
    return read_shape(
        theirs,
        _FIXED,
        model_type="gemma2",
        window=window,
        narrow=narrow,
        norm_offset=True,
        post_norms=True,
        activation="gelu_new",
        embedding_scaled=True,
        **own,
    )


def _write(c: LlamaConfig) -> dict[str, Any]:
    return write_shape(
        c,
        "Gemma2ForCausalLM",
        _FIXED,
        query_pre_attn_scalar=c.query_scale or c.head_width,
        attn_logit_softcapping=c.attention_cap or None,
        final_logit_softcapping=c.logit_cap or None,
        sliding_window=c.window or DEFAULTS["sliding_window"],
        layer_types=layer_types(c),
    )


GEMMA2_FAMILY = llama_like("gemma2", "Gemma 2", read=_read, write=_write)

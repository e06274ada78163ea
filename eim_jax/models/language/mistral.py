"""Mistral: a LLaMA whose layers see a sliding window."""

from eim_jax.models.language.llama_files import UNBIASED, as_qwen2, llama_like, read_shape, read_window, write_shape

DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
DEFAULTS |= {"sliding_window": 4096}

MISTRAL_FAMILY = llama_like(
    "mistral",
    "Mistral",
    read=lambda theirs: read_shape(
        {**DEFAULTS, **theirs}, UNBIASED, model_type="mistral", window=read_window({**DEFAULTS, **theirs})[0]
    ),
    write=lambda c: write_shape(c, "MistralForCausalLM", UNBIASED, sliding_window=c.window or None),
    stated=as_qwen2,
)

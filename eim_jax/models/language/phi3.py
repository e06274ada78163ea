"""Phi-3 and Phi-4: a LLaMA whose files hold query, key and value maps as one tensor, gate and up maps as another."""

import dataclasses

from eim_jax.models.hugging_face import TRANSPOSE, Row, part
from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import (
    UNBIASED,
    as_qwen2,
    key_rows,
    llama_like,
    read_shape,
    read_window,
    write_shape,
)

DEFAULTS = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096}
DEFAULTS |= {"rms_norm_eps": 1e-5}


def _rows(c: LlamaConfig) -> tuple[Row, ...]:
    """LLaMA's table, with rows of the two fused tensors for what stands in them one below the other."""
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    fused = {
        "self_attn.qkv_proj": {"attn/q": q, "attn/k": kv, "attn/v": kv},
        "mlp.gate_up_proj": {"mlp/gate": c.mlp, "mlp/up": c.mlp},
    }
    parts = {}
    for theirs, sizes in fused.items():
        start, whole = 0, sum(sizes.values())
        for ours, size in sizes.items():
            path, key = f"lm/blocks_{{i}}/{ours}/kernel", f"model.layers.{{i}}.{theirs}.weight"
            parts[path] = Row(path, (part(key, start, start + size, whole),), TRANSPOSE)
            start += size
    return tuple(parts.get(row.ours, row) for row in key_rows(c))


PHI3_FAMILY = dataclasses.replace(
    llama_like(
        "phi3",
        "Phi-3",
        read=lambda theirs: read_shape(
            {**DEFAULTS, **theirs}, UNBIASED, model_type="phi3", window=read_window({**DEFAULTS, **theirs})[0]
        ),
        write=lambda c: write_shape(
            c,
            "Phi3ForCausalLM",
            UNBIASED,
            sliding_window=c.window or None,
            pad_token_id=None,  # transformers' own lies outside a smaller vocabulary
        ),
        stated=as_qwen2,
    ),
    rows=_rows,
)

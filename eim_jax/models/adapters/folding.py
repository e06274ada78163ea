"""LaVIN's router adapters taken into LLaMA's own query, key and value maps ("folded"): no adapter is left to compute.

It needs the modality to be fixed, image or none, since the routing weights depend on it. The adapter is affine and
stands on the attention's input alone, so that with fixed routing weights w

    (z + sum_k w_k (B_k (A z + a) + b_k)) W = z (W + A B W) + (a B + b) W,   B = sum_k w_k B_k, b = sum_k w_k b_k

(row vectors). The first kernel replaces W, the rest is a bias. CLIP's adapters cannot be folded: their routing weights
depend on each image.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def fold_router(lm: nn.Module, params: Mapping, modality: int) -> tuple[Any, dict]:
    """Returns the LM without its adapters, for rows of one modality: the same logits at no extra cost.

    The modality row is left out of the input: nothing but the routing read it.

    Args:
      lm: a LLaMA whose adapter is LaVIN's router.
      params: the LM's tree ("lm/..."), with "adapter"; kernels not quantised. Folded kernels keep their dtype.
      modality: 1 for rows with an image, 0 for text alone.

    Returns:
      The shape, the old one with adapter=None and qkv_bias=True, and its parameters.

    Raises:
      ValueError: no router adapters, another modality, or quantised kernels.
    """
    config = lm.config
    if "adapter" not in params:
        raise ValueError("these parameters hold no router adapters to fold")
    if modality not in (0, 1):
        raise ValueError(f"modality {modality!r} is neither 0 (text alone) nor 1 (with an image)")
    if config.quant != "none":
        raise ValueError(f"kernels in {config.quant} cannot take in an adapter: load the LM with quant='none'")
    both = jnp.array([False, True])
    table = jax.jit(lambda p: lm.apply({"params": p}, None, both, method="steer"))(params)  # [L 2 2]
    table = lm.config.adapter.scale * table
    leaves = {name: params["adapter"][name] for name in ("down", "up")}
    fold = jax.jit(_fold_layer)
    folded = {name: leaf for name, leaf in params.items() if name != "adapter"}
    plain = replace(config, adapter=None, qkv_bias=True)
    if config.scan:
        blocks = params["blocks"]
        attention = jax.vmap(fold)(blocks["attn"], leaves, table[:, modality])
        return plain, {**folded, "blocks": {**blocks, "attn": attention}}
    for i in range(config.layers):
        block, leaf = params[f"blocks_{i}"], jax.tree.map(lambda x, i=i: x[i], leaves)
        folded[f"blocks_{i}"] = {**block, "attn": fold(block["attn"], leaf, table[i, modality])}
    return plain, folded


def _fold_layer(attn, leaf, w):
    """One layer's attention parameters with its adapter inside, for routing weights w [2]."""
    down, up = leaf["down"], leaf["up"]
    mixed = jnp.einsum("k,kgio->gio", w, up["kernel"], precision="highest")  # B: [G r/G D/G]
    shift = jnp.dot(w, up["bias"], precision="highest")

    def fold(kernel, bias):
        rows = kernel.astype(jnp.float32).reshape(mixed.shape[0], mixed.shape[2], -1)
        inner = jnp.einsum("gio,gof->gif", mixed, rows, precision="highest").reshape(-1, kernel.shape[1])  # B W
        added = jnp.dot(down["kernel"], inner, precision="highest")
        moved = jnp.dot(down["bias"], inner, precision="highest")
        moved += jnp.dot(shift, kernel.astype(jnp.float32), precision="highest")
        return {
            "kernel": (kernel.astype(jnp.float32) + added).astype(kernel.dtype),
            "bias": (bias.astype(jnp.float32) + moved).astype(kernel.dtype),
        }

    zero = jnp.zeros((), jnp.float32)
    return {
        name: fold(part["kernel"], part.get("bias", zero)) if name in ("q", "k", "v") else part
        for name, part in attn.items()
    }

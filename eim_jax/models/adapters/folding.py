"""LaVIN's router adapters folded into LLaMA's query, key and value maps, once the modality is fixed.

The adapter is affine and stands on the attention's input alone, so that with fixed routing weights w

    (z + sum_k w_k (B_k (A z + a) + b_k)) W = z (W + A B W) + (a B + b) W,   B = sum_k w_k B_k, b = sum_k w_k b_k

(row vectors). The first kernel replaces W, the rest is a bias. CLIP's adapters cannot be folded: their routing weights
depend on each image.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from eim_jax.models.adapters.inserted import Router
from eim_jax.models.language.llama import Llama, LlamaConfig


def fold_router(params: Mapping, config: LlamaConfig, modality: int) -> dict:
    """Returns the LM's parameters without its adapters, for rows of one modality: the same logits at no extra cost.

    The matching configuration is the old one with adapter=None and qkv_bias=True. The modality row is left out of the
    input: nothing but the routing read it.

    Args:
      params: the LM's tree ("lm/..."), with "adapter"; kernels not quantised. Folded kernels keep their dtype.
      config: the LM's shape; its adapter is a Router.
      modality: 1 for rows with an image, 0 for text alone.

    Raises:
      ValueError: no router adapters, another modality, or quantised kernels.
    """
    if not isinstance(config.adapter, Router) or "adapter" not in params:
        raise ValueError("this LLaMA has no router adapters to fold")
    if modality not in (0, 1):
        raise ValueError(f"modality {modality!r} is neither 0 (text alone) nor 1 (with an image)")
    if config.quant != "none":
        raise ValueError(f"kernels in {config.quant} cannot take in an adapter: load the LM with quant='none'")
    table = jax.jit(lambda p: Llama(config).apply({"params": p}, method="routing_table"))(params)
    leaves = {name: params["adapter"][name] for name in ("down", "up")}
    fold = jax.jit(_fold_layer)
    folded = {name: leaf for name, leaf in params.items() if name != "adapter"}
    if config.scan:
        blocks = params["blocks"]
        return {**folded, "blocks": {**blocks, "attn": jax.vmap(fold)(blocks["attn"], leaves, table[:, modality])}}
    for i in range(config.layers):
        block, leaf = params[f"blocks_{i}"], jax.tree.map(lambda x, i=i: x[i], leaves)
        folded[f"blocks_{i}"] = {**block, "attn": fold(block["attn"], leaf, table[i, modality])}
    return folded


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

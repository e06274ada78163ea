"""LLaMA and its two adapters in float64 NumPy, written from the papers: head by head, and RoPE in complex numbers.

LaVIN is here as its authors run it: the modality embedding is the first row of the sequence, at RoPE index 0, hidden
from all other rows, and every layer's router reads that row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.language.llama import Llama, LlamaConfig

TINY = LlamaConfig(vocab=61, context=24, width=32, layers=3, heads=4, kv_heads=2, mlp=40, rope_theta=50.0)
ROUTER = Router(rank=8, groups=2, temperature=3.0)
PROMPTS = ZeroInit(prompts=3, layers=2)


def random_params(config: LlamaConfig, seed: int = 0) -> dict:
    """Parameters of which none is 0 or 1 by initialisation, so that every term counts."""
    return tiny.loud(Llama(config).init, jnp.zeros((1, 1), jnp.int32), size=0.1, seed=seed)


def stacked(params: dict, layers: int) -> dict:
    """The parameters as the scanned model holds them."""
    rest = {k: v for k, v in params.items() if not k.startswith("blocks_")}
    blocks = [params[f"blocks_{i}"] for i in range(layers)]
    return {**rest, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


def tokens_of(shape: tuple[int, int], config: LlamaConfig = TINY, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab, shape, np.int32))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rms_norm(leaf: dict, x: np.ndarray, eps: float) -> np.ndarray:
    return leaf["scale"] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x [s e] as e/2 complex numbers, each turned by its own frequency times the position."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(positions, theta ** (-np.arange(half) / half)))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(p: dict, config: LlamaConfig, z, positions, sees, prompt=None) -> np.ndarray:
    """One row of the batch, z [s D]; `sees` [s s]; `prompt` = (prompt tokens [K D], gate [h])."""
    e, mixed = config.width // config.heads, []
    q, k, v = (z @ p[name]["kernel"] for name in "qkv")
    for head in range(config.heads):
        shared = head * config.kv_heads // config.heads  # the key-value head that this query head reads
        own, theirs = slice(head * e, (head + 1) * e), slice(shared * e, (shared + 1) * e)
        turned = rope(q[:, own], positions, config.rope_theta)
        scores = turned @ rope(k[:, theirs], positions, config.rope_theta).T / np.sqrt(e)
        out = softmax(np.where(sees, scores, -1e30)) @ v[:, theirs]
        if prompt is not None:
            keys, values = (prompt[0] @ p[name]["kernel"][:, theirs] for name in "kv")
            out = out + np.tanh(prompt[1][head]) * softmax(turned @ keys.T / np.sqrt(e)) @ values
        mixed.append(out)
    return np.concatenate(mixed, axis=-1) @ p["out"]["kernel"]


def routed(leaf: dict, z: np.ndarray, temperature: float) -> np.ndarray:
    """LaVIN's adapter on z [s D], whose row 0 is the modality row."""
    w = softmax((z[0] @ leaf["router"]["kernel"] + leaf["router"]["bias"]) / temperature)
    u = z @ leaf["down"]["kernel"] + leaf["down"]["bias"]
    inner, out = u.shape[1] // 2, z
    for k in range(2):
        halves = [u[:, g * inner : (g + 1) * inner] @ leaf["up"]["kernel"][k, g] for g in range(2)]
        out = out + w[k] * (np.concatenate(halves, axis=-1) + leaf["up"]["bias"][k])
    return out


def block(p: dict, config: LlamaConfig, x, positions, sees, leaf=None, prompt=None) -> np.ndarray:
    z = rms_norm(p["norm_1"], x, config.eps)
    if leaf is not None:
        z = routed(leaf, z, config.adapter.temperature)
    x = x + attention(p["attn"], config, z, positions, sees, prompt)
    z = rms_norm(p["norm_2"], x, config.eps)
    gate = z @ p["mlp"]["gate"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (z @ p["mlp"]["up"]["kernel"])) @ p["mlp"]["down"]["kernel"]


def oracle(params, config: LlamaConfig, tokens, valid, has_image=None, visual=None) -> np.ndarray:
    """Logits [b t V] of right-padded rows, after the adapter if `has_image` is given; unrolled parameters."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embedding, rows = p["token_embedding"]["embedding"], []
    head = embedding.T if config.tied else p["head"]["kernel"]
    for i in range(len(tokens)):
        x = embedding[np.asarray(tokens[i])]
        sees = np.tril(np.ones((len(x), len(x)), bool)) & np.asarray(valid[i])[None]
        modality = has_image is not None and isinstance(config.adapter, Router)
        if modality:
            x = np.concatenate([p["adapter"]["modality"][int(has_image[i])][None], x])
            sees = np.pad(sees, ((1, 0), (1, 0)))
            sees[0, 0] = True
        for layer in range(config.layers):
            leaf = prompt = None
            if modality:
                leaf = jax.tree.map(lambda a, at=layer: a[at], {k: p["adapter"][k] for k in ("router", "down", "up")})
            elif has_image is not None and layer >= config.layers - config.adapter.layers:
                at = layer - (config.layers - config.adapter.layers)
                added = 0.0 if visual is None or not has_image[i] else np.asarray(visual[i], np.float64)
                prompt = (p["adapter"]["tokens"][at] + added, p["adapter"]["gate"][at])
            x = block(p[f"blocks_{layer}"], config, x, np.arange(len(x)), sees, leaf, prompt)
        rows.append((rms_norm(p["norm_f"], x, config.eps) @ head)[1 if modality else 0 :])
    return np.stack(rows)

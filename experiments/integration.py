"""How far visual tokens lie from text tokens inside the language model: the modality integration rate.

Huang et al., Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality Integration Rate (ICCV
2025, arXiv 2410.07167): per layer both kinds of token are divided by the text tokens' mean length, tokens whose length
is 3 standard deviations off the median are left out, and the Frechet distance between the two clouds is taken;
MIR = log10 of the sum over layers. Lower is closer. Our text is the sample's own, behind its visual tokens.
"""

import jax
import numpy as np
from jaxtyping import Float
from scipy import linalg

from eim_jax.models.batch import Batch
from eim_jax.models.language.llama_block import LlamaBlock
from eim_jax.models.layers import Block
from eim_jax.models.lm_input import LMInput
from eim_jax.models.vlm import VLM


def integration_rate(vlm: VLM, params: dict, batch: Batch) -> float | None:
    """MIR of a batch's samples with an image; None where the LM reads no visual tokens (LLaMA-Adapter).

    `params` is the nested tree {"visual", "st", "lm", ...}; the batch needs image, has_image, tokens and valid.
    """
    adapter = vlm.lm.config.adapter
    if adapter is not None and not adapter.visual_tokens:
        return None
    shown = np.asarray(batch.has_image)
    text = np.asarray(batch.valid)[shown]
    total = 0.0
    for layer in jax.jit(layers, static_argnums=0)(vlm, params, batch):
        visual, words = (np.asarray(slots, np.float64)[shown] for slots in layer)
        total += distance(visual.reshape(-1, visual.shape[-1]), words[text])
    return float(np.log10(total))


def layers(vlm: VLM, params: dict, batch: Batch) -> list[tuple[Float[jax.Array, "b m d"], Float[jax.Array, "b t d"]]]:
    """The outputs of every block of the LM at the visual tokens and at the text that stands behind them."""
    visual = vlm.connect(params, vlm.encode_image(params, batch.image))
    read = vlm.lm_input(params, batch.tokens, batch.valid, visual=visual, has_image=batch.has_image)
    m, t = visual.shape[1], batch.tokens.shape[1]
    return [(out[:, -t - m : -t], out[:, -t:]) for out in block_outputs(vlm, params, read)]


def block_outputs(vlm: VLM, params: dict, read: LMInput) -> list[Float[jax.Array, "b s d"]]:
    """The outputs of every block of the LM at all that it reads."""
    _, kept = vlm.lm.apply(
        {"params": params["lm"]},
        read.embeds,
        valid=read.valid,
        positions=read.positions,
        method="hidden",
        **({} if read.steer is None else {"steer": read.steer}),
        capture_intermediates=lambda module, name: isinstance(module, (Block, LlamaBlock)) and name == "__call__",
        mutable=["intermediates"],
    )
    blocks = kept["intermediates"]
    if "blocks" in blocks:  # scanned: one array [layers b s d]
        return list(blocks["blocks"]["__call__"][0][0])
    return [blocks[f"blocks_{i}"]["__call__"][0][0] for i in range(vlm.lm.config.layers)]


def distance(visual: Float[np.ndarray, "n d"], text: Float[np.ndarray, "m d"]) -> float:
    """Frechet distance between Gaussians fitted to two clouds, in units of the text's mean length."""
    scale = np.linalg.norm(text, axis=1).mean()
    (v, t) = (_kept(cloud / scale) for cloud in (visual, text))
    a, b = np.cov(v, rowvar=False), np.cov(t, rowvar=False)
    root = linalg.sqrtm(a @ b).real
    return float(np.sum((v.mean(0) - t.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(root))


def _kept(cloud: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m d"]:
    lengths = np.linalg.norm(cloud, axis=1)
    return cloud[np.abs(lengths - np.median(lengths)) <= 3 * lengths.std()]

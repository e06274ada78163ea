"""Training steps of LLaMA-like models on loss_base from shapes alone: whole, LoRA, LLaMA-Adapter's prompts, LaVIN's."""

import dataclasses

import jax.numpy as jnp
import lavin_case
from step_case import Case, make_case

from eim_jax.config import LossWeights, Stage
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.lora import Layer, LoRA, Tuned, linear_layers
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM

KINDS = ("full", "lora", "llama_adapter", "lavin")
TRAINED = {"full": "lm/.*", "lora": "lm/.*/lora/.*", "llama_adapter": "lm/adapter/.*"}
LORA = LoRA(rank=8, alpha=16.0)
PROMPTS = 10  # of LLaMA-Adapter, in every layer
SMOLLM2 = LlamaConfig(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, mlp=1536, tied=True)  # the 135M one
VISION = CLIPVisionConfig(image_size=112, patch_size=16, width=256, layers=1, heads=4, mlp=256, joint=64)
VISUAL = VISION.tokens  # of which LaVIN's pooled grid keeps all
TEXT_TOWER = CLIPTextConfig(vocab=512, width=32, layers=1, heads=4, mlp=128, joint=64)
SIZES = {
    "smollm2": SMOLLM2,
    "tiny": LlamaConfig(vocab=512, width=64, layers=2, heads=4, kv_heads=2, mlp=128, tied=True),
}


def llama_case(lm: LlamaConfig, kind: str, *, batch: int, text: int, dtype: str = "float32") -> Case:
    """Returns the step of a kind, layers unrolled and nothing recomputed, on cached features of 50 visual tokens.

    The text is supervised whole; of LaVIN's, whose case is lavin_case's, the second half, and the head reads no more.
    """
    form = {"dtype": jnp.dtype(dtype), "scan": False}
    lm = dataclasses.replace(lm, **form)
    if kind == "lavin":
        length = 1 + len(lavin_case.WITH_IMAGE) + len(lavin_case.WITHOUT_IMAGE) + VISUAL + text
        size = lavin_case.Size(lm, VISION, TEXT_TOWER, temperature=10.0, length=length, samples=300)
        return lavin_case.lavin_case(
            size, "adapter", quant="none", batch=batch, accumulate=1, remat="none", dtype=dtype, scan=False
        )
    st = {"kind": "projector", "width_in": VISION.width, "width_out": lm.width, "dtype": form["dtype"]}
    if kind == "llama_adapter":
        lm = dataclasses.replace(lm, adapter=ZeroInit(prompts=PROMPTS, layers=lm.layers))
        st |= {"kind": "queries", "tokens": PROMPTS, "hidden": 64, "layers": 1, "heads": 4}
    tower = Llama(lm)
    vlm = VLM(
        visual=CLIPVision(dataclasses.replace(VISION, **form)),
        text=CLIPText(dataclasses.replace(TEXT_TOWER, **form)),
        st=make_st(STConfig(**st)),
        lm=_with_terms(tower) if kind == "lora" else tower,
        features="full",
    )
    stage = Stage(("st/.*", TRAINED[kind]), LossWeights(base=1.0), steps=1000, warmup_steps=10, batch=batch, lr=1e-4)
    return make_case(vlm, stage, ever=("st/.*", TRAINED[kind]), text=text, samples=300)


def _with_terms(tower: Llama) -> Tuned:
    """The tower with a low-rank term beside every linear layer."""
    found = linear_layers(tower, 1, 1, dtype="int32")
    layers = tuple(Layer(path, width, outputs) for path, (width, outputs) in found.items())
    return Tuned(tower, LORA, layers)

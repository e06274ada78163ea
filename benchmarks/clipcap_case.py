"""ClipCap's and ClipCap-EIM's training steps (ViT-B/32, GPT-2 small) from shapes alone, and their arithmetic."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from step_case import Case, make_case, trains_visual

from eim_jax.config import LossWeights, Stage
from eim_jax.losses.table import losses_of
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM

SAMPLES = 566_747  # COCO's captions, Karpathy's train + restval
TEXT = 40
PROMPTS, ST, LM = "visual/prompt/.*", "st/.*", "lm/.*"
STAGES = {
    "base": ((ST, LM), LossWeights(base=1.0)),
    "st": ((ST,), LossWeights(st=1.0)),
    "lm": ((LM,), LossWeights(lm=1.0)),
    "ie": ((PROMPTS, ST, LM), LossWeights(base=1.0, ie=1.0)),
}


class Size(NamedTuple):
    """The towers' shapes, the prompt network's inner width, the text's slots and the queues' rows."""

    visual: CLIPVisionConfig = CLIPVisionConfig()
    text: CLIPTextConfig = CLIPTextConfig()
    lm: GPT2Config = GPT2Config()
    prompt_hidden: int = 1408
    length: int = TEXT
    samples: int = SAMPLES


SIZES = {
    "full": Size(),
    "miniature": Size(
        CLIPVisionConfig(image_size=32, patch_size=8, width=96, layers=4, heads=3, mlp=384, joint=64),
        CLIPTextConfig(vocab=724, width=96, layers=2, heads=3, mlp=384, joint=64),
        GPT2Config(vocab=745, width=128, layers=4, heads=4),
        prompt_hidden=128,
        length=28,
        samples=6000,
    ),
    "tiny": Size(
        CLIPVisionConfig(image_size=64, patch_size=16, width=64, layers=2, heads=4, mlp=256, joint=32),
        CLIPTextConfig(vocab=512, width=32, layers=1, heads=4, mlp=128, joint=32),
        GPT2Config(vocab=512, width=64, layers=2, heads=4),
        prompt_hidden=96,
        length=12,
        samples=300,
    ),
}


def clipcap_case(
    size: Size, stage: str, *, batch: int, dtype: str = "bfloat16", dropout: float = 0.1, attention: str = "softmax"
) -> Case:
    """Returns the step of a stage: EIM's st, lm, ie (full features, FFN), or ClipCap's own base ([CLS], MLP)."""
    form, own = {"dtype": jnp.dtype(dtype)}, stage == "base"
    towers = form | {"attention": attention}
    vision = dataclasses.replace(size.visual, **towers)
    if not own:
        vision = dataclasses.replace(vision, prompts=10, prompt_hidden=size.prompt_hidden)
    lm = dataclasses.replace(size.lm, dropout=dropout, **towers)
    st = STConfig(kind="mlp", width_in=vision.joint, width_out=lm.width, **form)
    if not own:
        st = STConfig(kind="ffn", width_in=vision.width, width_out=lm.width, **form)
    vlm = VLM(
        visual=CLIPVision(vision),
        text=CLIPText(dataclasses.replace(size.text, **towers)),
        st=make_st(st),
        lm=GPT2(lm),
        features="cls" if own else "full",
        output_layer=own,
    )
    patterns, losses = STAGES[stage]
    chosen = Stage(patterns, losses, steps=1000, warmup_steps=10, batch=batch)
    ever = patterns if own else STAGES["ie"][0]
    return make_case(vlm, chosen, ever=ever, text=size.length, samples=size.samples)


def flops(case: Case) -> float:
    """Floating-point operations of a step's matrix products.

    Weights cost 2 a token forward, 2 back to the activations and, if trained, 2 for their gradient; attention over s
    slots 4 s width a layer forward and twice that back. The queue's own product with the keys is left out here: it is
    bound by their reading.
    """
    c, v, st, stage = case.vlm.lm.config, case.vlm.visual.config, case.vlm.st.config, case.stage
    active = {loss.name for loss in losses_of(stage)}

    def blocks(config, mlp, slots):
        weights = config.layers * (4 * config.width**2 + 2 * config.width * mlp)
        return slots * weights, config.layers * slots * slots * config.width

    total = 0.0
    seen = 1 if case.vlm.features == "cls" else v.tokens
    visual = seen if st.kind == "ffn" else st.tokens
    if active & {"base", "lm"}:
        text = case.arguments[3].tokens.shape[1]
        weights, scores = blocks(c, c.mlp or 4 * c.width, text + (visual if "base" in active else 0))
        total += 6 * weights + 12 * scores + (6 * text * c.width * c.vocab if "base" in active else 0)
    if active & {"base", "st"}:
        mapped = st.width_out * (visual if st.kind == "ffn" else st.tokens)
        inner = seen if st.kind == "ffn" else 1
        back = 6 if trains_visual(stage) else 4  # cached features get no gradient
        total += st.hidden_width * (back * inner * st.width_in + 6 * mapped)
    if trains_visual(stage):  # the tower is frozen: forward, and back through it to the prompts
        weights, scores = blocks(v, v.mlp, v.tokens)
        total += 4 * weights + 12 * scores * (v.tokens + v.prompts) / v.tokens
        total += 2 * v.tokens * 3 * v.patch_size**2 * v.width
        total += 12 * v.layers * v.prompts * v.width * v.prompt_hidden / stage.batch  # once for all rows
    return total * stage.batch

"""LaVIN's training steps with EIM from shapes alone, and their arithmetic."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from step_case import Case, make_case

from eim_jax.config import LossWeights, Stage
from eim_jax.models.adapters.lavin import Router
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vision.features import GRID
from eim_jax.models.vlm import VLM

LENGTH = 512  # slots that the LM reads
SAMPLES = 12726  # ScienceQA's training questions: the rows of its queues
WITH_IMAGE, WITHOUT_IMAGE = (7084, 29901, 29871), (7084, 29901, 405, 29914, 29909)  # "Image: " and "Image: N/A"
TRAINED = ("lm/adapter/.*", "st/.*")
STAGES = {
    "st": (("st/.*",), LossWeights(st=1.0)),
    "lm": (("lm/adapter/.*",), LossWeights(lm=1.0)),
    "adapter": (TRAINED, LossWeights(base=1.0)),
    "ie": (("visual/adapter/.*", *TRAINED), LossWeights(base=1.0, ie=1.0)),
}
EVER = STAGES["ie"][0]  # what some stage of the sequence trains, held in float32 throughout (inputs.start)


class Size(NamedTuple):
    """The two towers' shapes; the text of `length` slots is what markers and visual tokens leave."""

    lm: LlamaConfig
    visual: CLIPVisionConfig
    text: CLIPTextConfig
    temperature: float
    length: int = LENGTH
    samples: int = SAMPLES
    matmul: int = 8192  # side of the square product by which the device's peak is measured
    copy: int = 1 << 30  # bytes


_L14 = CLIPVisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp=4096, joint=768)
_L14_TEXT = CLIPTextConfig(width=768, heads=12, mlp=3072, joint=768)
SIZES = {
    "7b": Size(LlamaConfig(), _L14, _L14_TEXT, 10.0),
    "13b": Size(LlamaConfig(width=5120, layers=40, heads=40, mlp=13824), _L14, _L14_TEXT, 5.0),
    "tiny": Size(
        LlamaConfig(width=256, layers=2, heads=4, mlp=704),
        CLIPVisionConfig(image_size=112, patch_size=14, width=64, layers=2, heads=4, mlp=256, joint=32),
        CLIPTextConfig(vocab=512, width=32, layers=1, heads=4, mlp=128, joint=32),
        temperature=10.0,
        length=128,
        samples=300,
        matmul=256,
        copy=1 << 20,
    ),
}
SIZES["smallest"] = SIZES["tiny"]._replace(lm=LlamaConfig(width=64, layers=2, heads=4, mlp=192), length=80)


def lavin_case(
    size: Size,
    stage: str,
    *,
    quant: str,
    batch: int,
    accumulate: int,
    remat: str = "full",
    dtype: str = "bfloat16",
    scan: bool = True,
    attention: str = "softmax",
) -> Case:
    """Returns the step of LaVIN's `stage` with abstract arguments, as eim_jax.training.assembly would build it."""
    router = Router(temperature=size.temperature)
    form = {"scan": scan, "remat": remat, "dtype": jnp.dtype(dtype), "attention": attention}
    vision = dataclasses.replace(size.visual, adapter=router, **form)
    lm = dataclasses.replace(size.lm, adapter=router, quant=quant, **form)
    vlm = VLM(
        visual=CLIPVision(vision),
        text=CLIPText(dataclasses.replace(size.text, **form)),
        st=make_st(STConfig(kind="projector", width_in=vision.width, width_out=lm.width, dtype=form["dtype"])),
        lm=Llama(lm),
        features="grid",
        bos=1,
        with_image=WITH_IMAGE,
        without_image=WITHOUT_IMAGE,
    )
    patterns, losses = STAGES[stage]
    chosen = Stage(patterns, losses, steps=1000, warmup_steps=10, batch=batch, accumulate=accumulate, lr=1e-4)
    return make_case(vlm, chosen, ever=EVER, text=text_slots(vlm, chosen, size), samples=size.samples)


def visual_tokens(vlm: VLM) -> int:
    """Tokens that the ST gives the LM: [CLS] and the pooled grid."""
    c = vlm.visual.config
    return 1 + min(GRID, c.image_size // c.patch_size) ** 2


def text_slots(vlm: VLM, stage: Stage, size: Size) -> int:
    """Slots left for the text: behind BOS loss_base's rows hold an image behind its marker, or that of no image."""
    if "base" not in stage.losses:
        return size.length - 1
    return size.length - 1 - max(len(WITH_IMAGE) + visual_tokens(vlm), len(WITHOUT_IMAGE))


def flops(case: Case, length: int) -> dict[str, float]:
    """Floating-point operations of a step's matrix products, by what asks for them.

    P weights cost a token 2P forward and 2P back to the activations (frozen: no gradient of their own); attention over
    s slots costs 4 s width a layer forward and twice that back, as the whole square is computed. remat="full" computes
    each block once more, except its last map, whose result no gradient reads; "dots" its q k^T alone. The head reads
    text slots only, the ST's own gradients make 6P. Adapters, norms and queues (under 0.5 % at 7B) are left out.
    """
    c, v, rows, losses = case.vlm.lm.config, case.vlm.visual.config, case.stage.batch, case.stage.losses
    st = case.vlm.st.config
    mapped = 2 * rows * visual_tokens(case.vlm) * st.hidden_width * (st.width_in + st.width_out)
    if "st" in losses:
        return {"forward": mapped, "backward": 2 * mapped, "recomputed": 0}

    def tower(width, inner, mlp, maps, layers, slots, remat):
        weights, scores = layers * (2 * width * inner[0] + 2 * width * inner[1] + maps * width * mlp), 0
        scores = layers * 4 * slots * inner[0]
        again = {"full": 2 * (weights - layers * width * mlp) + scores, "dots": scores // 2, "none": 0}[remat]
        return [rows * slots * part for part in (2 * weights + scores, 2 * weights + 2 * scores, again)]

    query = c.heads * c.head_width
    forward, backward, again = tower(c.width, (query, c.kv_heads * c.head_width), c.mlp, 3, c.layers, length, c.remat)
    if "lm" in losses:
        return {"forward": forward, "backward": backward, "recomputed": again}
    head = 2 * rows * case.arguments[3].tokens.shape[1] * c.width * c.vocab
    forward, backward = forward + head + mapped, backward + head + 2 * mapped
    if case.arguments[3].image is not None:
        more = tower(v.width, (v.width, v.width), v.mlp, 2, v.layers, v.tokens, v.remat)
        forward += more[0] + 2 * rows * v.tokens * 3 * v.patch_size**2 * v.width
        backward, again = backward + more[1], again + more[2]
    return {"forward": forward, "backward": backward, "recomputed": again}

"""The parameter arithmetic of the EIM paper, by shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.gpt2 import GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPTextConfig, CLIPVisionConfig
from eim_jax.pretrained import clip_shapes, lm_shapes

LOGIT_SCALE = 1  # CLIP's count includes it; our trees do not
GPT2_LARGE = GPT2Config(width=1280, layers=36, heads=20)
PROMPTED_B32 = CLIPVisionConfig(prompts=10, prompt_hidden=1408)
OUTPUT_LAYER = 768 * 512


def count(shapes: dict, prefix: str = "") -> int:
    return sum(leaf.size for path, leaf in shapes.items() if path.startswith(prefix))


def st_count(**config) -> int:
    st = make_st(STConfig(**config))
    seen = jax.ShapeDtypeStruct((1, 1, st.config.width_in), jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(st.init, jax.random.key(0), seen)))


CLIP_B32 = count(clip_shapes(CLIPVisionConfig(), CLIPTextConfig())) + LOGIT_SCALE
SMALL, MLP, FFN = count(lm_shapes(GPT2Config())), st_count(kind="mlp", width_in=512), st_count(kind="ffn")
PROMPTS = count(clip_shapes(PROMPTED_B32, CLIPTextConfig()), "visual/prompt/")


def test_clip_b32_has_151_277_313_parameters_and_an_output_layer_of_393_216():
    assert CLIP_B32 == 151_277_313
    assert count(clip_shapes(CLIPVisionConfig(), CLIPTextConfig()), "visual/projection/") == OUTPUT_LAYER == 393_216


@pytest.mark.parametrize(
    ("vision", "text", "total"),
    [
        ({"patch_size": 16}, {}, 149_620_737),
        (
            {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp": 4096, "joint": 768},
            {"width": 768, "heads": 12, "mlp": 3072, "joint": 768},
            427_616_513,
        ),
        (
            {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp": 4096, "joint": 768, "image_size": 336},
            {"width": 768, "heads": 12, "mlp": 3072, "joint": 768},
            427_944_193,
        ),
    ],
    ids=["B/16", "L/14", "L/14@336"],
)
def test_other_clips_have_openais_counts(vision, text, total):
    assert count(clip_shapes(CLIPVisionConfig(**vision), CLIPTextConfig(**text))) + LOGIT_SCALE == total


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("config", "total"), [(GPT2Config(), 124_439_808), (GPT2_LARGE, 774_030_080)])
def test_gpt2_counts(config, total, scan):
    scanned = GPT2Config(width=config.width, layers=config.layers, heads=config.heads, scan=scan)
    assert count(lm_shapes(scanned)) == total


def test_st_counts():
    assert MLP == 31_468_800
    assert FFN == 4_722_432
    assert st_count(kind="transformer", width_in=512) == 41_745_408
    assert st_count(kind="transformer", width_in=640) == 42_728_448


def test_prompt_network_counts_26_070_528():
    assert PROMPTS == 26_070_528


def test_clipcap_small_trains_155_91m_of_307_19m():
    assert round((SMALL + MLP) / 1e6, 2) == 155.91
    assert round((SMALL + MLP + CLIP_B32) / 1e6, 2) == 307.19


def test_clipcap_eim_trains_155_23m_of_306_11m():
    """Without the output layer; the paper cuts the total's third decimal (306,116,865)."""
    trained = SMALL + FFN + PROMPTS
    assert round(trained / 1e6, 2) == 155.23
    assert (trained + CLIP_B32 - OUTPUT_LAYER) // 10_000 / 100 == 306.11


def test_clipcap_large_has_956_78m_and_eim_is_a_third_of_it():
    """The paper counts the ST at its size for GPT-2 small."""
    large = CLIP_B32 + MLP + count(lm_shapes(GPT2_LARGE))
    assert round(large / 1e6, 2) == 956.78
    assert round(100 * 306.11 / (large / 1e6), 2) == 31.99
    assert round(large / 306.11e6, 2) == 3.13


LLAMA_13B = {"width": 5120, "layers": 40, "heads": 40, "mlp": 13824}
L14 = {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp": 4096, "joint": 768}


def adapter_count(**config) -> int:
    """Parameters of an adapted LLaMA's adapters; the rest of it must be LLaMA's own."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(LlamaConfig(**config)).init, jax.random.key(0), tokens)["params"]
    adapter, rest = ({n: x for n, x in shapes.items() if (n == "adapter") == own} for own in (True, False))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (adapter, rest)]
    assert sizes[1] == (6_738_415_616 if config.get("width", 4096) == 4096 else 13_015_864_320)
    return sizes[0]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("llama", "temperature", "lm", "projector", "total"),
    [({}, 10.0, 2_629_952, 659_584, 3_781_296), (LLAMA_13B, 5.0, 4_106_640, 791_680, 5_390_080)],
    ids=["7B", "13B"],
)
def test_lavin_trains_3_781_296_and_5_390_080(llama, temperature, lm, projector, total, scan):
    router = Router(temperature=temperature)
    adapters = adapter_count(**llama, adapter=router, scan=scan)  # with the modality embedding
    clip = count(clip_shapes(CLIPVisionConfig(**L14, adapter=router, scan=scan), CLIPTextConfig()), "visual/adapter/")
    st = st_count(kind="projector", width_in=1024, width_out=llama.get("width", 4096))
    assert (adapters, clip, st) == (lm, 24 * 20_490, projector)
    assert adapters + clip + st == total


@pytest.mark.parametrize(("width_in", "st", "total"), [(768, 8_814_080, 10_043_904), (1024, 8_945_152, 10_174_976)])
def test_llama_adapter_trains_1_229_760_and_its_st(width_in, st, total):
    """The released file also holds gates of the two lowest layers, 32 each, that nothing reads."""
    unread = 2 * 32
    adapters = adapter_count(adapter=ZeroInit())
    assert adapters == 10 * 30 * 4096 + 30 * 32 == 1_229_760
    assert st_count(kind="queries", width_in=width_in, width_out=4096) == st
    assert adapters + unread + st == total


def test_llama_adapters_larger_st_has_60_460_800():
    assert st_count(kind="queries", width_in=768, width_out=4096, hidden=768, layers=8) == 60_460_800

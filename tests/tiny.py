"""A model of a few thousand parameters and a batch of noise, for tests of the loop and its losses."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.config import from_config_dict
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM
from eim_jax.training import kinds, partition

SAMPLES, TOKENS, WIDTH, JOINT, VOCAB = 24, 7, 12, 8, 31


def config_of(name, **changes):
    """A config file with fields changed: {"data.scenes": 24}."""
    values = importlib.import_module(f"configs.{name}").get_config()
    with values.unlocked():
        for field, value in changes.items():
            *path, last = field.split(".")
            holder = values
            for key in path:
                holder = holder[key]
            holder[last] = value
    config = from_config_dict(values)
    kinds.check(config)
    return config


def loud(init, *args, size=0.3, seed=1, **options) -> dict:
    """Parameters of which none is zero, in the shapes that `init` would give (not compiled: it takes seconds)."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), *args, **options)["params"])
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + size * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def model(dropout=0.0, **switches) -> tuple[VLM, dict]:
    """(VLM, flat parameters) with prompts, 5 visual tokens and an FFN."""
    vision = CLIPVisionConfig(
        image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp=32, joint=JOINT, prompts=2, prompt_hidden=6
    )
    text = CLIPTextConfig(vocab=VOCAB, context=9, width=16, layers=1, heads=2, mlp=32, joint=JOINT, eos_id=VOCAB - 1)
    language = GPT2Config(vocab=VOCAB, context=32, width=WIDTH, layers=2, heads=2, dropout=dropout)
    vlm = VLM(
        CLIPVision(vision),
        CLIPText(text),
        make_st(STConfig("ffn", width_in=16, width_out=WIDTH, hidden=20)),
        GPT2(language),
        **switches,
    )
    params = {
        "visual": loud(vlm.visual.init, jnp.zeros((1, 8, 8, 3)), size=0.1),
        "text": loud(vlm.text.init, jnp.zeros((1, 3), jnp.int32), size=0.1),
        "st": loud(vlm.st.init, jnp.zeros((1, 5, 16)), size=0.1),
        "lm": loud(vlm.lm.init, jnp.zeros((1, 3), jnp.int32), size=0.1),
    }
    return vlm, partition.flatten(params)


def batch(size=8, seed=0, text_only=()) -> Batch:
    """Rows with 2 to TOKENS tokens; the last half of each is supervised."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, TOKENS + 1, size)
    valid = np.arange(TOKENS)[None] < lengths[:, None]
    supervised = valid & (np.arange(TOKENS)[None] >= lengths[:, None] // 2)
    return Batch(
        index=jnp.asarray(rng.permutation(SAMPLES)[:size], jnp.int32),
        tokens=jnp.asarray(np.where(valid, rng.integers(0, VOCAB, (size, TOKENS)), 0), jnp.int32),
        valid=jnp.asarray(valid),
        supervised=jnp.asarray(supervised),
        image=jnp.asarray(rng.integers(0, 256, (size, 8, 8, 3)), jnp.uint8),
        has_image=jnp.asarray([i not in text_only for i in range(size)]),
    )


def queues(seed=1) -> dict[str, Queue]:
    """Unit rows of noise for all three losses."""
    rng = np.random.default_rng(seed)
    made = {}
    for kind, width in (("caption", JOINT), ("embed", WIDTH), ("hidden", WIDTH)):
        keys = rng.normal(size=(SAMPLES, width))
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        made[kind] = Queue(jnp.asarray(keys, jnp.float32), jnp.arange(SAMPLES, dtype=jnp.int32), SAMPLES)
    return made

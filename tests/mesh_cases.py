"""Real training steps of every recipe at a few thousand parameters, from shapes, on any mesh of the fake devices."""

import dataclasses
import functools
import json
import math
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from tiny import config_of

from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning import plan
from eim_jax.planning.shapes import abstract_inputs
from eim_jax.pretrained import hub
from eim_jax.training import arm_model

# Quick to compile; how a program is partitioned does not depend on it.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SMALL = {  # changes to the miniature towers' config.json; 3 CLIP heads and 745 GPT-2 words divide over no mesh
    "clip": {
        "vision_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4},
        "text_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1},
    },
    "gpt2": {"n_embd": 32, "n_layer": 2},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
}
RECIPES = {  # config file and the changes that make it small
    "clipcap": (
        "miniature",
        {"towers.scan": True, "arm.eim.st_hidden": 64, "arm.eim.prompts": 2, "arm.eim.prompt_hidden": 16},
    ),
    "llama_adapter": (
        "miniature_llama_adapter",
        {f"arm.{arm}.{field}": n for arm in ("baseline", "eim") for field, n in (("st_hidden", 32), ("st_tokens", 4))}
        | {"arm.baseline.adapter_layers": 1, "arm.eim.adapter_layers": 1, "towers.scan": True},
    ),
    "lavin": ("miniature_lavin", {"arm.baseline.st_hidden": 16, "arm.eim.st_hidden": 16, "towers.scan": True}),
}


def small_towers(folder) -> dict[str, str]:
    """{"clip", "gpt2", "llama"} -> a directory with a small config.json and the tokenizer, without weights."""
    made = {}
    for name, changes in SMALL.items():
        source, target = hub.resolve(f"miniature/{name}"), folder / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((target / "config.json").read_text())
        for field, value in changes.items():
            config[field] = {**config[field], **value} if isinstance(value, dict) else value
        (target / "config.json").write_text(json.dumps(config))
        made[name] = str(target)
    return made


@functools.cache
def prepared(clip, lm, recipe, arm, stage, quant="none", samples=40, batch=16, accumulate=1):
    """(inputs on one device, the arm, its parameters' shapes) of a recipe's stage with small towers."""
    name, changes = RECIPES[recipe]
    changes = changes | {"towers.clip": clip, "towers.lm": lm, "towers.quant": quant, "data.max_tokens": 10}
    short = {"steps": 4, "warmup_steps": 0, "warmup_epochs": 0.0, "batch": batch, "accumulate": accumulate}
    config = config_of(name, **changes, **{f"stages.{stage}.{field}": value for field, value in short.items()})
    inputs, _ = abstract_inputs(config, make_mesh((1, 1, 1), jax.devices()[:1]), samples)
    chosen = dataclasses.replace(config.arm[arm], sequence=(stage,))
    return inputs, chosen, arm_model.shapes(inputs, chosen, arm_model.model(inputs, chosen))


@functools.cache
def compiled(mesh, stage, *case, **sizes):
    """The stage's step as training would build it on the mesh: (its arguments' shapes, compiled)."""
    inputs, arm, shapes = prepared(*case, stage=stage, **sizes)
    inputs = dataclasses.replace(inputs, mesh=make_mesh(mesh, jax.devices()[: math.prod(mesh)]))
    params = plan.placed(shapes, inputs.mesh)
    one = inputs.config.stages[stage]
    program = plan.stage_program(inputs, arm_model.model(inputs, arm), one, params, one.steps)
    return program.arguments, program.step.lower(*program.arguments).compile(compiler_options=QUICK)


def numbers(arguments, text_only=()):
    """Arrays for a program's shapes, the same for every mesh: noise by each leaf's name, a new optimizer."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if jnp.issubdtype(leaf.dtype, jnp.uint8):
            return rng.integers(0, 256, leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(-127, 128, leaf.shape)
        noise = rng.standard_normal(leaf.shape)
        if name.endswith(("scale']", "scale_scale']", "scale_mean']")):
            return (1 if "/attn/" not in name and "/mlp/" not in name else 1e-3) * (1 + 0.1 * noise)
        return noise * (0.5 / math.sqrt(leaf.shape[-2]) if leaf.ndim > 1 else 0.1)

    trained, state, frozen, batch, queues, _, number = arguments
    samples = min((len(queue.groups) for queue in queues.values()), default=24)
    b, rng = batch.index.shape[0], np.random.default_rng(0)
    filled = batch._replace(index=rng.permutation(samples)[:b] if samples >= b else rng.integers(0, samples, b))
    if batch.tokens is not None:
        t = batch.tokens.shape[1]
        lengths = rng.integers(3, t + 1, b)[:, None]
        filled = filled._replace(tokens=rng.integers(3, 700, (b, t)), valid=np.arange(t)[None] < lengths)
        if batch.supervised is not None:
            filled = filled._replace(supervised=filled.valid & (np.arange(t)[None] >= lengths // 2))
    if batch.has_image is not None:
        filled = filled._replace(has_image=~np.isin(np.arange(b), text_only))
    for field in ("image", "features"):
        if getattr(batch, field) is not None:
            filled = filled._replace(**{field: draw((field,), getattr(batch, field))})
    keys = {}
    for kind, queue in queues.items():
        rows = np.random.default_rng(len(kind)).standard_normal(queue.keys.shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        keys[kind] = dataclasses.replace(
            queue, keys=jnp.asarray(rows, jnp.float32), groups=jnp.arange(len(rows), dtype=jnp.int32)
        )

    def place(value, leaf):
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    trained, frozen = (
        jax.tree.map(place, jax.tree_util.tree_map_with_path(draw, part), part) for part in (trained, frozen)
    )
    state = jax.tree.map(lambda leaf: place(np.zeros(leaf.shape), leaf), state)
    whole = number.sharding
    key = jax.device_put(jax.random.key(0, impl="rbg"), whole)
    placed = (jax.tree.map(place, filled, batch), jax.tree.map(place, keys, queues))
    return (trained, state, frozen, *placed, key, place(np.int32(0), number))

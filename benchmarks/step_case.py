"""A stage's step as eim_jax.training.assembly builds it, from shapes alone, and random arguments for it."""

import functools
import math
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eim_jax import pretrained
from eim_jax.config import Config, Data, Losses, Stage
from eim_jax.losses import objective
from eim_jax.losses.kinds import QueueKind
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.lora import Tuned
from eim_jax.models.quant import NF4_SCALES
from eim_jax.models.vlm import VLM
from eim_jax.training import partition
from eim_jax.training.assembly import assemble

BLOCK = 1 << 20  # keys drawn at a time


class Case(NamedTuple):
    """A stage's step and the shapes of its arguments: (trained, opt_state, frozen, batch, queues, key, number)."""

    vlm: VLM
    stage: Stage
    step: object  # jitted, donating trained and opt_state
    arguments: tuple
    tx: object


def make_case(vlm: VLM, stage: Stage, *, ever: tuple[str, ...], text: int, samples: int) -> Case:
    """Returns the stage's step with abstract arguments.

    `ever` are the patterns of what some stage of the sequence trains, held in float32 throughout (inputs.start); `text`
    is the number of text slots, `samples` that of the queues' rows.
    """
    params = parameters(vlm, ever)
    made = assemble(vlm, stage, Losses(), params, stage.steps, functools.partial(_queue, vlm, params, samples, text))
    arguments = (
        made.trained,
        made.opt_state,
        made.frozen,
        batch_of(vlm, stage, params, text),
        made.queues,
        jax.eval_shape(lambda: jax.random.key(0, impl="rbg")),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return Case(vlm, stage, made.step, arguments, made.tx)


class _Sizes(NamedTuple):
    """What a queue's source asks of a run's inputs to tell one row's shape."""

    clip: object
    config: object


def _queue(vlm: VLM, params: dict, samples: int, text: int, kind: QueueKind) -> Queue:
    """The queue's shape, in the LM's dtype."""
    clip = pretrained.CLIP(vlm.visual.config, vlm.text.config, {})
    row = kind.source.row(_Sizes(clip, Config(data=Data(max_tokens=text))))

    def make(params, row):
        width = kind.keys(vlm, params, row).shape[1]
        return Queue(jnp.zeros((samples, width), vlm.lm.config.dtype), jnp.zeros(samples, jnp.int32), samples)

    return jax.eval_shape(make, partition.unflatten(params), row)


def parameters(vlm: VLM, ever: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Every leaf in the dtype in which inputs.start holds it."""
    c, token = vlm.visual.config, jnp.zeros((1, 1), jnp.int32)
    made = {
        "visual": (vlm.visual, jnp.zeros((1, c.image_size, c.image_size, 3))),
        "text": (vlm.text, token),
        "st": (vlm.st, jnp.zeros((1, 1, vlm.st.config.width_in))),
        "lm": (vlm.lm, token),
    }

    def init(key):
        flat = partition.flatten({name: module.init(key, x)["params"] for name, (module, x) in made.items()})
        for name, (module, _) in made.items():
            if isinstance(module, Tuned):
                flat |= {f"{name}/{path}": leaf for path, leaf in module.draw(key).items()}
        return flat

    def held(path, leaf):
        whole = any(re.fullmatch(pattern, path) for pattern in ever) or path.rpartition("/")[2] in NF4_SCALES
        whole = whole or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if whole else vlm.lm.config.dtype)

    return {path: held(path, leaf) for path, leaf in jax.eval_shape(init, jax.random.key(0)).items()}


def batch_of(vlm: VLM, stage: Stage, params: dict, text: int) -> Batch:
    """The fields that the stage reads: cached features where CLIP stays as it is, else images."""
    b, c = stage.batch, vlm.visual.config
    image = jax.ShapeDtypeStruct((b, c.image_size, c.image_size, 3), jnp.uint8)
    kinds = {name: jax.ShapeDtypeStruct((b, text), jnp.bool_) for name in ("valid", "supervised")}
    kinds |= {name: jax.ShapeDtypeStruct((b,), jnp.int32) for name in ("index",)}
    kinds |= {"has_image": jax.ShapeDtypeStruct((b,), jnp.bool_), "image": image}
    kinds["tokens"] = jax.ShapeDtypeStruct((b, text), jnp.int32)
    needed = objective.fields(stage, Losses())
    if "image" in needed and not trains_visual(stage):
        visual = {path: leaf for path, leaf in params.items() if path.startswith("visual/")}
        seen = jax.eval_shape(lambda flat, x: vlm.encode_image(partition.unflatten(flat), x), visual, image)
        kinds["features"] = jax.ShapeDtypeStruct(seen.shape, c.dtype)
        needed = (needed - {"image"}) | {"features"}
    return Batch(**{name: kinds[name] for name in needed})


def trains_visual(stage: Stage) -> bool:
    """Whether the stage changes CLIP.visual, so that its features cannot be cached."""
    return any(pattern.startswith("visual/") for pattern, _ in partition.patterns(stage))


def nbytes(tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def placed(arguments: tuple, device) -> tuple:
    """Abstract arguments that lie on that device, which need not be here."""
    there = jax.sharding.SingleDeviceSharding(device)

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)

    return jax.tree.map(place, arguments)


def compiled(case: Case, device=None):
    """Returns (the compiled step, seconds that tracing and compiling took, {buffer kind: bytes})."""
    start = time.perf_counter()
    made = case.step.lower(*(case.arguments if device is None else placed(case.arguments, device))).compile()
    return made, time.perf_counter() - start, buffers(made)


def buffers(made) -> dict[str, int]:
    """What a compiled program holds on each device, in bytes: {buffer kind: bytes}."""
    found = made.memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
    }
    sizes["peak"] = sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] - sizes["aliased"]
    return sizes


def draw(path: str, shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """A leaf that keeps activations finite, made where it will lie."""
    name = path.rpartition("/")[2]
    if shape.dtype == jnp.uint8:
        return jax.random.bits(key, shape.shape, jnp.uint8)
    if shape.dtype == jnp.int8:
        return jax.random.randint(key, shape.shape, -127, 128, jnp.int8)
    if name in ("bias", "scale", *NF4_SCALES):
        return jnp.full(
            shape.shape, {"bias": 0.0, "scale": 1.0, "scale_scale": 1e-4, "scale_mean": 0.04}[name], shape.dtype
        )
    return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)


def arrays(case: Case) -> tuple:
    """Random arguments of the step on the device, without its number; nothing of their size is ever on the host."""
    trained, _, frozen, shape, queues, _, _ = case.arguments
    key = jax.random.key(0, impl="rbg")
    make = jax.jit(draw, static_argnums=(0, 1))
    params = {
        path: make(path, leaf, jax.random.fold_in(key, i))
        for i, (path, leaf) in enumerate(sorted({**trained, **frozen}.items()))
    }
    trained, frozen = ({path: params[path] for path in part} for part in (trained, frozen))
    held = {}
    for kind, queue in queues.items():
        groups = jnp.zeros(queue.groups.shape, jnp.int32)
        held[kind] = Queue(unit_keys(queue.keys.shape, queue.keys.dtype, key), groups, queue.count)
    return trained, jax.jit(case.tx.init)({**trained, **frozen}), frozen, _batch(case, shape, key), held, key


class Updates:
    """A step that is compiled and called again and again on random arguments, which it holds."""

    def __init__(self, case: Case):
        self.made, self.compile_seconds, self.buffers = compiled(case)
        *self.state, frozen, batch, queues, key = arrays(case)
        self.rest = (frozen, batch, queues, key, jnp.int32(1))

    def run(self) -> jax.Array:
        """Does one update; returns its loss, which may still be under way."""
        *self.state, metrics = self.made(*self.state, *self.rest)
        return metrics["loss"]


def _batch(case: Case, shape: Batch, key) -> Batch:
    """Random values for the fields that are there: half of a text is supervised, LLaMA's rows have an image in turn."""
    rows = jnp.arange(case.stage.batch)
    queue = next(iter(case.arguments[4].values()), None)
    made = {"index": rows if queue is None else rows % queue.keys.shape[0]}
    if shape.tokens is not None:
        text = shape.tokens.shape
        made["tokens"] = jax.random.randint(key, text, 0, case.vlm.lm.config.vocab, jnp.int32)
        made["valid"] = jnp.ones(text, bool)
    if shape.supervised is not None:
        every = case.vlm.bos is None  # a caption is supervised whole
        made["supervised"] = jnp.broadcast_to(every | (jnp.arange(text[1]) >= text[1] // 2), text)
    if shape.image is not None:
        made["image"] = jax.random.bits(key, shape.image.shape, jnp.uint8)
    if shape.features is not None:
        made["features"] = jax.random.normal(key, shape.features.shape, shape.features.dtype)
    if shape.has_image is not None:
        made["has_image"] = (rows % 2 == 0) | (case.vlm.bos is None)
    return Batch(**made)


def unit_keys(shape: tuple[int, int], dtype, key) -> jax.Array:
    """Random unit rows, drawn in blocks: no float32 copy of all keys is ever there."""
    number, width = shape
    blocks = math.ceil(number / BLOCK)
    rows = math.ceil(number / blocks)

    def one(i):
        x = jax.random.normal(jax.random.fold_in(key, i), (rows, width), jnp.float32)
        return (x / jnp.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)

    return jax.jit(lambda: jax.lax.map(one, jnp.arange(blocks)).reshape(-1, width)[:number])()

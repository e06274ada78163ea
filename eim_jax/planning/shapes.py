"""The inputs of a run without any of its files: towers as shapes, a split of which only the numbers are known."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eim_jax import pretrained
from eim_jax.config import Config, ConfigError, Stage
from eim_jax.data import tokenize
from eim_jax.data.datasets import data_set, load_split
from eim_jax.data.rows import widest
from eim_jax.data.samples import Split
from eim_jax.losses import objective
from eim_jax.losses.kinds import QueueKind
from eim_jax.losses.queue_build import encoder, rows_at_once
from eim_jax.losses.queue_placement import padded
from eim_jax.losses.queues import Queue, compress
from eim_jax.losses.table import center_of
from eim_jax.models.batch import Batch
from eim_jax.models.language import FAMILIES, family_of
from eim_jax.models.stacks import Form
from eim_jax.models.vision import VISION_TOWERS
from eim_jax.models.vlm import VLM
from eim_jax.parallel.chips import platform_of
from eim_jax.parallel.sharding import batch_sharding, parts_of, queue_sharding, rows_of_each
from eim_jax.pretrained import hub
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs, tower_settings
from eim_jax.training.tower_form import attention_on_mesh, describe_attention, resolve_dtype, resolve_form
from eim_jax.training.vision_features import reads_features


class Counted(Split):
    """A training split of which only the numbers are known."""

    def __init__(self, samples: int, images: int):
        for field, value in (("name", "train"), ("samples", range(samples)), ("images", range(images))):
            object.__setattr__(self, field, value)


def abstract_inputs(
    config: Config, mesh: Mesh, samples: int = 0, platform: str | None = None
) -> tuple[Inputs, list[str]]:
    """A run's inputs as shapes, and notes on what was taken from where.

    `samples` overrides the number of training samples, `platform` that of the mesh's devices where they only stand in
    for others (it decides what "auto" means). Raises ConfigError where a size can be had from nowhere.
    """
    here = mesh.devices.flat[0]
    platform = platform or platform_of(here)
    dtype = resolve_dtype(config.towers.dtype, platform)
    keys = resolve_dtype(config.losses.queue_dtype, platform)
    towers, losses = replace(config.towers, dtype=dtype.name), replace(config.losses, queue_dtype=keys.name)
    config = replace(config, towers=towers, losses=losses)
    form = resolve_form(config, dtype, platform)
    notes = []
    if form["attention"].startswith("cudnn") and here.platform == "cpu":
        form["attention"] = "softmax"
        notes.append("compiled with float32 softmax in place of cuDNN's flash attention, which holds less: no scores")
    clip_dir, lm_dir = _at_hand(config.towers.clip), _at_hand(config.towers.lm)
    if clip_dir is not None:
        texts = _text_folder(config)
        vision, text = pretrained.clip_config(clip_dir, text=texts, image_size=config.towers.image_size, **form)
    else:
        vision, text = _published_towers(config, form, notes)
    if lm_dir is not None:
        lm = pretrained.lm_config(lm_dir, quant=config.towers.quant, **form)
    else:
        lm = replace(_published(FAMILIES, config.towers.lm, "lm", notes), **form)
        lm = pretrained.with_quant(lm, config.towers.quant, config.towers.lm)
    vision, lm = tower_settings(config, vision, lm, mesh)
    text = attention_on_mesh(text, mesh)
    if said := describe_attention(lm.attention):
        notes.append(said)
    leaves = {**pretrained.clip_shapes(vision, text), **pretrained.lm_shapes(lm)}
    train, note = _count(config, samples)
    notes.append(note)
    inputs = Inputs(
        config=config,
        workdir=Path(),
        mesh=mesh,
        dtype=dtype,
        clip=pretrained.CLIP(vision, text, {}),
        lm=pretrained.LM(lm, {}),
        towers=leaves,
        lm_tokenizer=_words(lm, lm_dir),
        clip_tokenizer=None,
        train=train,
        encoded=None,
        fingerprints={},
    )
    return inputs, notes


def _at_hand(name: str) -> Path | None:
    """The directory of a tower's config.json, if it is on this machine; nothing is downloaded."""
    if name in hub.BUILTIN or Path(name).expanduser().is_dir():
        return hub.resolve(name)
    repo, _, revision = name.partition("@")
    try:
        found = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision or None)
    except ValueError:  # no repository's name
        found = None
    return Path(found).parent if isinstance(found, str) else None


def _text_folder(config: Config) -> Path | str:
    """The directory of config.towers.text, if it is named; "" if not."""
    if not config.towers.text:
        return ""
    found = _at_hand(config.towers.text)
    if found is None:
        raise ConfigError(f"config.towers.text={config.towers.text}: its config.json is not on this machine")
    return found


def _published_towers(config: Config, form: Form, notes: list[str]):
    """The published shapes of the vision tower and of the text tower that makes K_t, as the run sets them."""
    towers = config.towers
    vision, text = _published(VISION_TOWERS, towers.clip, "clip", notes)
    if towers.text:
        if text is not None:
            raise ConfigError(f"{towers.clip} has its own text tower: config.towers.text is for one that has none")
        folder = _at_hand(towers.text)
        text = pretrained.clip_config(folder)[1] if folder else _published(VISION_TOWERS, towers.text, "text", notes)[1]
        if text is None:
            raise ConfigError(f"config.towers.text={towers.text} has no text tower: take a CLIP or SigLIP")
        vision = replace(vision, joint=text.joint)
    vision = replace(vision, image_size=towers.image_size or vision.image_size, **form)
    return vision, None if text is None else replace(text, **form)


def _published(families: dict, name: str, field: str, notes: list[str]):
    """The shape that some family has published under this hub id."""
    known = {hub_id: shape for family in families.values() for hub_id, shape in family.published.items()}
    repo = name.partition("@")[0]
    if repo not in known:
        raise ConfigError(
            f"config.towers.{field}={name}: its config.json is not on this machine and its sizes are not among the "
            f"known ones ({', '.join(known)}): give a directory that holds config.json"
        )
    notes.append(f"config.towers.{field}={name}: config.json is not here, the published sizes are taken")
    return known[repo]


def _words(lm, directory: Path | None):
    """The LM's tokenizer where it is at hand, else what its family lets stand for it."""
    if directory is None or not any(directory.glob("tokenizer*")):
        return family_of(lm).plan_tokenizer
    return tokenize.load_tokenizer(directory)


def _count(config: Config, samples: int) -> tuple[Split, str]:
    """The numbers asked for, those of the data where it is at hand, or the published ones."""
    data, kind = config.data, data_set(config.data)
    if samples:
        images = kind.published.images if kind.published else samples
        return Counted(samples, min(images, samples)), f"{samples:,} training samples (--samples)"
    if data.prepared or kind.at_hand(kind.settings(data)):
        with tempfile.TemporaryDirectory() as folder:
            split = load_split(config, "train", Path(folder))
        return Counted(len(split), len(split.images)), f"{len(split):,} training samples (counted)"
    if kind.published is None:
        raise ConfigError(
            f"config.data.kind={kind.name!r}: its files are not on this machine and its size is not published: "
            "give --samples=N"
        )
    size = kind.published
    note = f"{size.samples:,} training samples ({size.what}; --samples=N for yours)"
    return Counted(size.samples, size.images), note


def batch_shapes(inputs: Inputs, vlm: VLM, stage: Stage, params: Flat) -> Batch:
    """The batch that the stage's step reads, at its longest: features where they are cached, else images."""
    b, c, t = stage.batch, vlm.visual.config, widest(inputs.config.data)
    needed = objective.fields(stage, inputs.config.losses)
    image = jax.ShapeDtypeStruct((b, c.image_size, c.image_size, 3), jnp.uint8)
    kinds = {
        "index": ((b,), jnp.int32),
        "tokens": ((b, t), jnp.int32),
        "valid": ((b, t), jnp.bool_),
        "supervised": ((b, t), jnp.bool_),
        "image": (image.shape, image.dtype),
        "has_image": ((b,), jnp.bool_),
        "before": ((b, objective.before(stage, inputs.config.losses)), jnp.int32),
    }
    if "image" in needed and reads_features(inputs, stage, params):
        tree = partition.unflatten({path: leaf for path, leaf in params.items() if path.startswith("visual/")})
        seen = jax.eval_shape(vlm.encode_image, tree, image)
        kinds["features"] = (seen.shape, inputs.dtype)
        needed = (needed - {"image"}) | {"features"}
    rows = batch_sharding(inputs.mesh)
    return Batch(**{name: jax.ShapeDtypeStruct(*kinds[name], sharding=rows) for name in needed})


def queue_shapes(inputs: Inputs, vlm: VLM, kind: QueueKind) -> Queue:
    """The queue as shapes, its rows filled up to the devices'."""
    mesh, count, dtype = inputs.mesh, len(inputs.train), jnp.dtype(inputs.config.losses.queue_dtype)
    rows, held = padded(count, mesh), queue_sharding(mesh)

    def one_row(params, fields):
        keys, scale = compress(kind.keys(vlm, params, fields).astype(jnp.float32), dtype)
        return Queue(keys, jnp.zeros(1, jnp.int32), count, scale)

    row = jax.eval_shape(one_row, partition.unflatten(inputs.towers), kind.source.row(inputs))
    queue = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=held), row)
    if center_of(kind, inputs.config.losses) == "none":
        return queue
    return replace(queue, center=replicated(jax.ShapeDtypeStruct(queue.keys.shape[1:], jnp.float32), mesh))


def queue_encoder(inputs: Inputs, vlm: VLM, kind: QueueKind, towers: Flat) -> tuple[Callable, tuple]:
    """The program that encodes a queue's rows, and its arguments' shapes: a run's number of rows, at their longest.

    `towers` are the untouched ones' shapes with their shardings.
    """
    mesh, count, losses = inputs.mesh, len(inputs.samples), inputs.config.losses
    shards, by_row, dtype = parts_of(mesh), queue_sharding(mesh), jnp.dtype(losses.queue_dtype)
    held = rows_of_each(count, mesh)
    rows = min(rows_at_once(kind.source.size and kind.source.size(inputs)), held)
    encode_rows, step = encoder(functools.partial(kind.keys, vlm), count, dtype, losses.similarity, mesh)

    def by_device(leaf, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shards, *shape), leaf.dtype, sharding=by_row)

    fields = jax.tree.map(lambda leaf: by_device(leaf, rows, *leaf.shape[1:]), kind.source.row(inputs))
    row = by_device(jax.ShapeDtypeStruct((), jnp.int32), rows)
    params = partition.unflatten(towers)
    (made, _) = jax.eval_shape(encode_rows, params, fields, row)
    keys = jax.tree.map(lambda leaf: by_device(leaf, held, *leaf.shape[2:]), made)
    return step, (keys, params, fields, row, row)


def replicated(leaf, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape, whole on every device."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

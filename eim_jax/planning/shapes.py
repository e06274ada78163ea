"""The inputs of a run without any of its files: towers as shapes, a split of which only the numbers are known."""

import tempfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eim_jax import pretrained
from eim_jax.config import Config, ConfigError, Stage
from eim_jax.data.datasets import data_set, load_split
from eim_jax.data.samples import Split
from eim_jax.losses import objectives
from eim_jax.losses.queues import Queue, compress
from eim_jax.models.batch import Batch
from eim_jax.models.language.gpt2 import GPT2Config
from eim_jax.models.language.llama import LlamaConfig
from eim_jax.models.vision.clip import CLIPTextConfig, CLIPVisionConfig
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import batch_sharding, parts_of, queue_sharding
from eim_jax.pretrained import hub
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs, reads_features, resolve_attention, resolve_dtype, tower_settings

_L14 = {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp": 4096, "joint": 768}
_L14_TEXT = {"width": 768, "heads": 12, "mlp": 3072, "joint": 768}
# Published architectures, for hub ids whose config.json is not at hand.
CLIPS = {
    "openai/clip-vit-base-patch32": ({}, {}),
    "openai/clip-vit-base-patch16": ({"patch_size": 16}, {}),
    "openai/clip-vit-large-patch14": (_L14, _L14_TEXT),
    "openai/clip-vit-large-patch14-336": ({**_L14, "image_size": 336}, _L14_TEXT),
}
LMS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(width=1024, layers=24, heads=16),
    "gpt2-large": GPT2Config(width=1280, layers=36, heads=20),
    "gpt2-xl": GPT2Config(width=1600, layers=48, heads=25),
    "huggyllama/llama-7b": LlamaConfig(),
    "huggyllama/llama-13b": LlamaConfig(width=5120, layers=40, heads=40, mlp=13824),
}
LMS |= {f"openai-community/{name}": LMS[name] for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


class Counted(Split):
    """A training split of which only the numbers are known."""

    def __init__(self, samples: int, images: int):
        for field, value in (("name", "train"), ("samples", range(samples)), ("images", range(images))):
            object.__setattr__(self, field, value)


class LlamaWords:
    """What a plan needs of LLaMA's tokenizer where it is not at hand: BOS, and how many tokens LaVIN's markers have."""

    bos_token_id = 1

    def __call__(self, words: str, add_special_tokens: bool = False) -> dict:
        """Returns {"input_ids": ...} of one of the two markers."""
        return {"input_ids": {"Image: ": [7084, 29901, 29871], "Image: N/A": [7084, 29901, 405, 29914, 29909]}[words]}


def abstract_inputs(
    config: Config, mesh: Mesh, samples: int = 0, platform: str | None = None
) -> tuple[Inputs, list[str]]:
    """A run's inputs as shapes, and notes on what was taken from where.

    `samples` overrides the number of training samples, `platform` that of the mesh's devices where they only stand in
    for others (it decides what "auto" means). Raises ConfigError where a size can be had from nowhere.
    """
    platform = platform or mesh.devices.flat[0].platform
    dtype = resolve_dtype(config.towers.dtype, platform)
    keys = resolve_dtype(config.losses.queue_dtype, platform)
    towers, losses = replace(config.towers, dtype=dtype.name), replace(config.losses, queue_dtype=keys.name)
    config = replace(config, towers=towers, losses=losses)
    form = {"scan": config.towers.scan, "remat": config.towers.remat, "dtype": dtype}
    form["attention"] = resolve_attention(config.towers.attention, dtype, platform)
    notes = []
    if form["attention"] == "cudnn":
        form["attention"] = "softmax"
        notes.append("compiled with attention=softmax: cudnn holds less, as no scores are kept")
    clip_dir, lm_dir = _at_hand(config.towers.clip), _at_hand(config.towers.lm)
    if clip_dir is not None:
        vision, tokenize = pretrained.clip_config(clip_dir, **form)
    else:
        vision, tokenize = _published(CLIPS, config.towers.clip, "clip", notes)
        vision, tokenize = CLIPVisionConfig(**vision, **form), CLIPTextConfig(**tokenize, **form)
    if lm_dir is not None:
        lm = pretrained.lm_config(lm_dir, quant=config.towers.quant, **form)
    else:
        lm = replace(_published(LMS, config.towers.lm, "lm", notes), **form)
        lm = replace(lm, quant=config.towers.quant) if isinstance(lm, LlamaConfig) else lm
    vision, lm = tower_settings(config, vision, lm)
    leaves = {**pretrained.clip_shapes(vision, tokenize), **pretrained.lm_shapes(lm)}
    train, note = _count(config, samples)
    notes.append(note)
    inputs = Inputs(
        config=config,
        workdir=Path(),
        mesh=mesh,
        dtype=dtype,
        clip=pretrained.CLIP(vision, tokenize, {}),
        lm=pretrained.LM(lm, {}),
        towers=leaves,
        lm_tokenizer=_words(config, lm, lm_dir),
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


def _published(table: dict, name: str, field: str, notes: list[str]):
    known = name.partition("@")[0]
    if known not in table:
        raise ConfigError(
            f"config.towers.{field}={name}: its config.json is not on this machine and its sizes are not among the "
            f"known ones ({', '.join(table)}): give a directory that holds config.json"
        )
    notes.append(f"config.towers.{field}={name}: config.json is not here, the published sizes are taken")
    return table[known]


def _words(config: Config, lm, directory: Path | None):
    if not isinstance(lm, LlamaConfig):
        return None
    if directory is None or not any(directory.glob("tokenizer*")):
        return LlamaWords()
    from eim_jax.data import tokenize

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
    b, c, t = stage.batch, vlm.visual.config, inputs.config.data.max_tokens
    needed = objectives.fields(stage, inputs.config.losses)
    image = jax.ShapeDtypeStruct((b, c.image_size, c.image_size, 3), jnp.uint8)
    kinds = {
        "index": ((b,), jnp.int32),
        "tokens": ((b, t), jnp.int32),
        "valid": ((b, t), jnp.bool_),
        "supervised": ((b, t), jnp.bool_),
        "image": (image.shape, image.dtype),
        "has_image": ((b,), jnp.bool_),
    }
    if "image" in needed and reads_features(inputs, stage, params):
        tree = partition.unflatten({path: leaf for path, leaf in params.items() if path.startswith("visual/")})
        seen = jax.eval_shape(vlm.encode_image, tree, image)
        kinds["features"] = (seen.shape, inputs.dtype)
        needed = (needed - {"image"}) | {"features"}
    rows = batch_sharding(inputs.mesh)
    return Batch(**{name: jax.ShapeDtypeStruct(*kinds[name], sharding=rows) for name in needed})


def queue_shapes(inputs: Inputs, vlm: VLM, stage: Stage) -> dict[str, Queue]:
    """The stage's queues as shapes, their rows filled up to the devices'."""
    settings, mesh, count = inputs.config.losses, inputs.mesh, len(inputs.train)
    dtype = jnp.dtype(settings.queue_dtype)

    def placed(leaf):
        rows = count + -count % parts_of(mesh)
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=queue_sharding(mesh))

    params = partition.unflatten(
        {path: leaf for path, leaf in inputs.towers.items() if path.startswith(("text/", "lm/"))}
    )
    found = {}
    for kind in objectives.queue_kinds(stage):
        encode, _ = objectives.encoder(vlm, kind, settings)
        texts = (jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_))

        def one_row(params, texts, encode=encode):
            keys, scale = compress(encode(params, texts).astype(jnp.float32), dtype)
            return Queue(keys, jnp.zeros(1, jnp.int32), count, scale)

        found[kind] = jax.tree.map(placed, jax.eval_shape(one_row, params, texts))
    return found


def replicated(leaf, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape, whole on every device."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

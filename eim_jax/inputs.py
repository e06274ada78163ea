"""What a run reads before it trains: towers, tokenisers, splits, queues and cached features."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eim_jax import partition, queues, stages, weights
from eim_jax.config import Arm, Config, ConfigError, Stage
from eim_jax.console import console
from eim_jax.data import coco, miniature, text
from eim_jax.data.features import cached_features
from eim_jax.data.records import Split
from eim_jax.models.clip import CLIPText, CLIPVision
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.gpt2 import GPT2
from eim_jax.models.vlm import VLM
from eim_jax.partition import Flat
from eim_jax.queues import Queue
from eim_jax.sharding import make_mesh, param_shardings, shard_params


@dataclass(frozen=True)
class Inputs:
    """Everything that all arms of a run share; `towers` holds the untouched pretrained parameters."""

    config: Config
    workdir: Path
    mesh: Mesh
    dtype: jnp.dtype
    clip: weights.CLIP
    lm: weights.LM
    towers: Flat
    lm_tokenizer: object
    clip_tokenizer: object
    train: Split
    encoded: text.Encoded
    fingerprints: dict[str, str]

    @property
    def cache(self) -> Path:
        """Where features and validation verdicts are kept."""
        return Path(self.config.data.cache) if self.config.data.cache else self.workdir / "cache"

    def queue(self, vlm: VLM, kind: str) -> Queue:
        """The queue of that kind, loaded, or built from the untouched towers and saved in the workdir.

        Raises queues.StaleQueue when the workdir holds one of other weights, data or settings.
        """
        settings = self.config.losses
        dtype = _resolve(settings.queue_dtype)
        encode, pooling = stages.encoder(vlm, kind, settings)
        if kind == "caption":
            captions = [sample.response for sample in self.train.samples]
            tokens = text.encode_clip(captions, self.clip_tokenizer, self.clip.text.context)
            valid = np.ones(tokens.shape, bool)
        else:
            tokens, valid = self.encoded.tokens, self.encoded.valid
        tower = "clip" if kind == "caption" else "lm"
        manifest = queues.manifest(
            kind,
            weights=self.fingerprints[tower],
            data=self.train.fingerprint(),
            tokenizer=f"{self.fingerprints[f'{tower}_tokenizer']}, at most {tokens.shape[1]} tokens",
            pooling=f"{pooling}, in {self.dtype.name}",
            similarity=settings.similarity,
            dtype=dtype.name,
            count=len(self.train),
        )
        folder = self.workdir / "queues" / kind
        if (folder / "manifest.json").exists():
            return queues.load(folder, manifest, self.mesh)
        params = partition.unflatten({p: leaf for p, leaf in self.towers.items() if p.startswith(("text/", "lm/"))})
        queue = queues.build(
            kind,
            encode,
            params,
            tokens,
            valid,
            self.train.groups,
            ids=[sample.id for sample in self.train.samples],
            batch=256,
            mesh=self.mesh,
            dtype=dtype,
            similarity=settings.similarity,
            progress=True,
        )
        queues.save(folder, queue, manifest)
        return queue


def load(config: Config, workdir: Path) -> Inputs:
    """Loads what the config names; every error says which field or file is wrong."""
    mesh = make_mesh(config.mesh)
    dtype = _resolve(config.towers.dtype)
    form = {"scan": config.towers.scan, "remat": config.towers.remat, "dtype": dtype}
    shapes = weights.clip_shapes(*weights.clip_config(config.towers.clip, **form))
    shapes |= weights.gpt2_shapes(weights.gpt2_config(config.towers.lm, **form))
    place = param_shardings(shapes, mesh).__getitem__  # each leaf goes from the file to its own devices
    clip = weights.load_clip(config.towers.clip, shardings=place, **form)
    lm = weights.load_gpt2(config.towers.lm, shardings=place, **form)
    lm = lm._replace(config=replace(lm.config, dropout=config.towers.dropout))
    clip_dir, lm_dir = weights.resolve(config.towers.clip), weights.resolve(config.towers.lm)
    lm_tokenizer, clip_tokenizer = text.load_tokenizer(lm_dir), text.load_tokenizer(clip_dir)
    train = load_split(config, "train", workdir)
    encoded = text.encode_split(train, lm_tokenizer, config.data.max_tokens, eos=config.data.eos)
    towers = partition.flatten({**clip.params, "lm": lm.params})
    console.print(
        f"{len(train):,} training samples ({len(train.images):,} images), towers {config.towers.clip} and "
        f"{config.towers.lm}, {jax.device_count()} {jax.default_backend()} device(s), {dtype.name}",
        soft_wrap=True,
    )
    fingerprints = {
        "clip": weights.fingerprint(clip_dir),
        "lm": weights.fingerprint(lm_dir),
        "clip_tokenizer": text.fingerprint(clip_tokenizer),
        "lm_tokenizer": text.fingerprint(lm_tokenizer),
    }
    return Inputs(
        config, workdir, mesh, dtype, clip, lm, towers, lm_tokenizer, clip_tokenizer, train, encoded, fingerprints
    )


def load_split(config: Config, name: str, workdir: Path) -> Split:
    """The split "train", "val" or "test" of the configured data set."""
    data = config.data
    if data.kind == "miniature":
        return miniature.load(name, seed=0, scenes=data.scenes if name == "train" else None)
    annotations, images = data.annotations, data.images
    if name != "train":
        annotations, images = data.eval_annotations or annotations, data.eval_images or images
    for field, value in (("annotations", annotations), ("images", images)):
        if not value:
            raise ConfigError(f"config.data.{field} is empty: give the captions file and the folder of its images")
    cache = Path(data.cache) if data.cache else workdir / "cache"
    loaded = coco.load_coco(annotations, images, name, on_bad=data.on_bad, threads=data.threads, cache=cache)
    return loaded.split


def start(inputs: Inputs, arm: Arm) -> tuple[VLM, Flat]:
    """The arm's model and its parameters before the first stage: pretrained towers, ST and prompts from the seed."""
    vision = replace(inputs.clip.vision, prompts=arm.prompts, prompt_hidden=arm.prompt_hidden if arm.prompts else 0)
    width = vision.joint if arm.output_layer else vision.width
    hidden = arm.st_hidden if arm.st == "ffn" else 0
    st = STConfig(
        kind=arm.st,
        width_in=width,
        width_out=inputs.lm.config.width,
        tokens=arm.st_tokens,
        hidden=hidden,
        layers=arm.st_layers,
        heads=arm.st_heads,
        dtype=inputs.dtype,
    )
    vlm = VLM(
        visual=CLIPVision(vision),
        text=CLIPText(inputs.clip.text),
        st=make_st(st),
        lm=GPT2(inputs.lm.config),
        features=arm.features,
        output_layer=arm.output_layer,
    )
    key = jax.random.key(inputs.config.seed)
    fresh = {"st": _init(vlm.st, jax.random.fold_in(key, 1), (1, 1, width))}
    if arm.prompts:
        # Only the prompts are drawn; the tower around them is shape alone (XLA drops what is not returned).
        draw = jax.jit(
            lambda k: vlm.visual.init(k, jnp.zeros((1, vision.image_size, vision.image_size, 3)))["params"]["prompt"]
        )
        fresh["visual"] = {"prompt": draw(jax.random.fold_in(key, 2))}
    params = {**inputs.towers, **partition.flatten(fresh)}
    ever = {path for s in arm.sequence for g in partition.groups(inputs.config.stages[s], params) for path in g.paths}
    # Leaves that some stage trains stay in float32, all others are held in the compute dtype.
    params = {p: leaf if p in ever else leaf.astype(inputs.dtype) for p, leaf in params.items()}
    return vlm, shard_params(params, inputs.mesh)


def stage_features(inputs: Inputs, vlm: VLM, stage: Stage, params: Flat):
    """Cached features [images n v] where the stage leaves CLIP.visual alone, else None (images are decoded)."""
    patterns = [entry if isinstance(entry, str) else entry[0] for entry in stage.train]
    trains_visual = any(re.fullmatch(p, path) for p in patterns for path in params if path.startswith("visual/"))
    if trains_visual or not inputs.config.data.cache_features:
        return None
    return features_of(inputs, vlm, inputs.train, params)


def features_of(inputs: Inputs, vlm: VLM, split: Split, params: Flat):
    """A split's features [images n v] under these visual parameters, from the cache or computed into it."""
    visual = {path: leaf for path, leaf in params.items() if path.startswith("visual/")}
    manifest = {
        "visual": weights.fingerprint(partition.unflatten(visual)),
        "compute": inputs.dtype.name,
        "prompts": vlm.visual.config.prompts,
    }
    tree = partition.unflatten(visual)
    folder = inputs.cache / "features" / f"{split.name}-{manifest['visual'][:12]}"
    see = jax.jit(lambda images: vlm.see(tree, images))
    return cached_features(
        folder,
        split,
        see,
        manifest,
        image_size=vlm.visual.config.image_size,
        dtype=inputs.dtype.name,
        threads=inputs.config.data.threads,
    )


def _init(module, key, shape):
    return jax.jit(lambda k: module.init(k, jnp.zeros(shape)))(key)["params"]


def _resolve(name: str) -> jnp.dtype:
    """auto: float32 on CPU (XLA has no fast bfloat16 there), bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)

"""What a run reads before it trains: towers, tokenisers, splits and queues."""

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eim_jax import pretrained
from eim_jax.config import Config, ConfigError, patterns, recorded_seam
from eim_jax.data import rows, tokenize
from eim_jax.data.conversation import TOKENIZER
from eim_jax.data.datasets import load_split
from eim_jax.data.samples import Split
from eim_jax.data.token_cache import cached_split
from eim_jax.losses import queue_health, queues
from eim_jax.losses.contrastive import Similarity
from eim_jax.losses.kinds import QueueKind
from eim_jax.losses.queue_build import rows_at_once
from eim_jax.losses.queues import Queue
from eim_jax.losses.table import center_of
from eim_jax.models.language import family_of
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.parallel.chips import platform_of
from eim_jax.parallel.lock import held
from eim_jax.parallel.sharding import make_mesh, param_shardings, parts_of
from eim_jax.parallel.signals import doing
from eim_jax.training import initial, partition
from eim_jax.training.partition import Flat
from eim_jax.training.tower_form import (
    attention_on_mesh,
    describe_attention,
    faster_dtype,
    resolve_dtype,
    resolve_form,
)
from eim_jax.utils.console import console
from eim_jax.utils.cpu import vector_units
from eim_jax.utils.files import user_path
from eim_jax.utils.images import FITS, IMAGENET_MEAN, IMAGENET_STD, Fit


@dataclass(frozen=True)
class Inputs:
    """Everything that all arms of a run share; `towers` holds the untouched pretrained parameters.

    `config.data.seam` is settled: by the field, by the work directory's run.json, or by the LM's tokenizer.

    Leaves that no stage of any arm trains are in the compute dtype, and shared with every arm's own parameters.

    `train` and `encoded` are None where only trained arms are used (`load(..., data=False)`).
    """

    config: Config
    workdir: Path
    mesh: Mesh
    dtype: jnp.dtype
    clip: pretrained.CLIP
    lm: pretrained.LM
    towers: Flat
    lm_tokenizer: Any
    clip_tokenizer: Any
    train: Split | None
    encoded: tokenize.Encoded | None
    fingerprints: dict[str, str]
    fit: Fit | str = "crop"  # how pictures become squares

    def identity(self) -> dict[str, str]:
        """What a workdir's results depend on besides its config: fingerprints of towers, tokenisers and data."""
        if self.train is None:
            return self.fingerprints
        pictures = self.train.images.contents()  # beside the data's fingerprint, as earlier runs have none
        data = {"training data": self.train.fingerprint()} | ({"training pictures": pictures} if pictures else {})
        return {**self.fingerprints, **data}

    @property
    def cache(self) -> Path:
        """Where features, tokens and validation verdicts are kept."""
        return _cache_of(self.config, self.workdir)

    @property
    def samples(self) -> Split:
        """The training split; ConfigError where the run was loaded without its data."""
        if self.train is None:
            raise ConfigError("the training data were not loaded: load(config, workdir) with data=True reads them")
        return self.train

    def queue(self, vlm: VLM, kind: QueueKind) -> Queue:
        """The queue of that kind, loaded, or built from the untouched towers and saved in the workdir.

        Raises queues.StaleQueue when the workdir holds one of other weights, data or settings, and
        queue_health.EqualKeys when all keys of a new one are the same.
        """
        settings = self.config.losses
        dtype = resolve_dtype(settings.queue_dtype, self.mesh.devices.flat[0].platform)
        manifest = queues.manifest(
            kind.name,
            # A text tower without a folder of its own is the vision tower's.
            weights=self.fingerprints.get(kind.source.tower, self.fingerprints["clip"]),
            data=self.samples.fingerprint(),
            tokenizer=kind.source.described(self),
            pooling=f"{kind.pooling}, in {self.dtype.name}",
            similarity=settings.similarity,
            dtype=dtype.name,
            count=len(self.samples),
            center=center_of(kind, settings),
        )
        folder = self.workdir / "queues" / kind.name
        doing(f"reading the queue {kind.name}")
        say = functools.partial(console.print, soft_wrap=True)
        parts = queues.QueueParts(folder.with_name(f"{kind.name}.parts"), manifest, say)
        if processes.agreed((folder / "manifest.json").exists()):
            parts.remove()  # of a run that was killed before it did
            return Queue.load(folder, manifest, self.mesh)
        with held(folder, wait=True):  # an inspection may build it beside the run
            if processes.agreed((folder / "manifest.json").exists()):
                return Queue.load(folder, manifest, self.mesh)
            queue = self._build_queue(vlm, kind, manifest, parts)
            doing(f"writing the queue {kind.name}")
            queue.save(folder, manifest)
            parts.remove()
            return queue

    def _build_queue(self, vlm: VLM, kind: QueueKind, manifest: dict[str, Any], parts: queues.QueueParts) -> Queue:
        ids = [sample.id for sample in self.samples.samples]
        doing(f"building the queue {kind.name}")
        fields = kind.source.fields(self)
        queue = Queue.build(
            functools.partial(kind.keys, vlm),
            partition.unflatten(self.towers),
            fields,
            self.samples.groups,
            batch=parts_of(self.mesh) * rows_at_once(kind.source.size and kind.source.size(self)),
            dtype=jnp.dtype(manifest["dtype"]),
            similarity=cast(Similarity, manifest["similarity"]),
            center=center_of(kind, self.config.losses),
            mesh=self.mesh,
            ids=ids,
            name=kind.name,
            progress=True,
            parts=parts,
            lengths=None if kind.source.lengths is None else kind.source.lengths(self, fields),
        )
        queue_health.refuse_equal(queue_health.measure(queue, self.mesh), kind.name, ids)
        return queue


def _cache_of(config: Config, workdir: Path) -> Path:
    return user_path(config.data.cache) if config.data.cache else workdir / "cache"


def load(config: Config, workdir: Path, *, data: bool = True) -> Inputs:
    """Loads what the config names, without `data` the towers alone; an error says which field or file is wrong."""
    doing("reading the weights")
    given = {"init": initial.fingerprint(config)} if config.init else {}
    mesh = make_mesh(config.mesh)
    dtype = resolve_dtype(config.towers.dtype, mesh.devices.flat[0].platform)
    form = resolve_form(config, dtype, platform_of(mesh.devices.flat[0]))
    seen: dict[str, Any] = {"text": config.towers.text, "image_size": config.towers.image_size}
    pair = pretrained.clip_config(config.towers.clip, **seen, **form)
    pictures = pretrained.image_processor(pretrained.resolve(config.towers.clip))
    fit = pictures.check(pair[0].image_size, config.data.fit, asked=bool(config.towers.image_size))
    shapes = pretrained.clip_shapes(*pair)
    shapes |= pretrained.lm_shapes(pretrained.lm_config(config.towers.lm, quant=config.towers.quant, **form))
    place = param_shardings(shapes, mesh).__getitem__  # each leaf goes from the file to its own devices
    lean = {path: jnp.float32 if _ever_trained(config, path) else dtype for path in shapes}
    clip = pretrained.load_clip(config.towers.clip, shardings=place, param_dtype=lean, **seen, **form)
    lm = pretrained.load_lm(config.towers.lm, quant=config.towers.quant, shardings=place, param_dtype=lean, **form)
    vision, language = tower_settings(config, clip.vision, lm.config, mesh)
    clip, lm = clip._replace(vision=vision, text=attention_on_mesh(clip.text, mesh)), lm._replace(config=language)
    clip_dir, lm_dir = pretrained.resolve(config.towers.clip), pretrained.resolve(config.towers.lm)
    lm_tokenizer, clip_tokenizer = tokenize.load_tokenizer(lm_dir), None
    tokenize.check_vocabulary(lm_tokenizer, lm.config.vocab, config.towers.lm)
    captions = {"clip_tokenizer": "none"}
    if clip.text is not None:
        text_dir = pretrained.resolve(config.towers.text or config.towers.clip)
        clip_tokenizer = tokenize.load_tokenizer(text_dir)
        tokenize.check_vocabulary(clip_tokenizer, clip.text.vocab, config.towers.text or config.towers.clip)
        captions = {"clip_tokenizer": tokenize.fingerprint(clip_tokenizer)}
        captions |= {"text": pretrained.fingerprint(text_dir)} if config.towers.text else {}
    config = replace(config, data=rows.settled(config.data, lm_tokenizer, recorded_seam(workdir)))
    if config.data.seam == TOKENIZER:
        end = rows.end_of(lm_tokenizer, TOKENIZER)
        end = "nothing" if end is None else lm_tokenizer.decode([end])
        console.print(f"asked in the tokenizer's chat template, whose answers end with {end}", markup=False)
    words = tokenize.fingerprint(lm_tokenizer, config.data.seam)
    train = encoded = None
    if data:
        doing("checking the training data")
        with processes.first_alone("training data"):
            train = load_split(config, "train", workdir)
        assert train is not None, "every data set has training samples"
        doing("tokenising")
        options = rows.row_options(config.data)
        lengths = config.data.max_tokens, config.data.eos
        encoded = cached_split(_cache_of(config, workdir), train, lm_tokenizer, words, *lengths, **options)
        encoded = _without_ignored(encoded, config.data.ignore_token, lm.config.vocab)
        console.print(f"{len(train):,} training samples ({len(train.images):,} images)", soft_wrap=True)
    towers = partition.flatten({**clip.params, "lm": lm.params})
    _say_what_runs(config, dtype, mesh, clip, lm, pictures, fit)
    fingerprints = {
        "clip": pretrained.fingerprint(clip_dir),
        "lm": pretrained.fingerprint(lm_dir),
        **captions,
        "lm_tokenizer": words,
        **given,
    }
    return Inputs(
        config, workdir, mesh, dtype, clip, lm, towers, lm_tokenizer, clip_tokenizer, train, encoded, fingerprints, fit
    )


def _say_what_runs(config: Config, dtype, mesh: Mesh, clip, lm, pictures: pretrained.ImageProcessor, fit) -> None:
    """Prints what the towers run on, in which form, and what pictures become."""
    texts = f" with {config.towers.text} for captions," if config.towers.text else ""
    console.print(
        f"towers {config.towers.clip}{texts} and {config.towers.lm}, {jax.device_count()} {jax.default_backend()} "
        f"device(s), {dtype.name}",
        soft_wrap=True,
    )
    if said := faster_dtype(dtype, platform_of(mesh.devices.flat[0]), vector_units(), lm.config.width):
        console.print(said, soft_wrap=True)
    if said := describe_attention(lm.config.attention):
        console.print(said, soft_wrap=True)
    console.print(f"pictures are normalised by {_statistics(config, pictures)}", soft_wrap=True)
    if str(fit) not in FITS or config.towers.image_size:
        side = clip.vision.image_size
        console.print(f"pictures become squares of {side} x {side} pixels: {fit}", soft_wrap=True)


def _without_ignored(encoded: tokenize.Encoded, token: int, vocab: int) -> tokenize.Encoded:
    """The texts with no token of this id supervised; -1 leaves them as they are.

    Raises:
      ConfigError: the vocabulary has no such id.
    """
    if token < 0:
        return encoded
    if token >= vocab:
        raise ConfigError(
            f"config.data.ignore_token={token}: config.towers.lm has {vocab:,} tokens, 0 to {vocab - 1:,}"
        )
    return encoded._replace(supervised=encoded.supervised & (encoded.tokens != token))


def _ever_trained(config: Config, path: str) -> bool:
    """Whether some stage of some arm trains the leaf: then it is loaded in float32, else in the compute dtype."""
    reached = {stage for name in config.arms for stage in config.arm[name].sequence}
    return any(re.fullmatch(pattern, path) for name in reached for pattern, _ in patterns(config.stages[name]))


def _statistics(config: Config, pictures: pretrained.ImageProcessor) -> str:
    """Which statistics are used, for the log."""
    if config.towers.image_stats == "imagenet":
        return f"ImageNet's statistics (config.towers.image_stats), instead of {pictures.describe()}"
    return pictures.describe()


def tower_settings(config: Config, vision, lm, mesh: Mesh):
    """Returns the towers' shapes with the run's own settings: (the vision tower's, the LM's)."""
    vision, lm = attention_on_mesh(vision, mesh), attention_on_mesh(lm, mesh)
    if family_of(lm).has_dropout:
        lm = replace(lm, dropout=config.towers.dropout)
    if config.towers.image_stats == "imagenet":
        vision = replace(vision, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return vision, lm

"""Batches: shuffled anew each epoch, split over processes, resumable at every step, loading only what a stage reads."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, UInt8

from eim_jax.data.batch_order import Order
from eim_jax.data.packing import Packer
from eim_jax.data.samples import Split
from eim_jax.data.tokenize import Encoded
from eim_jax.models.batch import Batch
from eim_jax.utils.images import Fit, clip_preprocess

_PLACED = 2  # batches that wait on the device while the step runs
_TEXT_FIELDS = ("tokens", "valid", "supervised")


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Counts the full batches of an epoch; what does not fill a batch waits for the next epoch's shuffle.

    Args:
      split: the training split.
      batch_size: samples in a batch, over all processes.

    Returns:
      The number of steps, at least 1.

    Raises:
      ValueError: the split has fewer samples than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    if len(split) < batch_size:
        raise ValueError(
            f"split {split.name!r} has {len(split)} samples, fewer than one batch of {batch_size}: "
            "lower the stage's batch or give more data"
        )
    return len(split) // batch_size


def batches(
    split: Split,
    encoded: Encoded | None,
    *,
    fields: Collection[str],
    batch_size: int,
    seed: int,
    epochs: int | None,
    features: np.ndarray | None = None,
    image_size: int | None = None,
    fit: str | Fit = "crop",
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    buckets: int = 1,
    window: int = 1,
    before: int = 0,
    place: Callable[[Batch], Any] | None = None,
    packer: Packer | None = None,
) -> grain.DatasetIterator:
    """Returns an iterator of `Batch` of NumPy arrays with get_state / set_state (resumes exactly) and close.

    `fields` names the fields of `Batch` to fill (`index` always is); nothing else is loaded, so a text-only stage opens
    no image. Given `features` [images n v], "image" is served from them and no image is opened either. `batch_size` is
    global: each of `process_count` processes gets its own consecutive part of every batch, and the parts of all
    processes, concatenated, are the single process's batch. `epochs=None` never ends. Each epoch is a fresh permutation
    from `seed`, its incomplete last batch dropped. `threads` build batches ahead (PIL decodes outside the GIL).

    Each batch's texts are cut to the smallest of at most `buckets` widths that holds the longest of them in all
    processes; with 1, all batches are as wide as `encoded`. With `window` > 1, batches are of similar lengths
    (order.Order). A `packer` says which samples of a batch share a row of slots; a batch that it packs is as wide as
    the longest text, one that fits none of its shapes stays as it would be without it. With `place`, which puts a batch
    on the devices, it yields (batch, place(batch)), two ahead of the step in a thread of their own; the state is always
    that of the pair last returned.

    The field "before" holds the rows of the `before` batches ahead of a batch, -1 where there were none.

    Raises:
      ValueError: an argument cannot be meant; while iterating, an image cannot be read: its id and file are named.
    """
    steps_per_epoch(split, batch_size)
    _check_numbers(batch_size, epochs, process_index, process_count, buckets, window)
    load = _Loader.make(split, encoded, frozenset(fields), features, image_size, fit)
    part = batch_size // process_count
    own = slice(process_index * part, (process_index + 1) * part)
    order = order_of(split, encoded, fields=fields, batch_size=batch_size, seed=seed, buckets=buckets, window=window)

    def load_step(step: int, _: int) -> Any:  # a Batch, still of NumPy arrays: not of jax.Array
        rows = order.rows(step)
        packing = packer(rows, own) if packer else None
        width = order.width(rows) if packing is None else order.widths and order.widths[-1]
        batch = load(rows[own], width)._replace(packing=packing)
        if "before" not in fields:
            return batch
        none = np.full(batch_size, -1, np.int32)
        earlier = [order.rows(step - k) if step >= k else none for k in range(1, before + 1)]
        return batch._replace(before=np.stack(earlier, axis=1)[own])

    steps = grain.MapDataset.range(steps_per_epoch(split, batch_size) * (epochs or 1))
    # Without an end, the one epoch of steps is repeated: map then still sees 0, 1, 2, ...
    dataset = steps if epochs else steps.repeat()
    loaded = dataset.map_with_index(load_step).to_iter_dataset(_read_options(threads))
    if place is not None:
        pairs = loaded.map(lambda batch: (batch, place(batch)))
        loaded = grain.experimental.ThreadPrefetchIterDataset(pairs, prefetch_buffer_size=_PLACED)
    return iter(loaded)


def order_of(
    split: Split,
    encoded: Encoded | None,
    *,
    fields: Collection[str],
    batch_size: int,
    seed: int,
    buckets: int = 1,
    window: int = 1,
) -> Order:
    """Returns the order of `batches` with the same arguments."""
    order = Order(len(split), batch_size, seed, mixture=split.mixture)
    if encoded is not None and set(fields) & set(_TEXT_FIELDS):
        order = dataclasses.replace(order, lengths=encoded.valid.sum(1), window=window)
        order = order.with_widths(buckets) if buckets > 1 else order
    return order


def _check_numbers(batch_size, epochs, process_index, process_count, buckets, window) -> None:
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}: give at least 1, or None for no end")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, but there are {process_count} processes")
    if batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} does not divide over {process_count} processes: choose a multiple")
    if buckets < 1 or window < 1:
        raise ValueError(f"buckets is {buckets} and window {window}: give at least 1")


def eval_images(
    split: Split,
    batch_size: int,
    image_size: int,
    *,
    rows: Sequence[int] | None = None,
    fit: str | Fit = "crop",
    threads: int = 4,
) -> Iterator[tuple[Int[np.ndarray, "b"], UInt8[np.ndarray, "b h w 3"]]]:
    """Yields (image rows, CLIP's crops) over each image of the split once (or over `rows`), in order.

    In `rows`, -1 stands for no image: black pixels. `fit` is how an image becomes square (image.clip_preprocess).
    Every batch has `batch_size` entries, so that a jitted function is traced once: the last one is filled up with row
    -1 and black pixels.

    Raises:
      ValueError: an image cannot be read; its id and file are named.
    """
    wanted = np.arange(len(split.images), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    padded = np.full(-(-len(wanted) // batch_size) * batch_size, -1, np.int32)
    padded[: len(wanted)] = wanted
    source = grain.MapDataset.source(list(padded.reshape(-1, batch_size)))
    dataset = source.map(lambda batch: (batch, _crops(split, batch, image_size, fit)))
    iterator = iter(dataset.to_iter_dataset(_read_options(threads)))
    try:
        yield from iterator
    finally:
        iterator.close()


def _read_options(threads: int) -> grain.ReadOptions:
    """Returns options that keep at most a batch a thread, and never fewer than two, in memory."""
    if threads < 0:
        raise ValueError(f"threads is {threads}: give 0 (no threads) or more")
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2) if threads else 0)


def _crops(split: Split, image_rows: Int[np.ndarray, "b"], size: int, fit: str | Fit) -> UInt8[np.ndarray, "b h w 3"]:
    """Returns CLIP's crop of each image row; black where the row is -1."""
    crops = np.zeros((len(image_rows), size, size, 3), np.uint8)
    for place, row in enumerate(image_rows):
        if row >= 0:
            crops[place] = clip_preprocess(split.images[int(row)], size, fit)
    return crops


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Loads the wanted fields of a batch of sample rows."""

    split: Split
    encoded: Encoded | None
    fields: frozenset[str]
    features: np.ndarray | None
    image_size: int | None
    fit: str | Fit
    image_of: Int[np.ndarray, "N"]  # each sample's image row, -1 for text only

    @classmethod
    def make(
        cls,
        split: Split,
        encoded: Encoded | None,
        fields: frozenset[str],
        features: np.ndarray | None,
        image_size: int | None,
        fit: str | Fit,
    ) -> "_Loader":
        unknown = fields - set(Batch._fields)
        if unknown:
            raise ValueError(f"Batch has no field {', '.join(sorted(unknown))}: it has {', '.join(Batch._fields)}")
        if fields & set(_TEXT_FIELDS):
            if encoded is None:
                raise ValueError(f"fields {sorted(fields & set(_TEXT_FIELDS))} need `encoded` (text.encode_split)")
            if len(encoded.tokens) != len(split):
                raise ValueError(
                    f"`encoded` has {len(encoded.tokens)} rows, but split {split.name!r} has {len(split)} samples: "
                    "encode this split"
                )
        if features is not None:
            if len(features) != len(split.images):
                raise ValueError(
                    f"`features` has {len(features)} rows, but split {split.name!r} has {len(split.images)} images: "
                    "compute them for this split"
                )
            if "image" in fields:
                fields = fields - {"image"} | {"features"}
        elif "features" in fields:
            raise ValueError("field 'features' needs `features` (features.cached_features)")
        if "image" in fields and image_size is None:
            raise ValueError("field 'image' needs `image_size`, the side of CLIP's input in pixels")
        image_of = np.fromiter((-1 if s.image is None else s.image for s in split.samples), np.int32, len(split))
        return cls(split, encoded, fields, features, image_size, fit, image_of)

    def __call__(self, rows: Int[np.ndarray, "b"], width: int | None) -> Any:
        loaded: dict[str, np.ndarray] = {}
        for name in _TEXT_FIELDS:
            if name in self.fields:
                loaded[name] = getattr(self.encoded, name)[rows, :width]
        images = self.image_of[rows]
        if "image" in self.fields:
            loaded["image"] = _crops(self.split, images, self.image_size, self.fit)
        if "features" in self.fields:
            loaded["features"] = self._features_of(images)
        if "has_image" in self.fields:
            loaded["has_image"] = images >= 0
        return Batch(index=rows, **loaded)

    def _features_of(self, images: Int[np.ndarray, "b"]) -> np.ndarray:
        present = images >= 0
        found = np.zeros((len(images), *self.features.shape[1:]), self.features.dtype)
        found[present] = self.features[images[present]]
        return found

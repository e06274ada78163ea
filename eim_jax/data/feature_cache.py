"""The frozen CLIP's features of every image, computed once and kept in a memory-mapped file."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from eim_jax.data.loader import eval_images
from eim_jax.data.samples import Split
from eim_jax.parallel import processes
from eim_jax.parallel.lock import held
from eim_jax.parallel.sharding import parts_of
from eim_jax.utils.console import console, progress
from eim_jax.utils.files import Damaged, allocate, check_sums, flush, new_rows, read_json, read_rows, sha256, write_text
from eim_jax.utils.images import Fit

# What is written is part of the manifest: a change of any of these makes older caches stale.
_PREPROCESSING = {
    "crop": "CLIP: short side bicubic, centre crop (eim_jax.utils.images.clip_preprocess)",
    "stretch": "LaVIN: bicubic to a square, aspect not kept (eim_jax.utils.images.clip_preprocess)",
}
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}  # bf16 is stored as its 16 bits
_MARK_SECONDS = 10.0  # between two notes of how far the file is filled
_SUMMED = 1024  # rows that are read at once for their sum
_SPARE = 256 * 2**20  # bytes that stay free on the disk


def cached_features(
    directory: str | os.PathLike[str],
    split: Split,
    see: Callable[[Array], Array],
    manifest: Mapping[str, Any],
    *,
    image_size: int,
    fit: str | Fit = "crop",
    batch_size: int = 64,
    dtype: str = "float32",
    threads: int = 4,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "images n v"]:
    """Returns `see` of every image of the split, row = image row, memory-mapped read-only from `directory`.

    `see` takes CLIP's crops uint8[b h w 3] and returns [b n v]; jit it. `manifest` says what `see` depends on (the
    weights' fingerprint); images, preprocessing, dtype and shape are added here. A complete cache with the same
    manifest is opened, an interrupted one is continued, any other is rebuilt with a line naming the fields that differ.
    `dtype`: float32, or bfloat16 (half the disk, 3 significant digits). One directory serves one split. With a `mesh`,
    the rows of a batch are split over its devices; each process decodes the images of its devices, process 0 writes.

    Raises:
      OSError: the disk lacks room.
      Damaged: the file is not the one that was written.
      ValueError: an unknown dtype, an unreadable image, or features that are not finite; the image is named.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: give {' or '.join(_DTYPES)}")
    cache = _Cache(pathlib.Path(directory), dtype)
    if mesh is not None:
        batch_size += -batch_size % parts_of(mesh)
    seen = jax.eval_shape(see, jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8))
    if len(seen.shape) != 3 or seen.shape[0] != batch_size:
        raise ValueError(f"`see` maps a batch of {batch_size} images to shape {seen.shape}: it must be [b n v]")
    shape = (len(split.images), *seen.shape[1:])
    wanted = json.loads(
        json.dumps(
            {
                **manifest,
                "images": split.images.fingerprint(),
                **{kind: found for kind, found in _contents(split).items() if found},
                "preprocessing": _preprocessing(fit),
                "image_size": image_size,
                "dtype": dtype,
                "shape": list(shape),
            }
        )
    )
    # Process 0 looks at the files and tells the others how many rows are there.
    first = processes.is_first()
    with contextlib.ExitStack() as stack:
        done = 0
        if first:
            if cache.matches(cache.manifest, wanted, quiet=True):  # also where nothing may be written
                done = shape[0]
            else:  # a run that shares the cache may be filling it
                stack.enter_context(held(cache.directory, wait=True))
                done = shape[0] if cache.matches(cache.manifest, wanted) else cache.prepare(wanted, shape)
        done = processes.agreed(done)
        if done < shape[0]:
            _fill(cache, split, see, shape, done, image_size, fit, batch_size, threads, mesh)
        if first and not cache.manifest.exists():
            cache.finish()
        processes.barrier("vision features")
    return cache.open(shape)


def _preprocessing(fit: str | Fit) -> str:
    """What the manifest says of how pictures became squares."""
    how = fit if isinstance(fit, str) else fit.how
    usual = str(fit) == how
    return _PREPROCESSING[how] if usual else f"{_PREPROCESSING[how]}; {fit}"


def _contents(split: Split) -> dict[str, str]:
    """What tells pictures from others of the same names and sizes; "" where nothing is known, as of old shards."""
    return {"contents": split.images.contents(), "modified": split.images.modified()}


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The fields in which a manifest is another one.

    Prepared shards have no files whose times could be known: shards and files share a cache by what they hold.
    """
    unknown = {field for field in ("contents", "modified") if field not in wanted}
    unknown |= {"modified"} - found.keys()
    fields = (found.keys() | wanted.keys()) - unknown
    return sorted(field for field in fields if found.get(field) != wanted.get(field))


def _fill(
    cache: "_Cache",
    split: Split,
    see: Callable[[Array], Array],
    shape: tuple[int, ...],
    done: int,
    image_size: int,
    fit: str | Fit,
    batch_size: int,
    threads: int,
    mesh: Mesh | None,
) -> None:
    """Computes the rows from `done` on; the device works on one batch while the one before it is written."""
    target = np.lib.format.open_memmap(cache.partial, mode="r+") if processes.is_first() else None
    if done:
        console.print(f"vision features: continuing after {done:,} of {shape[0]:,} images")
    marked = time.monotonic()
    waiting: list[tuple[np.ndarray, Array]] = []

    def write() -> int:
        rows, values = waiting.pop(0)
        found = processes.fetch(values)[: len(rows)].astype(np.float32)
        wrong = ~np.isfinite(found).all(axis=(1, 2))
        if wrong.any():
            row = int(rows[wrong.argmax()])
            raise ValueError(
                f"the features of image id {split.images.ids[row]} ({split.images.names[row]}) are not finite: "
                "check the CLIP weights, or compute in float32"
            )
        if target is not None:
            target[rows] = stored = found if cache.dtype == "float32" else found.astype(jnp.bfloat16).view(np.uint16)
            cache.took(stored)
        advance(len(rows))
        return len(rows)

    def mark() -> None:
        if target is not None:
            target.flush()
            cache.mark()

    remaining = np.arange(done, shape[0], dtype=np.int32)
    mine = remaining.copy()
    if mesh is not None:  # the others decode their own
        mine[~np.resize(processes.own_rows(mesh, batch_size), len(mine))] = -1
    try:
        with progress("vision features", len(remaining), "images") as advance:
            crops = eval_images(split, batch_size, image_size, rows=mine.tolist(), fit=fit, threads=threads)
            for batch, (_, images) in enumerate(crops):
                placed = jnp.asarray(images) if mesh is None else processes.place_rows(mesh, [images])[0]
                waiting.append((remaining[batch * batch_size : (batch + 1) * batch_size], see(placed)))
                if len(waiting) == 2:
                    done += write()
                if time.monotonic() - marked > _MARK_SECONDS:
                    mark()
                    marked = time.monotonic()
            while waiting:
                done += write()
    finally:  # also when interrupted: the next start continues here
        mark()


class _Cache:
    """The files of one cache: features.npy with manifest.json, and the same two with ".partial" until complete."""

    def __init__(self, directory: pathlib.Path, dtype: str):
        self.directory, self.dtype = directory, dtype
        self.array, self.manifest = directory / "features.npy", directory / "manifest.json"
        self.partial, self.progress = directory / "features.partial.npy", directory / "manifest.partial.json"
        self._wanted: dict[str, Any] = {}
        self._filled = (0, hashlib.sha256())  # how many rows are written, and the sum of them

    def took(self, rows: np.ndarray) -> None:
        """Counts rows that the file holds now, and takes them into the sum that the notes hold."""
        done, summed = self._filled[0], self._filled[1].copy()
        summed.update(np.ascontiguousarray(rows).tobytes())
        self._filled = (done + len(rows), summed)  # both at once: a signal may come between any two lines

    def matches(self, file: pathlib.Path, wanted: Mapping[str, Any], quiet: bool = False) -> bool:
        """Returns whether a manifest file says `wanted`; unless `quiet`, prints the fields in which it differs."""
        try:
            found = read_json(file)
        except FileNotFoundError:
            return False
        except Damaged:
            if not quiet:
                console.print(f"{file} is damaged: computing the vision features again")
            return False
        for beside in (
            "rows_done",
            "rows_sha256",
            "sha256",
        ):  # what a manifest holds besides what the features depend on
            found.pop(beside, None)
        if (differing := _differing(found, wanted)) and not quiet:
            console.print(f"vision features in {self.directory} are stale and computed again:")
            for key in differing:
                console.print(f"  {key}: expected {wanted.get(key)}, found {found.get(key)}")
        return not differing

    def open(self, shape: tuple[int, ...]) -> Float[np.ndarray, "images n v"]:
        if processes.is_first() and isinstance(wanted := read_json(self.manifest).get("sha256"), str):
            check_sums(self.directory, {self.array.name: wanted})  # caches of earlier versions have none
        values = read_rows(self.array, self.directory)
        if values.shape != shape or values.dtype != _DTYPES[self.dtype]:
            reason = f"{values.shape} {values.dtype}, by its manifest {shape} in {self.dtype}"
            raise Damaged(self.array, reason, self.directory)
        return values if self.dtype == "float32" else values.view(jnp.bfloat16)

    def prepare(self, wanted: dict[str, Any], shape: tuple[int, ...]) -> int:
        """Makes the partial file, or finds an interrupted one; returns how many of its rows are filled."""
        self._wanted = wanted
        if self.partial.exists() and self.matches(self.progress, wanted):
            try:
                noted = read_json(self.progress, {"rows_done": int}, {"rows_sha256": str})
                done, rows = noted["rows_done"], read_rows(self.partial)
                if rows.shape != shape or rows.dtype != _DTYPES[self.dtype] or not 0 <= done <= shape[0]:
                    raise Damaged(self.partial, "not as long as its manifest says")
                for start in range(0, done, _SUMMED):
                    self.took(rows[start : min(start + _SUMMED, done)])
                # Notes of earlier versions hold no sum.
                found = self._filled[1].hexdigest()
                if noted.get("rows_sha256", found) != found:
                    self._filled = (0, hashlib.sha256())
                    raise Damaged(self.partial, "its rows are not those that were written")
                allocate(self.partial)  # earlier versions left holes in it
                return done
            except Damaged:
                console.print(f"{self.partial} is damaged: computing the vision features again", soft_wrap=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in (self.manifest, self.array, self.progress, self.partial):  # manifest first: never a wrong pair
            file.unlink(missing_ok=True)
        stored = _DTYPES[self.dtype]
        size = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
        free = shutil.disk_usage(self.directory).free
        count = " x ".join(f"{length:,}" for length in shape)
        what = f"vision features: {count} in {self.dtype}, {_gib(size)} in {self.directory}"
        if size + _SPARE > free:
            raise OSError(f"{what}, but only {_gib(free)} are free: use dtype bfloat16, another folder, or no cache")
        console.print(f"{what} ({_gib(free)} free)", soft_wrap=True)
        new_rows(self.partial, stored, shape).flush()
        self.mark()
        return 0

    def mark(self) -> None:
        filled = {"rows_done": self._filled[0], "rows_sha256": self._filled[1].hexdigest()}
        self._write(self.progress, {**self._wanted, **filled})

    def finish(self) -> None:
        flush(self.partial)
        os.replace(self.partial, self.array)
        flush(self.directory)
        # Last: a cache is complete when it has a manifest.
        self._write(self.manifest, {**self._wanted, "sha256": sha256(self.array)})
        self.progress.unlink()

    def _write(self, file: pathlib.Path, content: Mapping[str, Any]) -> None:
        write_text(file, json.dumps(content, indent=1))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

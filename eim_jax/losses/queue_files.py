"""A queue's files: rows in .npy beside a manifest that says what they were made from; written whole or not at all."""

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.parallel.processes import barrier, is_first
from eim_jax.utils.files import Damaged, check_sums, flush, new_rows, read_json, read_rows, room_in, sha256, write_text

_BESIDE = ("width", "sha256")  # of the manifest: known only once the queue is built
_UNSAID = {"center": "none"}  # what a manifest means that does not name the field
_SETTINGS = {"center": " (config.losses.center; `center` of Queue.of and Queue.build)"}  # where a field is set


class StaleQueue(ValueError):
    """The queue on disk was made from something else than what is asked for; the message names every difference."""


def manifest(
    kind: str,
    *,
    weights: str,
    data: str,
    tokenizer: str,
    pooling: str,
    similarity: str,
    dtype: str,
    count: int,
    center: str = "none",
) -> dict[str, Any]:
    """Returns what decides a queue's content, as `Queue.save` keeps it and `Queue.load` compares it.

    Args:
      kind: the queue's name on disk, such as "caption".
      weights: a fingerprint of the parameters that made the keys.
      data: a fingerprint of the samples.
      tokenizer: a fingerprint of the tokeniser, and the longest text; or how images were read.
      pooling: how a sample became one vector, in words.
      similarity: "cosine" (rows of unit norm) or "dot".
      dtype: in which the keys are held.
      count: how many samples.
      center: "none", or "mean" where the keys' mean was taken from them.
    """
    facts = {
        "kind": kind,
        "weights": weights,
        "data": data,
        "tokenizer": tokenizer,
        "pooling": pooling,
        "similarity": similarity,
        "dtype": jnp.dtype(dtype).name,
        "count": count,
    }
    # Named where there is one, so that queues of earlier versions stay what they are.
    return facts if center == "none" else {**facts, "center": center}


def write_rows(
    directory: str | os.PathLike,
    arrays: dict[str, jax.Array],
    count: int,
    facts: dict[str, Any],
    beside: dict[str, np.ndarray] | None = None,
) -> None:
    """Writes the first `count` rows of each array (NAME.npy) and manifest.json, whole or not at all.

    All processes call it with the same directory on a shared file system. Several write a file for each device's rows,
    NAME-FIRSTROW.npy: no file has two writers, which NFS and buckets forbid. bfloat16 is stored as its bits.

    Args:
      directory: the queue's folder; one that is there is replaced once the new one is complete.
      arrays: {"keys": [N D], "groups": [N], ...}, sharded by row.
      count: real rows; what follows is padding and not written.
      facts: the manifest.
      beside: small arrays that are no rows and the same on all processes, NAME.npy each.
    """
    target = pathlib.Path(directory)
    scratch, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    first = is_first()
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        with room_in(target):
            scratch.mkdir(parents=True)
    barrier(f"queue files {target.name}")
    with room_in(target):
        for name, array in arrays.items():
            _write_array(scratch, name, array, count)
    barrier(f"queue rows {target.name}")
    if first:
        with room_in(target):
            for name, array in (beside or {}).items():
                np.save(scratch / f"{name}.npy", array)
        files = sorted(scratch.iterdir())
        for file in files:
            flush(file)
        sums = {file.name: sha256(file) for file in files}
        write_text(scratch / "manifest.json", json.dumps({**facts, "sha256": sums}, indent=1) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(scratch, target)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    barrier(f"queue done {target.name}")


def _write_array(scratch: pathlib.Path, name: str, array: jax.Array, count: int) -> None:
    """Writes this process's rows of one array."""
    stored, several = stored_dtype(array.dtype), jax.process_count() > 1
    out = None if several else new_rows(scratch / f"{name}.npy", stored, (count, *array.shape[1:]))
    for shard in array.addressable_shards:
        start = shard.index[0].start or 0
        if shard.replica_id == 0 and start < count:
            rows = np.asarray(shard.data)[: count - start].view(stored)
            if out is None:
                np.save(scratch / f"{name}-{start:012d}.npy", rows)
            else:
                out[start : start + len(rows)] = rows
    if out is not None:
        out.flush()


def open_rows(
    directory: str | os.PathLike, expected: dict[str, Any]
) -> tuple[dict[str, "StoredRows"], int, dict[str, np.ndarray]]:
    """Opens the rows of the queue that the manifest `expected` describes.

    Returns:
      ({"keys", "groups", and for int8 "scale"}, the number of rows, {"center"} of a centred queue); rows are
      memory-mapped: only those that are asked for are read.

    Raises:
      StaleQueue: naming each field in which the file differs (the width, known only once the queue is built, may be
        left out), or when the files do not fit their manifest.
      FileNotFoundError: there is no queue.
    """
    source = pathlib.Path(directory)
    try:
        found = read_json(source / "manifest.json", {"count": int, "dtype": str, "width": int}, delete=source)
    except Damaged as error:
        raise StaleQueue(str(error)) from error
    expected = json.loads(json.dumps(expected))
    fields = [*expected, *(field for field in found if field not in expected and field not in _BESIDE)]

    def said(facts, field):
        return facts.get(field, _UNSAID.get(field, "(absent)"))

    different = [
        f"  {field}: expected {said(expected, field)!r}, found {said(found, field)!r}{_SETTINGS.get(field, '')}"
        for field in fields
        if said(expected, field) != said(found, field) or "(absent)" in (said(expected, field), said(found, field))
    ]
    if different:
        remedy = "Delete it to have it built anew, or give this run the setting that it was built with."
        raise StaleQueue("\n".join([f"the queue in {source} is another one:", *different, remedy]))
    try:
        return _checked_rows(source, found), found["count"], _checked_center(source, found)
    except Damaged as error:
        raise StaleQueue(str(error)) from error


def _checked_rows(source: pathlib.Path, found: dict[str, Any]) -> dict[str, "StoredRows"]:
    """The arrays of a queue whose manifest is the one that was asked for; Damaged where they do not fit it."""
    count, dtype = found["count"], jnp.dtype(found["dtype"])
    shapes = {"keys": (count, found["width"]), "groups": (count,)} | ({"scale": (count,)} if dtype == jnp.int8 else {})
    rows = {name: StoredRows(source, name) for name in shapes}
    for name, shape in shapes.items():
        if rows[name].shape != shape or (name == "keys" and rows[name].dtype != stored_dtype(dtype)):
            reason = f"{rows[name].shape} {rows[name].dtype}, by the manifest {shape} in {dtype.name}"
            raise Damaged(source / f"{name}.npy", reason, source)
    if is_first():  # one process reads all of it, the others their own rows alone
        sums = found.get("sha256", {})  # queues of earlier versions have none
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise Damaged(source / "manifest.json", "field 'sha256' is no table of files", source)
        check_sums(source, sums)
    rows["keys"].dtype = dtype
    return rows


def _checked_center(source: pathlib.Path, found: dict[str, Any]) -> dict[str, np.ndarray]:
    """The mean that was taken from a centred queue's keys, {"center": [D]}; Damaged where it is none."""
    if found.get("center", "none") == "none":
        return {}
    file = source / "center.npy"
    mean = np.array(read_rows(file, source))
    if mean.shape != (found["width"],) or mean.dtype != np.float32 or not np.isfinite(mean).all():
        raise Damaged(file, f"{mean.shape} {mean.dtype} is no mean of keys of {found['width']} numbers", source)
    return {"center": mean}


class StoredRows:
    """The rows of a queue's file, or of its files in order, memory-mapped; `dtype` is what they are read as."""

    def __init__(self, directory: pathlib.Path, name: str):
        files = sorted(directory.glob(f"{name}-*.npy")) or [directory / f"{name}.npy"]
        self._parts = [read_rows(file, directory) for file in files]
        if any(part.ndim == 0 or part.shape[1:] != self._parts[0].shape[1:] for part in self._parts):
            raise Damaged(files[0], "its rows are not as wide as those of the other files", directory)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.dtype = self._parts[0].dtype
        self.shape = (int(self._starts[-1]), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        """How many rows all files hold."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """A copy of these rows, from whichever files hold them."""
        start, stop, _ = rows.indices(len(self))
        found = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for first, part in zip(self._starts, self._parts, strict=False)
        ]
        return np.concatenate(found).view(self.dtype)


def stored_dtype(dtype: Any) -> np.dtype:
    """How a .npy file holds it: it has no name for bfloat16, whose bits are stored as uint16."""
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else np.dtype(dtype)

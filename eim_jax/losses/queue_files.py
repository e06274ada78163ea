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
    """
    return {
        "kind": kind,
        "weights": weights,
        "data": data,
        "tokenizer": tokenizer,
        "pooling": pooling,
        "similarity": similarity,
        "dtype": jnp.dtype(dtype).name,
        "count": count,
    }


def write_rows(directory: str | os.PathLike, arrays: dict[str, jax.Array], count: int, facts: dict[str, Any]) -> None:
    """Writes the first `count` rows of each array (NAME.npy) and manifest.json, whole or not at all.

    All processes call it with the same directory on a shared file system. Several write a file for each device's rows,
    NAME-FIRSTROW.npy: no file has two writers, which NFS and buckets forbid. bfloat16 is stored as its bits.

    Args:
      directory: the queue's folder; one that is there is replaced once the new one is complete.
      arrays: {"keys": [N D], "groups": [N], ...}, sharded by row.
      count: real rows; what follows is padding and not written.
      facts: the manifest.
    """
    target = pathlib.Path(directory)
    scratch, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    first = is_first()
    several = jax.process_count() > 1
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
    barrier(f"queue files {target.name}")
    for name, array in arrays.items():
        stored = stored_dtype(array.dtype)
        if not several:
            out = np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", stored, (count, *array.shape[1:]))
        for shard in array.addressable_shards:
            start = shard.index[0].start or 0
            if shard.replica_id == 0 and start < count:
                rows = np.asarray(shard.data)[: count - start].view(stored)
                if several:
                    np.save(scratch / f"{name}-{start:012d}.npy", rows)
                else:
                    out[start : start + len(rows)] = rows
        if not several:
            out.flush()
    barrier(f"queue rows {target.name}")
    if first:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(scratch, target)
        shutil.rmtree(old, ignore_errors=True)
    barrier(f"queue done {target.name}")


def open_rows(directory: str | os.PathLike, expected: dict[str, Any]) -> tuple[dict[str, "StoredRows"], int]:
    """Opens the rows of the queue that the manifest `expected` describes.

    Returns:
      ({"keys", "groups", and for int8 "scale"}, the number of rows), memory-mapped: only rows that are asked for are
      read.

    Raises:
      StaleQueue: naming each field in which the file differs (the width, known only once the queue is built, may be
        left out), or when the files do not fit their manifest.
      FileNotFoundError: there is no queue.
    """
    source = pathlib.Path(directory)
    found = json.loads((source / "manifest.json").read_text())
    expected = json.loads(json.dumps(expected))
    fields = [*expected, *(field for field in found if field not in expected and field != "width")]
    different = [
        f"  {field}: expected {expected.get(field, '(absent)')!r}, found {found.get(field, '(absent)')!r}"
        for field in fields
        if field not in expected or field not in found or expected[field] != found[field]
    ]
    if different:
        remedy = "Delete it to have it built anew, or give this run the setting that it was built with."
        raise StaleQueue("\n".join([f"the queue in {source} is another one:", *different, remedy]))
    count, dtype = found["count"], jnp.dtype(found["dtype"])
    keys, groups = StoredRows(source, "keys"), StoredRows(source, "groups")
    if keys.shape != (count, found["width"]) or groups.shape != (count,) or keys.dtype != stored_dtype(dtype):
        raise StaleQueue(
            f"the queue in {source} is damaged: keys {keys.shape} {keys.dtype}, groups {groups.shape}, but its "
            f"manifest says {count} rows of width {found['width']} in {dtype.name}. Delete it to have it built anew."
        )
    keys.dtype = dtype
    rows = {"keys": keys, "groups": groups}
    if dtype == jnp.int8:
        rows["scale"] = StoredRows(source, "scale")
    return rows, count


class StoredRows:
    """The rows of a queue's file, or of its files in order, memory-mapped; `dtype` is what they are read as."""

    def __init__(self, directory: pathlib.Path, name: str):
        files = sorted(directory.glob(f"{name}-*.npy")) or [directory / f"{name}.npy"]
        self._parts = [np.load(file, mmap_mode="r") for file in files]
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

"""Queues: read-only arrays with one fixed key for each training sample, built once, kept on disk, sharded by row."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from eim_jax.losses.centering import Center, centred, check_center
from eim_jax.losses.contrastive import NCE, Similarity, queue_nce
from eim_jax.losses.online_softmax import Positives
from eim_jax.losses.queue_build import as_keys, compress, encode_all, rows_sharding, whole
from eim_jax.losses.queue_checks import BadRow, check_lengths, check_row, common_length
from eim_jax.losses.queue_files import StaleQueue, manifest, open_rows, write_rows
from eim_jax.losses.queue_parts import QueueParts
from eim_jax.losses.queue_placement import padded, place_groups, place_rows, place_whole

__all__ = ["BadRow", "Queue", "QueueParts", "StaleQueue", "compress", "manifest"]


@dataclasses.dataclass(frozen=True)
class Queue:
    """One fixed key for each training sample: row i is sample i's, rows from `count` on are padding.

    A pytree: `keys`, `groups`, `scale` and `center` are its leaves, `count` is static, so a queue passes through
    `jax.jit`, where another `count` compiles another program. Make one with `of` (ready arrays), `build` (an encoder)
    or `load`.

    Args:
      keys: [N D] float32 or bfloat16, of unit norm where the similarity is the cosine; or int8 codes.
      groups: [N] int32; samples that belong together (the captions of an image) share a number; -1 in the padding.
      count: real rows; the padding makes N divide by the devices that share it.
      scale: [N] float32, of int8 codes: `scale[i] * keys[i]` is the key.
      center: [D] float32, of a queue with center="mean": the mean that was taken from the keys (losses/centering.py),
        and that `nce` takes from each query.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> features = jax.random.normal(jax.random.key(0), (5, 4))
      >>> queue = Queue.of(features)
      >>> found = jax.jit(lambda queue, x: queue.nce(x, jnp.array([3, 1])))(queue, features[jnp.array([3, 1])])
      >>> print(found.recall1 / found.weight)  # the query is the sample's own key
      1.0
    """

    keys: Float[Array, "N D"] | Int[Array, "N D"]
    groups: Int[Array, "N"]
    count: int
    scale: Float[Array, "N"] | None = None
    center: Float[Array, "D"] | None = None

    @classmethod
    def of(
        cls,
        features: Any,
        groups: Any = None,
        *,
        dtype: Any = jnp.float32,
        similarity: Similarity = "cosine",
        center: Center = "none",
        mesh: Mesh | None = None,
        ids: Sequence[str] | None = None,
    ) -> "Queue":
        """A queue of ready features, one row a sample.

        Args:
          features: [N D] floats, of NumPy or JAX; normalised here when similarity="cosine".
          groups: [N] whole numbers; None: every sample is a group of its own.
          dtype: in which keys are held: float32 (best on CPU), bfloat16, int8 (a scale a row).
          similarity: "cosine" or "dot", as `nce` will be asked for.
          center: "mean" takes the keys' mean from them, before they are brought to length 1 (again, under the cosine),
            and from every query: for features that nearly all point one way, as a language model's do.
          mesh: over whose ("data", "fsdp") axes the rows are split; rows of zeros fill the last device.
          ids: the samples' names, for messages.

        Raises:
          BadRow: naming the first row that is not finite, or under the cosine is zero, or is the mean itself.
          ValueError: features that are not [N D] floats with N > 0, or groups of another number; another `center`.

        Example:
          >>> import numpy as np
          >>> Queue.of(np.array([[3.0, 4.0], [0.0, 2.0]])).keys.tolist()
          [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
        """
        shape = getattr(features, "shape", ())
        if len(shape) != 2 or 0 in shape or not jnp.issubdtype(features.dtype, jnp.floating):
            raise ValueError(f"features of shape {shape} {getattr(features, 'dtype', '')}: a queue takes [N D] floats")
        check_center(center)
        count = shape[0]
        check_lengths("the queue", count, {"groups": groups, "ids": ids})
        total = padded(count, mesh)

        def finish(rows):
            rows = jnp.pad(rows, ((0, total - rows.shape[0]), (0, 0))).astype(jnp.float32)
            keys, bad = as_keys(rows, jnp.arange(total, dtype=jnp.int32), count, similarity)
            return compress(keys, dtype if center == "none" else jnp.float32), bad

        where = None if mesh is None else (rows_sharding(mesh), whole(mesh))
        if not isinstance(features, jax.Array):
            features = place_rows(np.asarray(features), total, mesh, fill=0)
        elif mesh is not None:
            features = jax.device_put(jnp.pad(features, ((0, total - count), (0, 0))), rows_sharding(mesh))
        (keys, scale), bad = jax.jit(finish, out_shardings=where)(features)
        check_row("the queue", bad, count, ids, similarity)
        mean = None
        if center == "mean":
            (keys, scale), mean = _centred("the queue", keys, count, dtype, similarity, mesh, ids)
        return cls(keys, place_groups(groups, count, mesh), count, scale, mean)

    @classmethod
    def build(
        cls,
        encode: Callable[[Any, Any], jax.Array],
        params: Any,
        fields: Any,
        groups: Any = None,
        *,
        batch: int = 256,
        dtype: Any = jnp.float32,
        similarity: Similarity = "cosine",
        center: Center = "none",
        mesh: Mesh | None = None,
        ids: Sequence[str] | None = None,
        name: str = "",
        progress: bool = False,
        parts: QueueParts | None = None,
        lengths: Any = None,
    ) -> "Queue":
        """Encodes N samples, `batch` at a time, into a queue whose row i is sample i.

        Each device encodes the rows that it will hold, so no key ever moves and the host holds none.

        Args:
          encode: (params, fields of a batch) -> [b D]; compiled once, with `lengths` once for each of a few lengths.
          params: what it computes with.
          fields: a dict or tuple (or one) of arrays [N ...]: tokens, images, features. NumPy's, whole on every process,
            or anything with `shape`, `dtype` and `[row numbers]`: only rows that are encoded here are asked for.
          groups: [N] whole numbers; None: every sample is a group of its own.
          batch: samples at a time, over all devices; with `lengths` as many more of short texts as take no more slots.
          dtype: in which keys are held: float32 (best on CPU), bfloat16, int8 (a scale a row).
          similarity: "cosine" normalises the keys, in float32; "dot" leaves them.
          center: as `of`; all keys are then held in float32 until the last one is there, and rounded to `dtype` after.
          mesh: over whose ("data", "fsdp") axes the rows are split; rows of zeros fill the last device.
          ids: the samples' names, for messages.
          name: the queue's, for messages.
          progress: show how far it is (needs rich).
          parts: keeps what is encoded on disk every few seconds, and gives what an interrupted build left there;
            `parts.remove()` when the queue is saved.
          lengths: [N] whole numbers, where all fields are [N t ...] and `encode` gives the same key whatever follows
            a row's first so many of the t slots, or nothing: then texts are encoded in order of their length, cut to
            the longest of their batch. The keys are the same but for rounding.

        Raises:
          BadRow: naming the sample whose key is not finite, or under the cosine is zero, or is the mean itself.
          ValueError: fields, groups, ids or lengths of unequal length; parts of a queue with another centring.

        Example:
          >>> import numpy as np
          >>> table = np.eye(3, dtype=np.float32)
          >>> words = np.array([[0, 1], [1, 1], [2, 0], [2, 2]])
          >>> queue = Queue.build(lambda table, words: table[words].mean(1), table, words, batch=2)
          >>> queue.count, queue.keys.shape
          (4, (4, 3))
        """
        label = f"queue {name!r}" if name else "the queue"
        count = common_length(label, fields, groups, ids)
        check_lengths(label, count, {"lengths": lengths})
        check_center(center)
        if parts is not None and parts.center != center:
            raise ValueError(f"{label}: center={center!r}, but its parts' manifest says {parts.center!r}")
        rounded = dtype if center == "none" else jnp.float32
        encoded = encode_all(encode, params, fields, count, batch, rounded, similarity, mesh, parts, lengths)
        pending = keys = None
        with _progress(f"queue {name}".strip(), count) if progress else nullcontext(lambda _: None) as advance:
            for block in encoded:
                keys, bad, more, steps = block
                check_row(label, pending, count, ids, similarity)  # one step behind, so that the devices never wait
                pending = bad
                if parts is not None and steps and parts.due(steps):
                    check_row(label, pending, count, ids, similarity)
                    parts.save(keys, steps)
                advance(more)
            check_row(label, pending, count, ids, similarity)
        flat = jax.jit(lambda x: x.reshape(-1, *x.shape[2:]), donate_argnums=0, out_shardings=rows_sharding(mesh))
        keys, scale = jax.tree.map(flat, keys)
        mean = None
        if center == "mean":
            (keys, scale), mean = _centred(label, keys, count, dtype, similarity, mesh, ids)
        return cls(keys, place_groups(groups, count, mesh), count, scale, mean)

    def nce(
        self,
        query: Float[Array, "b D"],
        index: Int[Array, "b"],
        *,
        tau: float | Float[Array, ""] = 0.07,
        similarity: Similarity = "cosine",
        positives: Positives = "self",
        weights: Float[Array, "b"] | None = None,
        among: Int[Any, "m"] | None = None,
        mesh: Mesh | None = None,
        chunk: int = 0,
    ) -> NCE:
        """Contrasts each query with all keys of the queue: `queue_nce`, which see.

        Args:
          query: [b D]; the only argument that gets a gradient.
          index: [b], each query's own row.
          tau: the temperature.
          similarity: "cosine" (the query is normalised here) or "dot".
          positives: "self" (the paper), "group", "mask", "others" or "alone".
          weights: [b], of each query's loss; 0 leaves it out.
          among: [m], rows that are the negatives in place of all; `index`, for in-batch negatives. None: all rows.
          mesh: the one over which the queue was placed.
          chunk: keys read at a time; 0: by device, as `queue_nce`.

        Returns:
          Sums over the batch: `found.loss / found.weight` is the mean loss in nats.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> queue = Queue.of(jnp.eye(4))
          >>> found = queue.nce(2 * jnp.eye(4)[:2], jnp.array([0, 1]), tau=1.0)
          >>> print(f"{found.loss / found.weight:.4f}, the own key is number {found.rank / found.weight:.0f}")
          0.7437, the own key is number 1
        """
        return queue_nce(
            query,
            self.keys,
            index,
            count=self.count,
            tau=tau,
            similarity=similarity,
            weights=weights,
            positives=positives,
            groups=self.groups,
            scale=self.scale,
            center=self.center,
            among=among,
            chunk=chunk,
            mesh=mesh,
        )

    def save(self, directory: str | os.PathLike, manifest: dict[str, Any]) -> None:
        """Writes the real rows and manifest.json, whole or not at all.

        The rows are keys.npy, groups.npy, and scale.npy of int8; a centred queue's mean is center.npy.
        All processes call it with the same directory on a shared file system.

        Args:
          directory: the queue's folder; a queue that is there is replaced.
          manifest: what decided the content, see `manifest`; dtype, count, width and centring are added.

        Raises:
          ValueError: the manifest contradicts the queue's dtype, count, width or centring.
        """
        facts = {"dtype": self.keys.dtype.name, "count": self.count, "width": self.keys.shape[1]}
        center = {"center": "none" if self.center is None else "mean"}
        for field, value in {**facts, **center}.items():
            if manifest.get(field, value) != value:
                raise ValueError(f"manifest says {field}={manifest[field]!r}, the queue has {value!r}")
        arrays = {"keys": self.keys, "groups": self.groups} | ({} if self.scale is None else {"scale": self.scale})
        beside = {} if self.center is None else {"center": np.asarray(self.center)}
        facts |= {} if self.center is None else center  # without one as queues of earlier versions
        write_rows(directory, arrays, self.count, {**manifest, **facts}, beside)

    @classmethod
    def load(cls, directory: str | os.PathLike, manifest: dict[str, Any], mesh: Mesh | None = None) -> "Queue":
        """Reads a queue that `manifest` describes; each process reads only its rows.

        Args:
          directory: the queue's folder.
          manifest: what it must have been made from.
          mesh: over whose ("data", "fsdp") axes the rows are split; any, whatever wrote it.

        Raises:
          StaleQueue: naming each field in which the file differs, or that the files are damaged.
          FileNotFoundError: there is no queue.
        """
        rows, count, beside = open_rows(directory, manifest)
        fill = {"keys": 0, "groups": -1, "scale": 0}
        placed = {name: place_rows(part, padded(count, mesh), mesh, fill[name]) for name, part in rows.items()}
        return cls(count=count, **placed, **{name: place_whole(array, mesh) for name, array in beside.items()})


_LEAVES = ("keys", "groups", "scale", "center")


def _flatten(queue: Queue):
    keys = [jax.tree_util.GetAttrKey(name) for name in _LEAVES]
    return list(zip(keys, (getattr(queue, name) for name in _LEAVES), strict=True)), queue.count


def _unflatten(count: int, leaves) -> Queue:
    """Without `__init__`: JAX fills trees with shapes, shardings and placeholders too, which are no arrays."""
    queue = object.__new__(Queue)
    for name, value in zip((*_LEAVES, "count"), (*leaves, count), strict=True):
        object.__setattr__(queue, name, value)
    return queue


jax.tree_util.register_pytree_with_keys(Queue, _flatten, _unflatten)


def _centred(label, keys, count, dtype, similarity, mesh, ids):
    held, mean, bad = centred(keys, count, dtype, similarity, mesh)
    check_row(
        label, bad, count, ids, similarity, "the mean of all keys, so that nothing is left of it once that is taken"
    )
    return held, mean


def _progress(description: str, count: int):
    from eim_jax.utils.console import progress  # only where it is shown: it needs rich

    return progress(description, count, "keys")

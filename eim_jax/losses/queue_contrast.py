"""Between which losses a queue lets a query move: that of its own key as query, and chance.

Where both are nearly equal, the keys lie in a narrow cone: no query can tell them apart, and what a loss then teaches
is to leave the cone (docs/concepts/cone.md).
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from eim_jax.losses.contrastive import Similarity, queue_nce
from eim_jax.losses.online_softmax import Positives, keys_at
from eim_jax.losses.queues import Queue
from eim_jax.parallel.sharding import ROWS

SAMPLE = 128  # rows that ask the whole queue: on two CPU cores some seconds at N = 566,747, D = 768
NARROW = 0.8  # share of chance, above which there is a warning


class Contrast(NamedTuple):
    """What a queue's losses lie between, in nats.

    Attributes:
      floor: the mean loss of queries that are their own keys. Not a least loss: a query that leaves the cone may have
        a lower one.
      chance: the mean loss of a query that is equally similar to all keys: log N where the own key is the positive.
      rows: samples over which both are means.
    """

    floor: float
    chance: float
    rows: int


def contrast(
    queue: Queue,
    *,
    tau: float = 0.07,
    similarity: Similarity = "cosine",
    positives: Positives = "self",
    among: Int[np.ndarray, "m"] | None = None,
    mesh: Mesh | None = None,
    chunk: int = 0,
) -> Contrast:
    """Measures what a loss of this queue lies between, by up to SAMPLE of its rows, always the same ones.

    Args:
      queue: the keys; those of a centred queue are what is left of them.
      tau: the temperature.
      similarity: "cosine" or "dot". Under "dot" a longer query lowers the loss: there the floor bounds nothing.
      positives: "self", "group", "mask" or "others"; with "alone" nothing is contrasted.
      among: the rows that are negatives, as `queue_nce`; None: all.
      mesh: the one over which the queue was placed.
      chunk: keys read at a time, as `queue_nce`.

    Example:
      >>> found = contrast(Queue.of(np.eye(4)), tau=1.0)
      >>> print(f"{found.floor:.4f} {found.chance:.4f}")  # log(e + 3) - 1, log 4
      0.7437 1.3863
    """
    count = queue.count
    every = np.arange(count) if count <= SAMPLE else np.random.default_rng(0).choice(count, SAMPLE, replace=False)
    rows = np.sort(every).astype(np.int32)  # NumPy's: every process of several has the same
    options = (tau, similarity, positives, mesh, chunk)
    floor = float(_loss(queue, rows, np.float32(1), among, *options))
    known = positives == "self" and among is None
    equal = float(np.log(count)) if known else float(_loss(queue, rows, np.float32(0), among, *options))
    return Contrast(floor, equal, len(rows))


def _keys(queue: Queue, rows: Array, mesh: Mesh | None) -> Float[Array, "s D"]:
    """The keys in these rows, on every device; no other key moves."""
    if mesh is None:
        return keys_at(queue.keys, queue.scale, rows, 0, ())

    def of_device(keys, scale, rows):
        return keys_at(keys, scale, rows, lax.axis_index(ROWS) * keys.shape[0], ROWS)

    held, whole = PartitionSpec(ROWS), PartitionSpec()
    found = jax.shard_map(of_device, mesh=mesh, in_specs=(held, held, whole), out_specs=whole)
    return found(queue.keys, queue.scale, rows)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _loss(queue: Queue, rows, length, among, tau, similarity, positives, mesh, chunk) -> Float[Array, ""]:
    """The mean loss of the keys in these rows as queries, times `length`: 0 makes them as similar to one key as to all.

    A centred queue's mean is taken from its keys already.
    """
    found = queue_nce(
        length * _keys(queue, rows, mesh),
        queue.keys,
        rows,
        count=queue.count,
        tau=tau,
        similarity=similarity,
        positives=positives,
        groups=queue.groups,
        scale=queue.scale,
        among=among,
        mesh=mesh,
        chunk=chunk,
    )
    return found.loss / found.weight

"""Which samples of a batch share a row of slots: bins found on the host, in the few shapes that a stage compiles.

Order, samples and seed of the batches stay as they are; only where their tokens lie changes. Each part of a batch (the
rows of a device, of a micro-batch) is packed by itself, so that nothing moves between devices.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from eim_jax.models.packing import Packing

PAYS = 1.15  # a stage packs by itself where its slots fall to less than 1/1.15
_SAMPLED = 200_000  # slots' worth of first-fit that choosing shapes may cost: samples x lengths tried
_TRIED = 16  # lengths of packed rows that are tried


class Shape(NamedTuple):
    """Packed rows of a part: how many, and how long."""

    rows: int
    length: int


class Saving(NamedTuple):
    """What packing does to a stage, counted over batches of its first epoch.

    Attributes:
      before: share of padding among text tokens without it.
      after: with it.
      factor: the blocks' work without it over that with it, attention's counted.
    """

    before: float
    after: float
    factor: float


def first_fit(lengths: Int[np.ndarray, "k"], room: int) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "k"], int]:
    """Puts the longest first, each into the first row that has room.

    Args:
      lengths: slots of each sample; of equal ones the earlier comes first.
      room: slots of a row, at least the longest.

    Returns:
      Each sample's row, its first slot in that row, and the number of rows.

    Raises:
      ValueError: a sample is longer than a row.

    Example:
      >>> row, first, rows = first_fit(np.array([2, 5, 3, 4]), 7)
      >>> row.tolist(), first.tolist(), rows
      ([0, 0, 1, 1], [5, 0, 4, 0], 2)
    """
    if len(lengths) and lengths.max() > room:
        raise ValueError(f"a sample of {lengths.max()} slots does not fit a row of {room}")
    row, first, used = [0] * len(lengths), [0] * len(lengths), []
    sizes = lengths.tolist()
    for sample in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[sample]
        place = next((i for i, taken in enumerate(used) if taken + size <= room), len(used))
        if place == len(used):
            used.append(0)
        row[sample], first[sample] = place, used[place]
        used[place] += size
    return np.asarray(row, np.int32), np.asarray(first, np.int32), len(used)


@dataclass(frozen=True, eq=False)
class Packer:
    """Packs each batch by what the LM reads of it.

    Attributes:
      lengths: for each reading (batch.READINGS), the slots that each sample of the split takes.
      shapes: for each reading, the shapes that a stage compiles, the cheapest first.
      parts: of a batch that are packed by themselves: devices that hold rows, times micro-batches.
      accumulate: micro-batches; one holds every accumulate-th row, as in training/step.py.
    """

    lengths: Mapping[str, Int[np.ndarray, "N"]]
    shapes: Mapping[str, tuple[Shape, ...]]
    parts: int
    accumulate: int = 1

    def __call__(self, rows: Int[np.ndarray, "b"], own: slice = slice(None)) -> dict[str, Packing] | None:
        """Returns where the samples lie, or None where some part of the batch fits none of the shapes.

        Args:
          rows: the whole batch's sample rows, in order.
          own: the rows of this process.
        """
        found = {}
        for reading, lengths in self.lengths.items():
            packed = self._packed(parted(lengths[rows], self.parts, self.accumulate), self.shapes[reading])
            if packed is None:
                return None
            start, stop, _ = own.indices(len(rows))
            here = slice(start * self.parts // len(rows), stop * self.parts // len(rows))
            found[reading] = Packing(*(part[here] for part in packed))
        return found

    def _packed(self, lengths: Int[np.ndarray, "p k"], shapes: tuple[Shape, ...]) -> Packing | None:
        for shape in shapes:
            if lengths.max() > shape.length:
                continue
            placed = [first_fit(part, shape.length) for part in lengths]
            if max(rows for *_, rows in placed) > shape.rows:
                continue
            segment = np.full((len(lengths), shape.rows * shape.length), -1, np.int32)
            start = np.stack([row * shape.length + first for row, first, _ in placed]).astype(np.int32)
            for part, (firsts, sizes) in enumerate(zip(start, lengths, strict=True)):
                for sample, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
                    segment[part, first : first + size] = sample
            return Packing(segment.reshape(len(lengths), *shape), start)
        return None


def parted(of_rows: Int[np.ndarray, "b"], parts: int, accumulate: int) -> Int[np.ndarray, "p k"]:
    """Returns a batch's values by part: part d a + m has the rows m, m + a, ... of device d's.

    >>> parted(np.arange(8), 4, 2).tolist()
    [[0, 2], [1, 3], [4, 6], [5, 7]]
    """
    by_device = of_rows.reshape(parts // accumulate, -1, accumulate)
    return by_device.transpose(0, 2, 1).reshape(parts, -1)


def choose(
    lengths: Mapping[str, Int[np.ndarray, "N"]],
    texts: Int[np.ndarray, "N"],
    batches: list[Int[np.ndarray, "b"]],
    widths: list[int],
    *,
    width: int,
    head_width: int,
    parts: int,
    accumulate: int,
    shapes: int,
) -> tuple[Packer, Saving]:
    """Chooses the shapes that make the blocks' work least over these batches, and counts what they save.

    Args:
      lengths: for each reading, the slots that each sample takes.
      texts: the text tokens among them.
      batches: sample rows of batches of the first epoch.
      widths: the text width to which each of them is cut without packing.
      width: of the LM, by which attention's work is weighed against the rest.
      head_width: of its attention, by which the scores' memory is weighed against the rest.
      parts: as in Packer.
      accumulate: as in Packer.
      shapes: the most shapes, over all readings together.
    """
    each = max(int(shapes ** (1 / len(lengths)) + 1e-9), 1)
    rows = len(batches[0])
    some = max(_SAMPLED // (_TRIED * rows), 8)
    sampled = np.linspace(0, len(batches) - 1, min(some, len(batches))).astype(int)
    seen = [batches[i] for i in sampled]
    work, held = functools.partial(_work, width=width), functools.partial(_held, head_width=head_width)
    chosen, ways = {}, []
    for reading, taken in lengths.items():
        before = int((taken - texts).max())
        alone = [Shape(rows // parts, before + widths[i]) for i in sampled]
        sizes = [parted(taken[batch], parts, accumulate) for batch in seen]
        found, used = _shapes(sizes, alone, each, work, held)
        if found and len(seen) < len(batches):
            widest = _for_all(found[-1], (parted(taken[batch], parts, accumulate) for batch in batches))
            used = [widest if shape == found[-1] else shape for shape in used]
            found = (*found[:-1], widest)
        chosen[reading] = found
        ways.append((alone, used, sum(int(size.sum()) for size in sizes)))
    # Packer packs a batch for every reading or for none.
    each_batch = zip(*(used for _, used, _ in ways), strict=True)
    together = [all(map(operator.contains, chosen.values(), used)) for used in each_batch]
    plain, packed, empty = 0.0, 0.0, 0
    for alone, used, taken in ways:
        used = [shape if fits else own for shape, own, fits in zip(used, alone, together, strict=True)]
        plain, packed = plain + sum(map(work, alone)), packed + sum(map(work, used))
        empty += parts * sum(shape.rows * shape.length for shape in used) - taken
    real = len(lengths) * sum(int(texts[batch].sum()) for batch in seen)
    wide = len(lengths) * sum(widths[i] * rows for i in sampled)
    saving = Saving(1 - real / wide, empty / max(empty + real, 1), plain / packed)
    return Packer(dict(lengths), chosen, parts, accumulate), saving


def _work(shape: Shape, width: int) -> float:
    """The blocks' work on rows of this shape: 24 d^2 a slot, and 4 L d for attention, which runs at half the speed."""
    return shape.rows * shape.length * (1 + shape.length / (3 * width))


def _for_all(shape: Shape, batches: Iterable[Int[np.ndarray, "p k"]]) -> Shape:
    """The shape with as many rows as the fullest of the batches takes, of those whose samples are no longer than it."""
    rows = shape.rows
    for parts in batches:
        if parts.max() <= shape.length:
            rows = max(rows, *(first_fit(part, shape.length)[2] for part in parts))
    return Shape(rows, shape.length)


def _held(shape: Shape, head_width: int) -> float:
    """What a block keeps for its gradient: about 16 d a slot, and twice L for each of the d / head_width heads."""
    return shape.rows * shape.length * (1 + shape.length / (8 * head_width))


def _shapes(
    lengths: list[Int[np.ndarray, "p k"]],
    alone: list[Shape],
    most: int,
    work: Callable[[Shape], float],
    held: Callable[[Shape], float],
) -> tuple[tuple[Shape, ...], list[Shape]]:
    """Returns at most so many shapes, the cheapest first, and which of them each batch takes.

    A batch that fits none has its samples in rows of their own: its shape of `alone`. None holds more than those do.
    """
    k, longest = lengths[0].shape[1], max(int(part.max()) for part in lengths)
    shortest = min(int(part.max()) for part in lengths)
    # Longer rows waste less, but have more scores.
    tried = np.unique(np.linspace(shortest, 2 * longest, _TRIED).astype(int) // 8 * 8 + 8)
    needed = {
        int(room): np.array(
            [k + 1 if parts.max() > room else max(first_fit(part, int(room))[2] for part in parts) for parts in lengths]
        )
        for room in tried
    }
    candidates = [Shape(int(rows), room) for room, found in needed.items() for rows in np.unique(found)]
    most_held = max(map(held, alone))
    candidates = [shape for shape in candidates if shape.rows <= k and held(shape) <= most_held]
    fits = np.array([needed[shape.length] <= shape.rows for shape in candidates], bool).reshape(-1, len(lengths))
    costs = np.where(fits, np.array([work(shape) for shape in candidates], float)[:, None], np.inf)
    chosen: list[int] = []
    best = np.array([work(shape) for shape in alone])
    while candidates and len(chosen) < most:
        totals = np.minimum(costs, best).sum(1)
        if not chosen and fits.all(1).any():
            # One shape holds every batch: else a program for rows of their own would be compiled for the few left.
            totals = np.where(fits.all(1), totals, np.inf)
        if totals.min() >= best.sum():
            break
        chosen.append(int(totals.argmin()))
        best = np.minimum(best, costs[chosen[-1]])
    order = sorted(chosen, key=lambda i: work(candidates[i]))
    used = [next((candidates[i] for i in order if fits[i, batch]), own) for batch, own in enumerate(alone)]
    return tuple(candidates[i] for i in order), used

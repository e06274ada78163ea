"""Several samples in one row of slots: where each lies, what sees what, and the way there and back.

The language model's blocks then run over R rows of L slots in place of b rows of s, of which many are padding. All else
(the input's making, the losses and their queries) keeps its rows b: `Exchange.pack` stands before the blocks,
`Exchange.unpack` behind them. Samples stay on the device that holds them: the parts p are the devices' rows.

    Two samples of 2 and 3 slots, a third of 4, in two rows of 5 (p = 1; -1: an empty slot):

    segment   0 0 1 1 1      start  0 2 5
              2 2 2 2 -1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num


class Packing(NamedTuple):
    """Where each sample of a batch lies, made on the host (data/packing.py); numbers count within a part.

    Attributes:
      segment: of each slot, whose it is: 0..k-1, or -1 where it is empty.
      start: of each sample, the first of its slots, counted over all rows of its part.
    """

    segment: Int[Array, "p r l"]
    start: Int[Array, "p k"]

    def exchange(self, valid: Bool[Array, "b s"]) -> "Exchange":
        """Returns the way of an LM's input with these flags; of each row the valid slots move, in their order.

        Args:
          valid: the rows of all parts, in order; a row has as many valid slots as the packing keeps for it.
        """
        (parts, rows, length), k, s = self.segment.shape, self.start.shape[1], valid.shape[1]
        valid = valid.reshape(parts, k, s)
        rank = jnp.cumsum(valid, axis=2) - 1
        back = jnp.where(valid, self.start[:, :, None] + rank, rows * length)
        # The slot of each row's first, second, ... valid token.
        order = jnp.argsort(~valid, axis=2, stable=True).astype(jnp.int32)
        segment = self.segment.reshape(parts, rows * length)
        sample = jnp.maximum(segment, 0)
        rank = jnp.arange(rows * length)[None] - jnp.take_along_axis(self.start, sample, axis=1)
        real = (segment >= 0) & (rank < jnp.take_along_axis(valid.sum(2), sample, axis=1))
        inside = jnp.take_along_axis(order.reshape(parts, k * s), sample * s + jnp.where(real, rank, 0), axis=1)
        take = jnp.where(real, sample * s + inside, k * s).astype(jnp.int32)
        return Exchange(take.reshape(self.segment.shape), back.astype(jnp.int32), self.segment)


class Exchange(NamedTuple):
    """Both ways between rows of one sample [b s ...] and packed rows [R L ...] (b = p k, R = p r).

    Attributes:
      take: of each packed slot the slot of its part's k s that it holds; k s where it is empty.
      back: of each slot of a sample's row the packed one of its part's r l; r l where it is padding.
      segment: as in Packing.
    """

    take: Int[Array, "p r l"]
    back: Int[Array, "p k s"]
    segment: Int[Array, "p r l"]

    def pack(self, x: Num[Array, "b s *c"]) -> Num[Array, "R L *c"]:
        """Returns the packed rows; empty slots hold zeros."""
        return _moved(x, self.take, self.back)

    def unpack(self, x: Num[Array, "R L *c"]) -> Num[Array, "b s *c"]:
        """Returns the samples' rows; padding holds zeros."""
        return _moved(x, self.back, self.take)

    @property
    def mask(self) -> Bool[Array, "R 1 L L"]:
        """Which slots each slot sees: itself and those before it of the same sample.

        Empty slots see each other, so that no row of the softmax is empty; nobody reads what they give.
        """
        length = self.segment.shape[2]
        owner = self.segment.reshape(-1, 1, length)
        return (owner[..., :, None] == owner[..., None, :]) & jnp.tril(jnp.ones((length, length), bool))[None, None]


def _moved(x, take, back):
    parts, a, b = take.shape
    x = x.reshape(parts, -1, *x.shape[2:])
    moved = _gather(x, take.reshape(parts, a * b), back.reshape(parts, -1))
    return moved.reshape(parts * a, b, *x.shape[2:])


@jax.custom_vjp
def _gather(x, take, back):
    """x[take] in each part, zeros where `take` points beyond; `back` is its inverse."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))(x, take)


def _forward(x, take, back):
    return _gather(x, take, back), (take, back)


def _backward(ways, dy):
    # Every slot is taken once at most, so that the gradient is a gather too: a scatter-add would run one by one.
    take, back = ways
    return _gather(dy, back, take), None, None


_gather.defvjp(_forward, _backward)

"""The key-value cache of a decoder LM, explicit: a NamedTuple that goes in and comes out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from eim_jax.models.layers import causal_mask
from eim_jax.parallel.sharding import ROWS, parts_of


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, in slots that are filled in the order of time.

    A slot knows whether its token is real, so rows with right-padded prompts of different lengths share one `length`:
    pads take slots but nothing ever sees them.
    """

    kv: Any  # unrolled: a tuple of (k, v) [b slots h e], one a layer; scanned: one (k, v) [L b slots h e]
    valid: Bool[Array, "b slots"]
    length: Int[Array, ""]  # slots filled so far
    mask: Bool[Array, "b 1 t slots"] | None = None  # which slots the next t tokens see, where time does not say it

    def sees(self, valid: Bool[Array, "b t"]) -> tuple[Bool[Array, "b 1 t slots"], Bool[Array, "b slots"]]:
        """Returns which slots each of t new tokens sees, and the slots' flags with the new tokens written."""
        flags = jax.lax.dynamic_update_slice(self.valid, valid, (0, self.length))
        if self.mask is not None:
            return self.mask, flags
        if valid.shape[1] == 1:  # all that is there was read before, also in a ring
            return flags[:, None, None, :], flags
        slot, query = jnp.arange(flags.shape[1]), self.length + jnp.arange(valid.shape[1])
        return (slot[None, :] <= query[:, None])[None, None] & flags[:, None, None, :], flags

    def admit(self, rows: Int[Array, "g"], other: "Cache") -> "Cache":
        """Returns this cache as a ring whose `rows` hold what `other` does, in the slots just before the next one.

        A row from the batch size on is left out. What the rows held before is forgotten.
        """
        total, read = self.valid.shape[1], other.valid.shape[1]
        slots = (self.length - read + jnp.arange(read)) % total
        at = (rows[:, None], slots[None])
        kv = jax.tree.map(
            lambda a, new: a.at[(..., *at, slice(None), slice(None))].set(new, mode="drop"), self.kv, other.kv
        )
        valid = self.valid.at[rows].set(False, mode="drop").at[at].set(other.valid, mode="drop")
        return Cache(kv, valid, self.length)

    def turn(self) -> "Cache":
        """Returns the ring after a token was written: from its last slot on to its first."""
        return self._replace(length=self.length % self.valid.shape[1])

    def place(self, mesh: Mesh | None) -> "Cache":
        """Returns the cache laid out over a mesh inside jit: rows over "data" and "fsdp", heads over "tensor"."""
        if mesh is None:
            return self

        def lay(a: Array, *axes) -> Array:
            fits = (axis if axis and a.shape[i] % parts_of(mesh, axis) == 0 else None for i, axis in enumerate(axes))
            return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*fits)))

        kv = jax.tree.map(lambda a: lay(a, *[()] * (a.ndim - 4), ROWS, (), ("tensor",), ()), self.kv)
        return Cache(kv, lay(self.valid, ROWS, ()), self.length)


def visible(
    cache: Cache | None, valid: Bool[Array, "b t"] | None, rows: int, tokens: int
) -> tuple[Bool[Array, "#b 1 t s"], Bool[Array, "b s"] | None]:
    """Returns which keys (or cache slots) each of t new tokens sees, and the slots' flags with these tokens written.

    `valid` is False for padding, which nothing sees; None means all `rows` x `tokens` are real. Without a cache a token
    sees itself and those before it, and there are no flags.
    """
    if cache is None:
        mask = causal_mask(tokens)
        return mask if valid is None else mask & valid[:, None, None, :], None
    return cache.sees(jnp.ones((rows, tokens), bool) if valid is None else valid)


def narrowed(mask: Bool[Array, "#b 1 t s"], window: int, start: Int[Array, ""] | None) -> Bool[Array, "#b 1 t s"]:
    """Returns the mask of queries that see the last `window` of what they saw, themselves included.

    Args:
      mask: which keys (or cache slots) each of t new tokens sees.
      window: tokens; padding between two of them counts for none.
      start: the cache slot of the first new token; None without a cache. In a ring the oldest slot is the one behind
        the newest.
    """
    t, s = mask.shape[-2:]
    if s <= window:
        return mask
    oldest_first = mask if start is None else jnp.roll(mask, -(start + t), axis=-1)
    later = jnp.cumsum(oldest_first[..., ::-1].astype(jnp.int32), axis=-1)[..., ::-1] - oldest_first  # seen, behind it
    kept = oldest_first & (later < window)
    return kept if start is None else jnp.roll(kept, start + t, axis=-1)


def init_cache(config, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
    """Returns an empty cache for `batch` rows of at most `slots` tokens, pads included.

    Args:
      config: of the model that will fill it (GPT2Config, LlamaConfig).
      batch: rows.
      slots: prompt plus everything generated; writing past the end would overwrite, so give enough.
      dtype: of keys and values; the compute dtype by default.
    """
    shape = (batch, slots, config.kv_heads, config.head_width)
    dtype = config.dtype if dtype is None else dtype
    if config.scan:
        kv = (jnp.zeros((config.layers, *shape), dtype), jnp.zeros((config.layers, *shape), dtype))
    else:
        kv = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))
    return Cache(kv, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

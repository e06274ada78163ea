"""LLaMA and what is built like it, with LM_e, LM_block and head callable by themselves, and adapters.

An adapter adds one subtree, "adapter", and changes the blocks only through what `steer` returns: without it, `hidden`
is the untouched language model.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import LayerLeaves, Steering
from eim_jax.models.kv_cache import Cache, narrowed, visible
from eim_jax.models.language.llama_block import LlamaBlock, LlamaConfig, make_blocks, rms_norm
from eim_jax.models.language.rope import rotation
from eim_jax.models.layers import NORMAL
from eim_jax.models.packing import Exchange
from eim_jax.models.quant import QDense
from eim_jax.models.soft_cap import soft_cap


class Llama(nn.Module):
    """LLaMA language model, with or without an adapter."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.token_embedding = nn.Embed(c.vocab, c.width, embedding_init=NORMAL, dtype=c.dtype)
        self.blocks = make_blocks(c)
        self.norm_f = rms_norm(c)
        if not c.tied:
            self.head = QDense(c.width, c.vocab, dtype=c.dtype)
        if c.adapter is not None:
            self.adapter = c.adapter.lm_parameters(c)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns the token embeddings: LM_e."""
        embeds = self.token_embedding(tokens)
        c = self.config
        return embeds * jnp.asarray(c.width**0.5, c.dtype) if c.embedding_scaled else embeds

    def hidden(
        self,
        embeds: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
        steer: Steering | None = None,
        packed: Exchange | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns LM_block's output (after norm_f) for input embeddings, and the cache that now holds these tokens.

        Args:
          embeds: token embeddings or the ST's output.
          valid: False for padding, which nothing sees; None means all real.
          positions: of each token; 0..t-1 by default. Must be given with a cache.
          cache: what was read before; these tokens take its next t slots.
          train: dropout (of an adapter) is on; needs the rng "dropout".
          steer: what the adapter needs, from `steer`; None is the LM without its adapter.
          packed: whose slots these are, where samples share rows; then with positions, and without `valid` and cache.

        Raises:
          ValueError: more tokens than the context, or a cache without positions.
        """
        c, (b, t) = self.config, embeds.shape[:2]
        if packed is None and t > c.context:  # of packed rows each sample's own slots were counted
            raise ValueError(f"{t} tokens do not fit the language model's context of {c.context}")
        if positions is None:
            if cache is not None:
                raise ValueError("with a cache the positions of the new tokens must be given")
            positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        mask, flags = visible(cache, valid, b, t) if packed is None else (packed.mask, None)
        start, kv = (None, None) if cache is None else (cache.length, cache.kv)
        x, kv, _ = self.run(
            embeds.astype(c.dtype),
            positions,
            mask=mask,
            train=train,
            start=start,
            leaves=self._leaves(steer),
            steer=steer,
            kv=kv,
            packed=packed,
        )
        return self.norm_f(x), None if cache is None or flags is None else Cache(kv, flags, cache.length + t)

    def steer(self, visual: Float[Array, "b K d"] | None, has_image: Bool[Array, "b"] | None) -> Steering:
        """Returns what the adapter needs for rows with these visual tokens (None: no row has an image).

        Args:
          visual: the ST's output.
          has_image: which rows have one; None with `visual` means all.

        Raises:
          ValueError: this LM has no adapter, or its adapter refuses these inputs.
        """
        if self.config.adapter is None:
            raise ValueError("this LLaMA has no adapter to steer")
        return self.config.adapter.steer(self, visual, has_image)

    def keys_values(self, x: Float[Array, "l b K d"]) -> tuple[Float[Array, "l b K kv e"], Float[Array, "l b K kv e"]]:
        """Returns what the key and value maps of the l topmost layers make of x, each of its own part, without RoPE."""
        c, first = self.config, self.config.layers - x.shape[0]
        if c.scan:
            block, stack = LlamaBlock(c, parent=None), self.variables["params"]["blocks"]
            top = jax.tree.map(lambda leaf: leaf[first:], stack)
            project: Any = jax.vmap(lambda leaf, x: block.apply({"params": leaf}, x, method="keys_values"))
            return project(top, x)
        blocks: Any = self.blocks
        pairs = [block.keys_values(part) for block, part in zip(blocks[first:], x, strict=True)]
        keys, values = zip(*pairs, strict=True)
        return jnp.stack(keys), jnp.stack(values)

    def _leaves(self, steer):
        """The adapter's leaves by layer, or None for the LM without it."""
        if self.config.adapter is not None and self.is_initializing():
            self.adapter.leaves()
        return None if steer is None else self.adapter.leaves()

    def run(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        *,
        mask: Bool[Array, "#b 1 t s"] | None = None,
        train: bool = False,
        start: Int[Array, ""] | None = None,
        leaves: LayerLeaves | None = None,
        steer: Steering | None = None,
        kv=None,
        packed: Exchange | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, Any]:
        """Runs the blocks: (output before norm_f, cache slots in the form in which they came, the adapter's reports).

        Args:
          x: the first block's input.
          positions: of each token, for RoPE.
          mask: True where a query may see a key (or a cache slot); None sees all.
          train: dropout is on.
          start: the cache slot that x's first token takes.
          leaves: the adapter's, by layer; None leaves it out.
          steer: what its `steer` returned.
          kv: the cache's slots.
          packed: whose slots x has, where samples share rows; an adapter still gets each sample in a row of its own.
        """
        c = self.config
        turn, mask, which = _kinds(c, positions, mask, start)
        # The lowest layer with an adapter.
        first = 0 if leaves is None or c.adapter is None else c.layers - c.adapter.depth(c.layers)
        blocks: Any = self.blocks
        if c.scan:
            if first:  # every layer of a scan has the same arguments: those below get zeros
                leaves, steer = jax.tree.map(
                    lambda part: jnp.pad(part, [(first, 0)] + [(0, 0)] * (part.ndim - 1)), (leaves, steer)
                )
            x, (kv, reports) = blocks(x, turn, mask, train, start, leaves, steer, kv, which, packed)
            return x, kv, reports
        slots, reports = [], []
        for i, block in enumerate(blocks):
            leaf = row = None
            if i >= first:
                leaf, row = (jax.tree.map(lambda part, i=i: part[i - first], tree) for tree in (leaves, steer))
            kind = None if which is None else which[i]
            slot = None if kv is None else kv[i]
            x, (new, report) = block(x, turn, mask, train, start, leaf, row, slot, kind, packed)
            slots.append(new)
            reports.append(report)
        reports = jax.tree.map(lambda *parts: jnp.stack(parts), *reports[first:])
        return x, None if kv is None else tuple(slots), reports

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Returns float32 next-token logits."""
        c = self.config
        weight, axis = self.head_weights()
        contract_width = (((2,), (1 - axis,)), ((), ()))
        weight = weight.astype(c.dtype)
        hidden = hidden.astype(c.dtype)
        logits = jax.lax.dot_general(hidden, weight, contract_width, preferred_element_type=jnp.float32)
        return soft_cap(logits, c.logit_cap)

    def head_weights(self) -> tuple[Float[Array, "_ _"], int]:
        """Returns the head's weights, [d V] or tied [V d], and which of their axes counts the vocabulary."""
        return (self.token_embedding.embedding, 0) if self.config.tied else (self.head.kernel, 1)

    def __call__(
        self, tokens: Int[Array, "b t"], valid: Bool[Array, "b t"] | None = None, train: bool = False
    ) -> Float[Array, "b t V"]:
        """Returns the logits of text alone, by the LM without its adapter."""
        hidden, _ = self.hidden(self.embed(tokens), valid=valid, train=train)
        return self.logits(hidden)


def _kinds(c: LlamaConfig, positions, mask, start):
    """RoPE's (cos, sin) and the mask, and each layer's number where layers differ: then both have an axis of kinds."""
    plain = rotation(positions, c.head_width, c.rope_theta, c.rope_scaling)
    narrow = c.window > 0 and mask is not None and mask.shape[-1] > c.window
    every = (c.window > 0,) * c.layers
    kinds = list(zip(c.narrow or every, c.no_rope or (False,) * c.layers, strict=True))
    if not c.narrow_theta:  # all layers turn alike
        kinds = [(is_narrow and narrow, unturned) for is_narrow, unturned in kinds]
    distinct = sorted(set(kinds))
    turns, masks = [], []
    for is_narrow, unturned in distinct:
        turn = rotation(positions, c.head_width, c.narrow_theta) if is_narrow and c.narrow_theta else plain
        turns.append((jnp.ones_like(turn[0]), jnp.zeros_like(turn[1])) if unturned else turn)
        masks.append(narrowed(mask, c.window, start) if is_narrow and mask is not None else mask)
    if len(distinct) == 1:
        return turns[0], masks[0], None
    which = np.asarray([distinct.index(kind) for kind in kinds])
    return *jax.tree.map(lambda *parts: jnp.stack(parts), *zip(turns, masks, strict=True)), which

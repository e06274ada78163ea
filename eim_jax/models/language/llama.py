"""LLaMA (v1, Llama 2, grouped-query attention) with LM_e, LM_block and head callable by themselves, and its adapters.

An adapter adds one subtree, "adapter", and changes the blocks only through what `steer` returns: without it, `hidden`
is the untouched language model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.inserted import ModalityAdapter, PromptAdapter, Router, ZeroInit
from eim_jax.models.kv_cache import Cache, visible
from eim_jax.models.language.llama_block import LlamaBlock, LlamaConfig, make_blocks, rotation
from eim_jax.models.layers import NORMAL
from eim_jax.models.quant import QDense


class Steer(NamedTuple):
    """What an image (or its absence) changes inside the LM besides the input tokens; None where there is nothing."""

    weights: Float[Array, "L b 2"] | None = None  # LaVIN: each layer's routing weights
    keys: Float[Array, "l b K kv e"] | None = None  # LLaMA-Adapter: keys and values of the topmost layers' prompts
    values: Float[Array, "l b K kv e"] | None = None


class Llama(nn.Module):
    """LLaMA language model, with or without an adapter."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        self.token_embedding = nn.Embed(c.vocab, c.width, embedding_init=NORMAL, dtype=c.dtype)
        self.blocks = make_blocks(c)
        self.norm_f = nn.RMSNorm(epsilon=c.eps, dtype=c.dtype)
        if not c.tied:
            self.head = QDense(c.width, c.vocab, dtype=c.dtype)
        if isinstance(c.adapter, Router):
            self.adapter = ModalityAdapter(c.layers, c.width, c.adapter)
        elif c.adapter is not None:
            self.adapter = PromptAdapter(c.adapter, c.width, c.heads)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns the token embeddings: LM_e."""
        return self.token_embedding(tokens)

    def hidden(
        self,
        embeds: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
        steer: Steer | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns LM_block's output (after norm_f) for input embeddings, and the cache that now holds these tokens.

        Args:
          embeds: token embeddings or the ST's output.
          valid: False for padding, which nothing sees; None means all real.
          positions: of each token; 0..t-1 by default. Must be given with a cache.
          cache: what was read before; these tokens take its next t slots.
          train: dropout (of a router adapter) is on; needs the rng "dropout".
          steer: what the adapter needs, from `steer`; None is the LM without its adapter.

        Raises:
          ValueError: more tokens than the context, or a cache without positions.
        """
        c, (b, t) = self.config, embeds.shape[:2]
        if t > c.context:
            raise ValueError(f"{t} tokens do not fit LLaMA's context of {c.context}")
        if positions is None:
            if cache is not None:
                raise ValueError("with a cache the positions of the new tokens must be given")
            positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        mask, flags = visible(cache, valid, b, t)
        start, kv = (None, None) if cache is None else (cache.length, cache.kv)
        x, kv, _ = self._run(embeds.astype(c.dtype), positions, mask, train, start, self._leaves(steer), steer, kv)
        return self.norm_f(x), None if cache is None else Cache(kv, flags, cache.length + t)

    def steer(self, visual: Float[Array, "b K d"] | None, has_image: Bool[Array, "b"] | None) -> Steer:
        """Returns what the adapter needs for rows with these visual tokens (None: no row has an image).

        LaVIN: the modality row sees itself alone and nobody sees it, so in every layer its routing weights depend on
        the modality index only; they are computed once for both indices and looked up. LLaMA-Adapter: the visual tokens
        are added to every layer's prompts, which then pass through the frozen key and value maps.

        Args:
          visual: the ST's output; LaVIN's are input tokens and change nothing here.
          has_image: which rows have one; None with `visual` means all.

        Raises:
          ValueError: this LM has no adapter, or the number of visual tokens is not that of the prompts.
        """
        c = self.config
        if c.adapter is None:
            raise ValueError("this LLaMA has no adapter to steer")
        if isinstance(c.adapter, Router):
            table = self.routing_table()
            if has_image is None:
                raise ValueError("a router needs has_image: which rows have an image")
            return Steer(weights=table[:, has_image.astype(jnp.int32)])
        prompts = self.adapter.tokens.astype(c.dtype)[:, None]
        if visual is not None:
            if visual.shape[1] != c.adapter.prompts:
                raise ValueError(
                    f"the ST gives {visual.shape[1]} tokens for {c.adapter.prompts} prompts: make them equal"
                )
            if has_image is not None:
                visual = jnp.where(has_image[:, None, None], visual, 0)
            prompts = prompts + visual.astype(c.dtype)[None]
        first = c.layers - c.adapter.layers
        if c.scan:
            block, stack = LlamaBlock(c, parent=None), self.variables["params"]["blocks"]
            top = jax.tree.map(lambda leaf: leaf[first:], stack)
            project = jax.vmap(lambda leaf, x: block.apply({"params": leaf}, x, method="keys_values"))
            return Steer(None, *project(top, prompts))
        pairs = [block.keys_values(x) for block, x in zip(self.blocks[first:], prompts, strict=True)]
        return Steer(None, *(jnp.stack(part) for part in zip(*pairs, strict=True)))

    def routing_table(self) -> Float[Array, "L 2 2"]:
        """Returns LaVIN's routing weights of every layer for [text only, with image] (LaVIN, equation 4)."""
        x = self.adapter.modality.astype(self.config.dtype)[:, None]
        zero = jnp.zeros((2, 1), jnp.int32)
        return self._run(x, zero, None, False, None, self.adapter.leaves(), None, None)[2]

    def _leaves(self, steer):
        """The adapter's leaves by layer, or None for the LM without it."""
        if self.config.adapter is not None and self.is_initializing():
            self.adapter.leaves()
        return None if steer is None else self.adapter.leaves()

    def _run(self, x, positions, mask, train, start, leaves, steer, kv):
        """Runs the blocks: (output, cache slots in the form in which they came, routing weights [L b 2] or None)."""
        c = self.config
        turn = rotation(positions, c.head_width, c.rope_theta)
        rows = None if steer is None else tuple(part for part in steer if part is not None)
        if c.scan:
            if isinstance(c.adapter, ZeroInit) and leaves is not None:  # lower layers: a gate of 0
                below = c.layers - c.adapter.layers
                leaves, rows = jax.tree.map(
                    lambda part: jnp.pad(part, [(below, 0)] + [(0, 0)] * (part.ndim - 1)), (leaves, rows)
                )
            x, (kv, weights) = self.blocks(x, turn, mask, train, start, leaves, rows, kv)
            return x, kv, weights
        first = c.layers - c.adapter.layers if isinstance(c.adapter, ZeroInit) else 0
        slots, weights = [], []
        for i, block in enumerate(self.blocks):
            leaf, row = (jax.tree.map(lambda part, i=i: part[i - first], tree) for tree in (leaves, rows))
            if i < first:
                leaf = row = None
            x, (new, w) = block(x, turn, mask, train, start, leaf, row, None if kv is None else kv[i])
            slots.append(new)
            weights.append(w)
        routed = isinstance(c.adapter, Router) and leaves is not None
        return x, None if kv is None else tuple(slots), jnp.stack(weights) if routed else None

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Returns float32 next-token logits."""
        c = self.config
        weight, axis = self.head_weights()
        contract_width = (((2,), (1 - axis,)), ((), ()))
        weight = weight.astype(c.dtype)
        return jax.lax.dot_general(hidden.astype(c.dtype), weight, contract_width, preferred_element_type=jnp.float32)

    def head_weights(self) -> tuple[Float[Array, "_ _"], int]:
        """Returns the head's weights, [d V] or tied [V d], and which of their axes counts the vocabulary."""
        return (self.token_embedding.embedding, 0) if self.config.tied else (self.head.kernel, 1)

    def __call__(
        self, tokens: Int[Array, "b t"], valid: Bool[Array, "b t"] | None = None, train: bool = False
    ) -> Float[Array, "b t V"]:
        """Returns the logits of text alone, by the LM without its adapter."""
        hidden, _ = self.hidden(self.embed(tokens), valid=valid, train=train)
        return self.logits(hidden)

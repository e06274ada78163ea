"""LLaMA (v1, Llama 2, grouped-query attention) with LM_e, LM_block and head callable by themselves, and its adapters.

An adapter adds one subtree, "adapter", and changes the blocks only through what `steer` returns: without it, `hidden`
is the untouched language model.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import LayerLeaves, Steering
from eim_jax.models.hugging_face import (
    TRANSPOSE,
    Row,
    WeightsError,
    check_fixed,
    our_fields,
    their_fields,
)
from eim_jax.models.kv_cache import Cache, visible
from eim_jax.models.language.family import Family
from eim_jax.models.language.llama_block import LlamaBlock, LlamaConfig, make_blocks, rotation
from eim_jax.models.language.llama_meta import META
from eim_jax.models.layers import NORMAL
from eim_jax.models.quant import QDense


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
        if c.adapter is not None:
            self.adapter = c.adapter.lm_parameters(c)

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
        steer: Steering | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns LM_block's output (after norm_f) for input embeddings, and the cache that now holds these tokens.

        Args:
          embeds: token embeddings or the ST's output.
          valid: False for padding, which nothing sees; None means all real.
          positions: of each token; 0..t-1 by default. Must be given with a cache.
          cache: what was read before; these tokens take its next t slots.
          train: dropout (of an adapter) is on; needs the rng "dropout".
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
        x, kv, _ = self.run(
            embeds.astype(c.dtype),
            positions,
            mask=mask,
            train=train,
            start=start,
            leaves=self._leaves(steer),
            steer=steer,
            kv=kv,
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
        """
        c = self.config
        turn = rotation(positions, c.head_width, c.rope_theta)
        # The lowest layer with an adapter.
        first = 0 if leaves is None or c.adapter is None else c.layers - c.adapter.depth(c.layers)
        blocks: Any = self.blocks
        if c.scan:
            if first:  # every layer of a scan has the same arguments: those below get zeros
                leaves, steer = jax.tree.map(
                    lambda part: jnp.pad(part, [(first, 0)] + [(0, 0)] * (part.ndim - 1)), (leaves, steer)
                )
            x, (kv, reports) = blocks(x, turn, mask, train, start, leaves, steer, kv)
            return x, kv, reports
        slots, reports = [], []
        for i, block in enumerate(blocks):
            leaf = row = None
            if i >= first:
                leaf, row = (jax.tree.map(lambda part, i=i: part[i - first], tree) for tree in (leaves, steer))
            x, (new, report) = block(x, turn, mask, train, start, leaf, row, None if kv is None else kv[i])
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


FIELDS = {
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
    "rms_norm_eps": "eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied",
}
# Values that a LLaMA config.json may not change.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _kernel(ours: str, theirs: str) -> Row:
    return Row(f"lm/blocks_{{i}}/{ours}/kernel", (f"model.layers.{{i}}.{theirs}_proj.weight",), TRANSPOSE)


# q and k rows are already in the order of rotated halves, as our RoPE turns them.
ROWS = (
    Row("lm/token_embedding/embedding", ("model.embed_tokens.weight",)),
    Row("lm/blocks_{i}/norm_1/scale", ("model.layers.{i}.input_layernorm.weight",)),
    *(
        _kernel(f"attn/{ours}", f"self_attn.{theirs}")
        for ours, theirs in zip(("q", "k", "v", "out"), "qkvo", strict=True)
    ),
    Row("lm/blocks_{i}/norm_2/scale", ("model.layers.{i}.post_attention_layernorm.weight",)),
    *(_kernel(f"mlp/{name}", f"mlp.{name}") for name in ("gate", "up", "down")),
    Row("lm/norm_f/scale", ("model.norm.weight",)),
)
HEAD = Row("lm/head/kernel", ("lm_head.weight",), TRANSPOSE)  # absent where it is tied


def read_config(theirs: Mapping[str, Any]) -> LlamaConfig:
    """Returns the shape that a LLaMA's config.json states.

    Raises:
      WeightsError: it states what this LLaMA cannot do.
    """
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # transformers 5, transformers 4
    if not isinstance(rope, Mapping):
        raise WeightsError(f"rope_parameters or rope_scaling is {rope!r:.60}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise WeightsError(f"rope_type {kind!r} is not supported, only 'default'")
    partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor")) or 1
    if partial != 1:
        raise WeightsError(f"partial_rotary_factor {partial} is not supported, only 1")
    check_fixed(theirs, FIXED)
    theirs = {**theirs, "rope_theta": rope.get("rope_theta", theirs.get("rope_theta"))}
    try:
        ours = LlamaConfig(**our_fields(theirs, FIELDS, LlamaConfig))
    except ValueError as error:
        raise WeightsError(str(error)) from error
    if theirs.get("head_dim") not in (None, ours.head_width):
        raise WeightsError(
            f"head_dim {theirs['head_dim']} is not hidden_size / num_attention_heads = {ours.head_width}, which is all "
            "that is supported"
        )
    return ours


def write_config(c: LlamaConfig) -> dict[str, Any]:
    """Returns config.json's content; BOS and EOS are 1 and 2."""
    return {
        **their_fields(c, {field: name for field, name in FIELDS.items() if field != "rope_theta"}),
        **FIXED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": c.rope_theta,  # transformers 4
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},  # transformers 5
        "head_dim": c.head_width,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


class LlamaWords:
    """What a plan needs of LLaMA's tokenizer where it is not at hand: BOS, and how many tokens LaVIN's markers have."""

    bos_token_id = 1

    def __call__(self, words: str, add_special_tokens: bool = False) -> dict:
        """Returns {"input_ids": ...} of one of the two markers."""
        return {"input_ids": {"Image: ": [7084, 29901, 29871], "Image: N/A": [7084, 29901, 405, 29914, 29909]}[words]}


LLAMA_FAMILY = Family(
    model_type="llama",
    title="LLaMA",
    build=Llama,
    read=read_config,
    write=write_config,
    rows=lambda config: ROWS if config.tied else (*ROWS, HEAD),
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    published={
        "huggyllama/llama-7b": LlamaConfig(),
        "huggyllama/llama-13b": LlamaConfig(width=5120, layers=40, heads=40, mlp=13824),
    },
    bos=True,
    quantised=r"lm/blocks.*/kernel",
    takes_adapters=True,
    plan_tokenizer=LlamaWords(),
    shards=META,
)

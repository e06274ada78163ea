"""GPT-2 with its three parts callable by themselves (LM_e, LM_block, head) and an explicit key-value cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.hugging_face import (
    FUSED,
    SAME,
    Row,
    WeightsError,
    check_fixed,
    dense_rows,
    norm_rows,
    our_fields,
    their_fields,
)
from eim_jax.models.kv_cache import Cache, visible
from eim_jax.models.language.family import Family
from eim_jax.models.layers import ACTIVATIONS, BlockConfig, layer_norm
from eim_jax.models.packing import Exchange
from eim_jax.models.stacks import make_blocks, run_blocks


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2; the defaults are GPT-2 small.

    Attributes:
      dropout: rate on embeddings, attention weights and both residual branches.
      mlp: hidden width of the blocks' MLPs; 0 for 4 x width.
      scan: stack the blocks' parameters and scan over them.
      remat: "none", "full" or "dots" (stacks.REMAT_POLICIES).
      attention: a name in attention.ATTENTIONS.
    """

    vocab: int = 50257
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    mlp: int = 0
    activation: str = "gelu_new"
    eps: float = 1e-5
    scan: bool = False
    remat: str = "none"
    attention: str = "softmax"
    dtype: DTypeLike = jnp.float32
    model_type: str = "gpt2"

    @property
    def adapter(self) -> None:
        """GPT-2 takes none."""
        return None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: as many as of queries."""
        return self.heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.width // self.heads


class GPT2(nn.Module):
    """GPT-2 language model with a tied head."""

    config: GPT2Config

    def setup(self):  # noqa: D102
        c = self.config
        normal = nn.initializers.normal
        self.token_embedding = nn.Embed(c.vocab, c.width, embedding_init=normal(0.02), dtype=c.dtype)
        self.position_embedding = self.param("position_embedding", normal(0.02), (c.context, c.width))
        self.drop = nn.Dropout(c.dropout)
        block = BlockConfig(
            width=c.width,
            heads=c.heads,
            mlp=c.mlp or 4 * c.width,
            activation=c.activation,
            eps=c.eps,
            dropout=c.dropout,
            residual_init=normal(0.02 * (2 * c.layers) ** -0.5),  # keeps the residual stream's variance with depth
            attention=c.attention,
            dtype=c.dtype,
        )
        self.blocks = make_blocks(block, c.layers, scan=c.scan, remat=c.remat)
        self.ln_f = layer_norm(c.eps, c.dtype)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns the token embeddings alone, without positions: LM_e."""
        return self.token_embedding(tokens)

    def hidden(
        self,
        embeds: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
        packed: Exchange | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns LM_block's output (after ln_f) for input embeddings, and the cache that now holds these tokens.

        Args:
          embeds: token embeddings or the ST's output, without positions.
          valid: False for padding, which nothing sees; None means all real.
          positions: of each token; 0..t-1 by default. Must be given with a cache.
          cache: what was read before; these tokens take its next t slots.
          train: dropout is on; needs the rng "dropout".
          packed: whose slots these are, where samples share rows; then with positions, and without `valid` and cache.

        Raises:
          ValueError: more tokens than positions, or a cache without positions.
        """
        c, (b, t) = self.config, embeds.shape[:2]
        if packed is None and t > c.context:  # of packed rows each sample's own slots were counted
            raise ValueError(f"{t} tokens do not fit GPT-2's context of {c.context}")
        if positions is not None:
            position = self.position_embedding[positions]
        elif cache is None:
            position = self.position_embedding[None, :t]
        else:
            raise ValueError("with a cache the positions of the new tokens must be given")
        x = embeds.astype(c.dtype) + position.astype(c.dtype)
        x = self.drop(x, deterministic=not train)

        mask, flags = visible(cache, valid, b, t) if packed is None else (packed.mask, None)
        if cache is None or flags is None:  # without a cache there are no flags
            x, _ = run_blocks(self.blocks, x, mask=mask, train=train)
            return self.ln_f(x), None
        x, kv = run_blocks(self.blocks, x, mask=mask, train=train, start=cache.length, kv=cache.kv)
        return self.ln_f(x), Cache(kv, flags, cache.length + t)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Returns float32 next-token logits by the tied head."""
        c = self.config
        weight = self.head_weights()[0].astype(c.dtype)
        contract_width = (((2,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden.astype(c.dtype), weight, contract_width, preferred_element_type=jnp.float32)

    def head_weights(self) -> tuple[Float[Array, "V d"], int]:
        """Returns the tied head's weights, and which of their axes counts the vocabulary."""
        return self.token_embedding.embedding, 0

    def __call__(
        self, tokens: Int[Array, "b t"], valid: Bool[Array, "b t"] | None = None, train: bool = False
    ) -> Float[Array, "b t V"]:
        """Returns the logits of text alone."""
        hidden, _ = self.hidden(self.embed(tokens), valid=valid, train=train)
        return self.logits(hidden)


FIELDS = {
    "vocab_size": "vocab",
    "n_positions": "context",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "resid_pdrop": "dropout",  # this one for all three; a run's is config.towers.dropout
    "n_inner": "mlp",
    "activation_function": "activation",
    "layer_norm_epsilon": "eps",
}
# Values that a GPT-2 config.json may not change; their default first.
FIXED = {
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# GPT-2's Conv1D is [in, out], as ours: nothing is transposed.
ROWS = (
    Row("lm/token_embedding/embedding", ("wte.weight",)),
    Row("lm/position_embedding", ("wpe.weight",)),
    *norm_rows("lm/blocks_{i}/ln_1", "h.{i}.ln_1"),
    Row("lm/blocks_{i}/attn/qkv/kernel", ("h.{i}.attn.c_attn.weight",), FUSED),
    Row("lm/blocks_{i}/attn/qkv/bias", ("h.{i}.attn.c_attn.bias",), FUSED),
    *dense_rows("lm/blocks_{i}/attn/out", "h.{i}.attn.c_proj", SAME),
    *norm_rows("lm/blocks_{i}/ln_2", "h.{i}.ln_2"),
    *dense_rows("lm/blocks_{i}/mlp/up", "h.{i}.mlp.c_fc", SAME),
    *dense_rows("lm/blocks_{i}/mlp/down", "h.{i}.mlp.c_proj", SAME),
    *norm_rows("lm/ln_f", "ln_f"),
)


def read_config(theirs: Mapping[str, Any]) -> GPT2Config:
    """Returns the shape that a GPT-2's config.json states.

    Raises:
      WeightsError: it states what this GPT-2 cannot do.
    """
    check_fixed(theirs, FIXED)
    ours = GPT2Config(**our_fields(theirs, FIELDS, GPT2Config))
    if ours.width % ours.heads:
        raise WeightsError(f"n_embd {ours.width} is not a multiple of n_head {ours.heads}")
    if ours.activation not in ACTIVATIONS:
        raise WeightsError(f"activation_function {ours.activation!r} is not one of {sorted(ACTIVATIONS)}")
    return ours


def write_config(c: GPT2Config) -> dict[str, Any]:
    """Returns config.json's content; the last id is declared <|endoftext|>, as in GPT-2."""
    return {
        **their_fields(c, FIELDS),
        **FIXED,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_inner": c.mlp or None,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "bos_token_id": c.vocab - 1,
        "eos_token_id": c.vocab - 1,
    }


_PUBLISHED = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(width=1024, layers=24, heads=16),
    "gpt2-large": GPT2Config(width=1280, layers=36, heads=20),
    "gpt2-xl": GPT2Config(width=1600, layers=48, heads=25),
}

GPT2_FAMILY = Family(
    model_type="gpt2",
    title="GPT-2",
    build=GPT2,
    read=read_config,
    write=write_config,
    rows=lambda config: ROWS,
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
    prefix="transformer.",  # GPT-2 is saved with or without its head, whose keys have it
    published=_PUBLISHED | {f"openai-community/{name}": shape for name, shape in _PUBLISHED.items()},
    has_dropout=True,
)

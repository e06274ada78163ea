"""What a family of language models is to the rest of the package: a decoder module, and a record of facts about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import Adapter
from eim_jax.models.hugging_face import Row
from eim_jax.models.kv_cache import Cache


@runtime_checkable
class DecoderConfig(Protocol):
    """The shape of a decoder LM: a frozen dataclass of its family with at least these fields or properties.

    `model_type` names the family in `FAMILIES`. `scan`, `remat`, `attention` and `dtype` say how it is computed
    (`stacks.Form`); `dropout` is its rate in training, 0.0 where the family has none; `adapter` is None in a family
    that takes none. A family whose logits are capped has a field `logit_cap` (`soft_cap`).
    """

    @property
    def model_type(self) -> str: ...  # noqa: D102
    @property
    def vocab(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_width(self) -> int: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def adapter(self) -> Adapter | None: ...  # noqa: D102
    @property
    def scan(self) -> bool: ...  # noqa: D102
    @property
    def remat(self) -> str: ...  # noqa: D102
    @property
    def attention(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> DTypeLike: ...  # noqa: D102


@runtime_checkable
class DecoderLM(Protocol):
    """A decoder language model as linen module: its parts are called one by one, `lm.apply(variables, x, method=...)`.

    Its `init` takes tokens [b t]. A family that takes adapters has a method `steer(visual, has_image)` too, which
    returns `config.adapter.steer(...)`, and gives what it returned to its blocks when `hidden` gets it. One whose
    `hidden` takes `packed` too (packing.Exchange) can read several samples in one row (`config.data.pack`).
    """

    config: DecoderConfig

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns the token embeddings: LM_e."""
        ...

    def hidden(
        self,
        embeds: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns LM_block's output after its last norm, and the cache that now holds these tokens.

        Args:
          embeds: token embeddings or the ST's output.
          valid: False for padding, which nothing sees; None means all real.
          positions: of each token; 0..t-1 by default, given with a cache.
          cache: what was read before; these tokens take its next t slots (kv_cache.py).
          train: dropout is on; needs the rng "dropout".
        """
        ...

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Returns float32 next-token logits."""
        ...

    def head_weights(self) -> tuple[Float[Array, "_ _"], int]:
        """Returns the head's weights, [d V] or tied [V d], and which of their axes counts the vocabulary."""
        ...


@dataclass(frozen=True)
class Shards:
    """A family's weights as its own authors give them out: a file of sizes beside consolidated.*.pth.

    Attributes:
      sizes: the file's name ("params.json").
      read: (its content, key -> shape in the first shard) -> shape (a DecoderConfig). Raises as `Family.read`.
      rows: shape -> the key table.
      ignored: a regular expression over keys that hold no parameter.
      axis: (key, shape in a shard, the model's shape) -> the axis along which shards are joined, or None.
    """

    sizes: str
    read: Callable[[Mapping[str, Any], Callable[[str], tuple[int, ...]]], Any]
    rows: Callable[[Any], tuple[Row, ...]]
    ignored: str
    axis: Callable[[str, tuple[int, ...], Any], int | None]


@dataclass(frozen=True)
class Family:
    r"""Everything that tells one family of language models from another; an entry of `FAMILIES`.

    Attributes:
      model_type: config.json's name for the family, and the shape's own `model_type`.
      title: the family's name in messages: "GPT-2".
      build: shape -> module (a DecoderLM).
      read: config.json's content -> shape (a DecoderConfig). Raises WeightsError for a field that is not supported;
        the caller puts the file's name in front.
      write: shape -> config.json's content, as transformers reads it.
      rows: shape -> its key table. The embedding is "lm/token_embedding/embedding", blocks are "lm/blocks_{i}/...". A
        table without the key "lm_head.weight" says that the head is tied: a file that holds it all the same must
        repeat the embedding.
      ignored: a regular expression over keys of the file that hold no parameter.
      prefix: what may stand before every key of the file, and does in what is written ("transformer.").
      published: hub ids -> shapes, for `--mode=plan` where config.json is not at hand.
      quantised: a regular expression over our paths: the kernels that towers.quant holds in 4 bits, as
        `quant.QDense` does by the shape's field `quant`; "" for a family that cannot.
      has_dropout: the shape has a field `dropout`, which towers.dropout sets.
      takes_adapters: the shape has a field `adapter`, which config.arm.*.adapter sets.
      shards: how its authors give it out, beside Hugging Face's form; None where that is the only one.
      stated: shape -> the one by which its files are written: the biases that a folded adapter leaves may make it
        another family's.
      plan_tokenizer: stands in for the tokenizer in `--mode=plan` where none is at hand; None where a plan needs none.
    """

    model_type: str
    title: str
    build: Callable[[Any], nn.Module]
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], tuple[Row, ...]]
    ignored: str = r"(?!)"
    prefix: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    quantised: str = ""
    has_dropout: bool = False
    takes_adapters: bool = False
    stated: Callable[[Any], Any] = lambda shape: shape
    plan_tokenizer: Any = None
    shards: Shards | None = None

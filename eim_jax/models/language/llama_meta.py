"""LLaMA as Meta gives it out: params.json and consolidated.*.pth, whose RoPE turns adjacent pairs."""

from collections.abc import Callable, Mapping
from typing import Any

from eim_jax.models.hugging_face import SAME, TRANSPOSE, Layout, Row, WeightsError, our_fields
from eim_jax.models.language.family import Shards
from eim_jax.models.language.llama_block import LlamaConfig

_FIELDS = {
    "dim": "width",
    "n_layers": "layers",
    "n_heads": "heads",
    "n_kv_heads": "kv_heads",
    "norm_eps": "eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "context",
}
_NEEDED = ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of")
_EMBEDDING = "tok_embeddings.weight"
_IGNORED = r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs"


def read_params(params: Mapping[str, Any], shape_of: Callable[[str], tuple[int, ...]]) -> LlamaConfig:
    """Returns the shape that a params.json states; the context, which it does not, is LLaMA's 2048.

    Args:
      params: its content.
      shape_of: key -> its shape in the first shard: the vocabulary's size is there, where params.json says -1.

    Raises:
      WeightsError: it states what this LLaMA cannot do, or leaves out a size.
    """
    if missing := [field for field in _NEEDED if params.get(field) is None]:
        raise WeightsError(f"{', '.join(missing)} is missing; download the file again")
    if params.get("use_scaled_rope"):
        raise WeightsError("use_scaled_rope is not supported (Llama 3.1 and later)")
    fields = our_fields(params, _FIELDS, LlamaConfig)
    multiple = our_fields(params, {"multiple_of": "mlp"}, LlamaConfig)["mlp"]
    factor = params.get("ffn_dim_multiplier", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 100:
        raise WeightsError(f"ffn_dim_multiplier is {factor!r:.60}, not a number above 0")
    hidden = int(factor * int(2 * 4 * fields["width"] / 3))
    vocab = params.get("vocab_size", -1)
    vocab = shape_of(_EMBEDDING)[0] if vocab == -1 else vocab
    fields |= our_fields({"vocab_size": vocab}, {"vocab_size": "vocab"}, LlamaConfig)
    try:
        return LlamaConfig(**fields, mlp=-(-hidden // multiple) * multiple)
    except ValueError as error:
        raise WeightsError(str(error)) from error


def rows(config: LlamaConfig) -> tuple[Row, ...]:
    """Returns the key table."""

    def block(ours: str, theirs: str, layout: Layout = TRANSPOSE) -> Row:
        return Row(f"lm/blocks_{{i}}/{ours}/kernel", (f"layers.{{i}}.{theirs}.weight",), layout)

    return (
        Row("lm/token_embedding/embedding", (_EMBEDDING,)),
        Row("lm/blocks_{i}/norm_1/scale", ("layers.{i}.attention_norm.weight",)),
        block("attn/q", "attention.wq", _pairs(config.heads)),
        block("attn/k", "attention.wk", _pairs(config.kv_heads)),
        block("attn/v", "attention.wv"),
        block("attn/out", "attention.wo"),
        Row("lm/blocks_{i}/norm_2/scale", ("layers.{i}.ffn_norm.weight",)),
        block("mlp/gate", "feed_forward.w1"),
        block("mlp/down", "feed_forward.w2"),
        block("mlp/up", "feed_forward.w3"),
        Row("lm/norm_f/scale", ("norm.weight",), SAME),
        Row("lm/head/kernel", ("output.weight",), TRANSPOSE),
    )


def _pairs(heads: int) -> Layout:
    """Rows (2i, 2i+1) of a head, which Meta's RoPE turns together, become rows (i, i + e/2), which ours turns."""

    def load(arrays):
        [w] = arrays
        return w.reshape(heads, -1, 2, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape).T

    def save(x):
        w = x.T
        return [w.reshape(heads, 2, -1, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape)]

    return Layout(load, save)


def _axis(key: str, shape: tuple[int, ...], config: LlamaConfig) -> int | None:
    """Along which axis the shards of a key are joined; None where each holds the whole."""
    if len(shape) < 2:
        return None
    if key == _EMBEDDING:  # split by width, from Llama 3 on by words
        return 0 if shape[1] == config.width else 1
    return 1 if key.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0


META = Shards(sizes="params.json", read=read_params, rows=rows, ignored=_IGNORED, axis=_axis)

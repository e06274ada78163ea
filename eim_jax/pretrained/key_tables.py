"""By one table a model: which keys of a Hugging Face checkpoint make which of our leaves, and how."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How their arrays become one of ours, and back."""

    load: Callable[[list[np.ndarray]], np.ndarray]
    save: Callable[[np.ndarray], list[np.ndarray]]


SAME = Layout(lambda a: a[0], lambda x: [x])
TRANSPOSE = Layout(lambda a: a[0].T, lambda x: [x.T])  # torch.nn.Linear is [out, in]
# Query, key and value maps as one kernel [in, 3, out] and bias [3, out]: from three layers, or from one of 3 x out.
FUSE_KERNEL = Layout(lambda a: np.stack([x.T for x in a], axis=1), lambda x: [x[:, i].T for i in range(3)])
FUSE_BIAS = Layout(np.stack, list)
FUSED = Layout(
    lambda a: a[0].reshape(*a[0].shape[:-1], 3, a[0].shape[-1] // 3),
    lambda x: [x.reshape(*x.shape[:-2], 3 * x.shape[-1])],
)
PATCHES = Layout(lambda a: a[0].transpose(2, 3, 1, 0), lambda x: [x.transpose(3, 2, 0, 1)])  # [out, 3, p, p]


class Row(NamedTuple):
    """One of our leaves (with {i} for the layer) and the keys that make it."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", (f"{theirs}.weight",)), Row(f"{ours}/bias", (f"{theirs}.bias",))]


def _dense(ours: str, theirs: str, layout: Layout = TRANSPOSE) -> list[Row]:
    return [Row(f"{ours}/kernel", (f"{theirs}.weight",), layout), Row(f"{ours}/bias", (f"{theirs}.bias",))]


def _clip_blocks(tower: str, model: str) -> list[Row]:
    ours, theirs = f"{tower}/blocks_{{i}}", f"{model}.encoder.layers.{{i}}"
    qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
    return [
        *_norm(f"{ours}/ln_1", f"{theirs}.layer_norm1"),
        Row(f"{ours}/attn/qkv/kernel", tuple(f"{x}.weight" for x in qkv), FUSE_KERNEL),
        Row(f"{ours}/attn/qkv/bias", tuple(f"{x}.bias" for x in qkv), FUSE_BIAS),
        *_dense(f"{ours}/attn/out", f"{theirs}.self_attn.out_proj"),
        *_norm(f"{ours}/ln_2", f"{theirs}.layer_norm2"),
        *_dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *_dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


CLIP_TABLE = (
    Row("visual/class_embedding", ("vision_model.embeddings.class_embedding",)),
    Row("visual/patch_embedding/kernel", ("vision_model.embeddings.patch_embedding.weight",), PATCHES),
    Row("visual/position_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    *_norm("visual/pre_ln", "vision_model.pre_layrnorm"),  # spelt so in every checkpoint
    *_clip_blocks("visual", "vision_model"),
    *_norm("visual/post_ln", "vision_model.post_layernorm"),
    Row("visual/projection/kernel", ("visual_projection.weight",), TRANSPOSE),
    Row("text/token_embedding/embedding", ("text_model.embeddings.token_embedding.weight",)),
    Row("text/position_embedding", ("text_model.embeddings.position_embedding.weight",)),
    *_clip_blocks("text", "text_model"),
    *_norm("text/final_ln", "text_model.final_layer_norm"),
    Row("text/projection/kernel", ("text_projection.weight",), TRANSPOSE),
)
CLIP_IGNORED = r"(vision|text)_model\.embeddings\.position_ids"  # 0, 1, 2, ...


def _kernel(ours: str, theirs: str) -> Row:
    return Row(f"lm/blocks_{{i}}/{ours}/kernel", (f"model.layers.{{i}}.{theirs}_proj.weight",), TRANSPOSE)


# GPT-2's Conv1D is [in, out], as ours: nothing is transposed.
GPT2_TABLE = (
    Row("lm/token_embedding/embedding", ("wte.weight",)),
    Row("lm/position_embedding", ("wpe.weight",)),
    *_norm("lm/blocks_{i}/ln_1", "h.{i}.ln_1"),
    Row("lm/blocks_{i}/attn/qkv/kernel", ("h.{i}.attn.c_attn.weight",), FUSED),
    Row("lm/blocks_{i}/attn/qkv/bias", ("h.{i}.attn.c_attn.bias",), FUSED),
    *_dense("lm/blocks_{i}/attn/out", "h.{i}.attn.c_proj", SAME),
    *_norm("lm/blocks_{i}/ln_2", "h.{i}.ln_2"),
    *_dense("lm/blocks_{i}/mlp/up", "h.{i}.mlp.c_fc", SAME),
    *_dense("lm/blocks_{i}/mlp/down", "h.{i}.mlp.c_proj", SAME),
    *_norm("lm/ln_f", "ln_f"),
)
GPT2_IGNORED = r"h\.\d+\.attn\.(bias|masked_bias)"  # the causal mask

# q and k rows are already in the order of rotated halves, as our RoPE turns them.
LLAMA_TABLE = (
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
LLAMA_HEAD = Row("lm/head/kernel", ("lm_head.weight",), TRANSPOSE)  # absent where it is tied
LLAMA_IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


class Leaf(NamedTuple):
    """What fills one leaf of ours."""

    keys: list[tuple[str, ...]]  # one tuple a layer; a single one for leaves that are not stacked
    layout: Layout
    stacked: bool


def table_leaves(table: tuple[Row, ...], layers: Mapping[str, int], scan: bool) -> dict[str, Leaf]:
    """Returns our paths -> what fills them, for towers of the given depths."""
    leaves = {}
    for row in table:
        if "{i}" not in row.ours:
            leaves[row.ours] = Leaf([row.theirs], row.layout, stacked=False)
            continue
        keys = [tuple(k.replace("{i}", str(i)) for k in row.theirs) for i in range(layers[row.ours.split("/")[0]])]
        if scan:
            leaves[row.ours.replace("blocks_{i}", "blocks")] = Leaf(keys, row.layout, stacked=True)
        else:
            for i, k in enumerate(keys):
                leaves[row.ours.replace("{i}", str(i))] = Leaf([k], row.layout, stacked=False)
    return leaves

"""Meta's LLaMA files, LLaMA-Adapter's and LaVIN's trained leaves, and OpenAI's CLIP, under our paths."""

import numpy as np
from authors import dense, norm


def meta_llama(held: dict, layers: int, heads: int) -> dict[str, np.ndarray]:
    """consolidated.00.pth; float16 values, of which float32 is made.

    Meta's RoPE turns adjacent pairs of a head's rows, ours halves: rows 0, 2, 4, ... come first.
    """

    def halves(weight: np.ndarray) -> np.ndarray:
        out, width = weight.shape
        pairs = weight.reshape(heads, out // heads // 2, 2, width)
        return pairs.transpose(0, 2, 1, 3).reshape(out, width)

    found = {
        "lm/token_embedding/embedding": held["tok_embeddings.weight"],
        "lm/norm_f/scale": held["norm.weight"],
        "lm/head/kernel": held["output.weight"].T,
    }
    for i in range(layers):
        theirs, ours = f"layers.{i}", f"lm/blocks_{i}"
        for name, turn in (("q", halves), ("k", halves), ("v", np.asarray)):
            found[f"{ours}/attn/{name}/kernel"] = turn(held[f"{theirs}.attention.w{name}.weight"]).T
        found[f"{ours}/attn/out/kernel"] = held[f"{theirs}.attention.wo.weight"].T
        for name, number in (("gate", 1), ("down", 2), ("up", 3)):
            found[f"{ours}/mlp/{name}/kernel"] = held[f"{theirs}.feed_forward.w{number}.weight"].T
        found[f"{ours}/norm_1/scale"] = held[f"{theirs}.attention_norm.weight"]
        found[f"{ours}/norm_2/scale"] = held[f"{theirs}.ffn_norm.weight"]
    return found


def prompts_and_gates(held: dict, layers: int, prompts: int, first: int) -> dict[str, np.ndarray]:
    """LLaMA-Adapter's trained leaves; layers below `first` have a gate that nothing reads."""
    gates = [held[f"layers.{first + i}.attention.gate"].reshape(-1) for i in range(layers)]
    return {
        "lm/adapter/tokens": held["adapter_query.weight"].reshape(layers, prompts, -1),
        "lm/adapter/gate": np.stack(gates),
    }


def lavin_leaves(held: dict, layers: int, blocks: int) -> dict[str, np.ndarray]:
    """The 93 leaves that LaVIN trains, without "module."."""
    towers = (
        ("lm", [f"layers.{i}" for i in range(layers)]),
        ("visual", [f"backbone.visual.transformer.resblocks.{i}" for i in range(blocks)]),
    )
    found = {"lm/adapter/modality": held["adapter_modality_embedding.weight"]}
    found |= dense(held, "adapter_proj.conv_A", "st/up") | dense(held, "adapter_proj.conv_B", "st/down")
    for tower, roots in towers:
        each = [_router({name: held[f"{root}.adapter_attn.{name}"] for name in _ROUTER}) for root in roots]
        found |= {f"{tower}/adapter/{path}": np.stack([one[path] for one in each]) for path in each[0]}
    return found


_ROUTER = [f"{part}.{leaf}" for part in ("conv_A", "conv_B", "conv_D", "expert_weights") for leaf in ("weight", "bias")]


def _router(leaf: dict) -> dict[str, np.ndarray]:
    """One adapter: grouped convolutions of size 1 are matrices, a block a group."""

    def up(name: str) -> np.ndarray:
        out, inside, _ = leaf[f"{name}.weight"].shape
        return leaf[f"{name}.weight"].reshape(2, out // 2, inside).transpose(0, 2, 1)

    return {
        "down/kernel": leaf["conv_A.weight"][:, :, 0].T,
        "down/bias": leaf["conv_A.bias"],
        "up/kernel": np.stack([up("conv_B"), up("conv_D")]),
        "up/bias": np.stack([leaf["conv_B.bias"], leaf["conv_D.bias"]]),
        "router/kernel": leaf["expert_weights.weight"].T,
        "router/bias": leaf["expert_weights.bias"],
    }


def openai_vision(held: dict, blocks: int) -> dict[str, np.ndarray]:
    """The vision tower of OpenAI's CLIP."""
    found = {
        "visual/class_embedding": held["visual.class_embedding"],
        "visual/position_embedding": held["visual.positional_embedding"],
        "visual/patch_embedding/kernel": held["visual.conv1.weight"].transpose(2, 3, 1, 0),
        "visual/projection/kernel": held["visual.proj"],
        **norm(held, "visual.ln_pre", "visual/pre_ln"),
        **norm(held, "visual.ln_post", "visual/post_ln"),
    }
    for i in range(blocks):
        theirs, ours = f"visual.transformer.resblocks.{i}", f"visual/blocks_{i}"
        found |= norm(held, f"{theirs}.ln_1", f"{ours}/ln_1") | norm(held, f"{theirs}.ln_2", f"{ours}/ln_2")
        weight, width = held[f"{theirs}.attn.in_proj_weight"], held[f"{theirs}.attn.in_proj_weight"].shape[1]
        found[f"{ours}/attn/qkv/kernel"] = weight.reshape(3, width, width).transpose(2, 0, 1)
        found[f"{ours}/attn/qkv/bias"] = held[f"{theirs}.attn.in_proj_bias"].reshape(3, width)
        found |= dense(held, f"{theirs}.attn.out_proj", f"{ours}/attn/out")
        found |= dense(held, f"{theirs}.mlp.c_fc", f"{ours}/mlp/up") | dense(
            held, f"{theirs}.mlp.c_proj", f"{ours}/mlp/down"
        )
    return found

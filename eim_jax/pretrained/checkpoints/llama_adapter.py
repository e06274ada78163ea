"""LLaMA-Adapter's checkpoints: `adapter_query` and a gate a layer (v1), with v2's visual part where the file has it.

v1's files hold gates of the layers below the prompts too, which nothing reads. v2 may train biases, scales and norms
inside LLaMA, which ours lacks: such a file is refused by these keys.
"""

import re
from collections.abc import Collection

from eim_jax.models.hugging_face import FUSED, Layout, Row, dense_rows, norm_rows
from eim_jax.pretrained.checkpoints.form import Content, Form, Target, count, other_tower
from eim_jax.pretrained.reader import Leaf, leaves_of

_QUERY = "adapter_query.weight"
_BLOCKS = "visual_blocks."
_AT = f"{_BLOCKS}{{i}}."
# torch.nn.Linear's [3 d, d] as our kernel [in, 3, out].
_QKV = Layout(lambda a: FUSED.load([a[0].T]), lambda x: [FUSED.save(x)[0].T])
_GATE = Layout(lambda a: a[0].reshape(-1), lambda x: [x.reshape(1, -1, 1, 1)])
_VISUAL = (
    *dense_rows("st/down", "clip_proj"),
    *norm_rows("st/ln_in", "clip_proj_norm"),
    Row("st/queries", ("visual_query.weight",)),
    *norm_rows("st/blocks_{i}/ln_1", f"{_AT}norm1"),
    Row("st/blocks_{i}/attn/qkv/kernel", (f"{_AT}attn.qkv.weight",), _QKV),
    Row("st/blocks_{i}/attn/qkv/bias", (f"{_AT}attn.qkv.bias",), FUSED),
    *dense_rows("st/blocks_{i}/attn/out", f"{_AT}attn.proj"),
    *norm_rows("st/blocks_{i}/ln_2", f"{_AT}norm2"),
    *dense_rows("st/blocks_{i}/mlp/up", f"{_AT}mlp.fc1"),
    *dense_rows("st/blocks_{i}/mlp/down", f"{_AT}mlp.fc2"),
    *dense_rows("st/up", "visual_proj"),
    *norm_rows("st/ln_out", "visual_proj_norm"),
)


def _has_visual(content: Content) -> bool:
    return "visual_query.weight" in content.shapes


def _before_layers(content: Content) -> str:
    """v2 keeps LLaMA in a part of its own."""
    return "llama." if any(key.startswith("llama.layers.") for key in content.shapes) else ""


def _depth(keys: Collection[str]) -> int:
    """The number of LLaMA's layers by its highest gate: of the lower ones a file may have none."""
    numbers = (re.fullmatch(r"(?:llama\.)?layers\.(\d+)\.attention\.gate", key) for key in keys)
    return max((1 + int(found[1]) for found in numbers if found), default=0)


def _leaves(content: Content, target: Target) -> dict[str, Leaf]:
    tokens = target.shapes["lm/adapter/tokens"].shape
    layout = Layout(lambda a: a[0].reshape(tokens), lambda x: [x.reshape(-1, x.shape[-1])])
    first, before = target.lm.layers - tokens[0], _before_layers(content)
    gates: list[tuple[str, ...]] = [(f"{before}layers.{i}.attention.gate",) for i in range(first, target.lm.layers)]
    leaves = {"lm/adapter/tokens": Leaf([(_QUERY,)], layout, False), "lm/adapter/gate": Leaf(gates, _GATE, True)}
    if _has_visual(content):
        leaves |= leaves_of(_VISUAL, {"st": count(content.shapes, _BLOCKS)}, scan=False)
    return leaves


def _problems(content: Content, target: Target) -> list[str]:
    shapes, arm = content.shapes, target.arm
    found = target.differs("adapter", "prompts", "the file holds LLaMA-Adapter's prompts")
    if found:
        return found
    if len(prompts := shapes[_QUERY]) == 2:
        found += other_tower(target.lm, "lm", prompts[1], _depth(shapes) or target.lm.layers)
        held = arm.st_tokens * arm.adapter_layers
        if prompts[0] != held:
            found.append(
                f"{_QUERY} holds {prompts[0]} prompts, and config.arm.{target.name}.st_tokens={arm.st_tokens} times "
                f"adapter_layers={arm.adapter_layers} is {held}: set both as it was trained"
            )
    if _has_visual(content):
        found += target.differs("st", "queries", "the file has LLaMA-Adapter's visual part")
        found += target.differs("st_hidden", shapes["visual_query.weight"][-1], "its visual part has another width")
        found += target.differs("st_layers", count(shapes, _BLOCKS), "its visual part has another number of blocks")
    gate = next((shape for key, shape in shapes.items() if key.endswith("attention.gate")), (1, 1, 1, 1))
    if len(gate) != 4 or (gate[1] == 1 and target.lm.heads > 1):
        found.append(
            f"its gates have the shape {gate}, one number a layer: the first release of March 2023, whose gates are no "
            "tanh; take the current file"
        )
    tuned = [
        key for key in shapes if re.fullmatch(r"(llama\.)?(layers\.\d+\..*|norm)\.(bias|scale|lora.*|weight)", key)
    ]
    if tuned:
        found.append(
            f"it tunes {len(tuned)} tensors of LLaMA itself (v2's biases, scales, norms or LoRA; the first is "
            f"{tuned[0]!r}), which our LLaMA lacks: take a file that was trained without them"
        )
    return found


def _ignored(content: Content, target: Target) -> str:
    below = range(target.lm.layers - target.shapes["lm/adapter/tokens"].shape[0])
    return "|".join(re.escape(f"{_before_layers(content)}layers.{i}.attention.gate") for i in below) or r"(?!)"


LLAMA_ADAPTER = Form(
    title="LLaMA-Adapter's checkpoint",
    fits=lambda keys: _QUERY in keys,
    leaves=_leaves,
    problems=_problems,
    ignored=_ignored,
    lacking=lambda content: "" if _has_visual(content) else "st/",
)

"""Our own trained.safetensors (--mode=export): every leaf that training changed or added, by our paths.

Blocks may be stacked in the file (towers.scan) and not here, or the other way round. The arm.json beside it names what
the shapes cannot say: the arm's settings, and which towers the leaves belong to.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from eim_jax.models.connector import ST_KINDS
from eim_jax.models.hugging_face import SAME, Layout
from eim_jax.pretrained.checkpoints.form import Content, Form, Target
from eim_jax.pretrained.reader import Leaf

# Of the arm: how it was trained, not what it is.
_FREE = ("description", "sequence", "adapter_dropout", "lora_dropout", "st_bias")
_STACKED = r"(\w+)/blocks/(.*)"


def _leaves(content: Content, target: Target) -> dict[str, Leaf]:
    """Every path of the file that we have, also where blocks are stacked in one of the two alone."""
    leaves: dict[str, Leaf] = {}
    unstacked: dict[str, dict[int, str]] = {}
    for key, shape in content.shapes.items():
        stacked, single = re.fullmatch(_STACKED, key), re.fullmatch(r"(\w+)/blocks_(\d+)/(.*)", key)
        if key in target.shapes:
            leaves[key] = Leaf([(key,)], SAME, False)
        elif stacked and f"{stacked[1]}/blocks_0/{stacked[2]}" in target.shapes:
            for layer in range(shape[0]):
                path = f"{stacked[1]}/blocks_{layer}/{stacked[2]}"
                leaves[path] = Leaf([(key,)], _layer(layer, shape[0]), False)
        elif single and f"{single[1]}/blocks/{single[3]}" in target.shapes:
            unstacked.setdefault(f"{single[1]}/blocks/{single[3]}", {})[int(single[2])] = key
    for path, layers in unstacked.items():
        leaves[path] = Leaf(
            [(layers.get(i, f"{path} of layer {i}"),) for i in range(target.shapes[path].shape[0])], SAME, True
        )
    return leaves


def _layer(layer: int, layers: int) -> Layout:
    """One layer of a stacked leaf."""
    return Layout(lambda a: a[0][layer], lambda x: [np.broadcast_to(x[None], (layers, *x.shape))])


def _problems(content: Content, target: Target) -> list[str]:
    model, found = content.record.get("model", {}), []
    if not isinstance(model, Mapping):
        return [f"the arm.json beside it is damaged: its model is {model!r:.60}; export the arm again"]
    for name, value in model.items():
        if name not in _FREE and hasattr(target.arm, name) and _is_read(name, model):
            found += target.differs(name, value, "the arm.json beside the file says otherwise")
    return found


def _is_read(name: str, model: Mapping[str, Any]) -> bool:
    """Whether an arm of these settings computes anything by one of them."""
    kind = ST_KINDS.get(str(model.get("st")))
    if name in ("st_layers", "st_heads") and kind is not None:
        return any(kind.depth)
    if name == "st_hidden" and kind is not None:
        return kind.sized_by_arm
    if name.startswith("adapter_"):
        return model.get("adapter") != "none"
    if name.startswith("lora"):
        return bool(model.get("lora")) and name != "lora"  # which layers have terms is said by the leaves
    return name != "prompt_hidden" or bool(model.get("prompts"))


def _fits(keys: Collection[str]) -> bool:
    return bool(keys) and all(re.match(r"(st|lm|visual|text)/", key) for key in keys)


OURS = Form("an export of this package", fits=_fits, leaves=_leaves, problems=_problems)

"""LaVIN's checkpoint-N.pth: router adapters of LLaMA and CLIP, the projector and the modality embedding.

`args`, their command line, stands beside them: what it says and shapes cannot is compared with the config.
"""

import re
from collections.abc import Collection

import numpy as np

from eim_jax.models.hugging_face import SAME, TRANSPOSE, Layout, dense_rows
from eim_jax.pretrained.checkpoints.form import Content, Form, Target, count, other_tower
from eim_jax.pretrained.reader import Leaf, leaves_of

_BLOCKS = "backbone.visual.transformer.resblocks."
_LM, _VISUAL = "layers.{}.adapter_attn.", f"{_BLOCKS}{{}}.adapter_attn."
_MODALITY = "adapter_modality_embedding.weight"
_DOWN = Layout(lambda a: a[0][..., 0].T, lambda x: [x.T[..., None]])  # a convolution of kernel size 1: [r, d, 1]


def _up(groups: int) -> Layout:
    """Both paths' grouped convolutions [d, r/G, 1] as one leaf [2 G r/G d/G]."""

    def load(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack([a[..., 0].reshape(groups, -1, a.shape[1]).transpose(0, 2, 1) for a in arrays])

    def save(ours: np.ndarray) -> list[np.ndarray]:
        return [x.transpose(0, 2, 1).reshape(-1, x.shape[1])[..., None] for x in ours]

    return Layout(load, save)


_BIASES = Layout(np.stack, list)


def _adapters(tower: str, keys: str, layers: int, groups: int) -> dict[str, Leaf]:
    """What fills one tower's adapters; every leaf has an axis of layers, whether the tower is scanned or not."""

    def leaf(names: tuple[str, ...], layout: Layout) -> Leaf:
        return Leaf([tuple(keys.format(i) + name for name in names) for i in range(layers)], layout, True)

    at = f"{tower}/adapter/"
    return {
        f"{at}router/kernel": leaf(("expert_weights.weight",), TRANSPOSE),
        f"{at}router/bias": leaf(("expert_weights.bias",), SAME),
        f"{at}down/kernel": leaf(("conv_A.weight",), _DOWN),
        f"{at}down/bias": leaf(("conv_A.bias",), SAME),
        f"{at}up/kernel": leaf(("conv_B.weight", "conv_D.weight"), _up(groups)),
        f"{at}up/bias": leaf(("conv_B.bias", "conv_D.bias"), _BIASES),
    }


def _leaves(content: Content, target: Target) -> dict[str, Leaf]:
    groups = target.lm.adapter.groups
    rows = (*dense_rows("st/up", "adapter_proj.conv_A"), *dense_rows("st/down", "adapter_proj.conv_B"))
    leaves = leaves_of(rows, {}, scan=False)
    leaves["lm/adapter/modality"] = Leaf([(_MODALITY,)], SAME, False)
    leaves |= _adapters("lm", _LM, target.lm.layers, groups)
    if target.arm.visual_adapter:
        leaves |= _adapters("visual", _VISUAL, target.visual.layers, groups)
    return leaves


def _problems(content: Content, target: Target) -> list[str]:
    shapes = content.shapes
    found = target.differs("adapter", "lavin", "the file holds LaVIN's adapters")
    found += target.differs("st", "projector", "the file holds LaVIN's projector")
    found += target.differs("features", "blocks", "LaVIN's image tokens are [CLS] of every fourth block")
    found += target.differs(
        "visual_adapter", any(key.startswith("backbone.visual.") for key in shapes), "the file says so by its keys"
    )
    if found:
        return found
    width = shapes.get(_MODALITY, (target.lm.width,))[-1]
    found += other_tower(target.lm, "lm", width, count(shapes, "layers."))
    if target.arm.visual_adapter:
        seen = shapes.get(f"{_VISUAL.format(0)}conv_A.weight", (0, target.visual.width))[1]
        found += other_tower(target.visual, "clip", seen, count(shapes, _BLOCKS))
    ranks = {shape[0] for key, shape in shapes.items() if key.endswith("conv_A.weight") and "adapter_attn" in key}
    if len(ranks) == 1:
        found += target.differs("adapter_rank", ranks.pop(), "the file's adapters have another rank")
    found += target.differs(
        "st_hidden", shapes.get("adapter_proj.conv_A.weight", (0,))[0], "the file's projector has another width"
    )
    return found + _settings(content, target)


def _settings(content: Content, target: Target) -> list[str]:
    """Lines on what their command line says otherwise."""
    args, found = content.settings, []
    if "temperature" in args:
        found += target.differs("adapter_temperature", float(args["temperature"]), "it was trained with another")
    for name, ours in (("adapter_type", "attn"), ("visual_adapter_type", "router"), ("adapter_scale", 1.0)):
        field = getattr(target.arm, name, ours)  # where this version has such a field, it says what ours is
        if (
            name in args
            and args[name] != field
            and not (name == "visual_adapter_type" and not target.arm.visual_adapter)
        ):
            found.append(f"it was trained with --{name}={args[name]}, and this arm has {field}")
    return found


def _fits(keys: Collection[str]) -> bool:
    return _MODALITY in keys or any(re.fullmatch(r"layers\.\d+\.adapter_attn\..*", key) for key in keys)


LAVIN = Form(
    title="LaVIN's checkpoint",
    fits=_fits,
    leaves=_leaves,
    problems=_problems,
    made_with={"data.fit": "stretch", "towers.image_stats": "imagenet"},
)

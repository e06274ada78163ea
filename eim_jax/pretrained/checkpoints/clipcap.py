"""ClipCap's checkpoints: `clip_project.*`, its MLP or its Transformer, and `gpt.*`, GPT-2 as transformers 4 saved it.

A file without `gpt.*` holds the mapper alone: then the language model is config.towers.lm's.
"""

import re

import numpy as np

from eim_jax.models.hugging_face import TRANSPOSE, Layout, Row, dense_rows, norm_rows
from eim_jax.models.language import family_of
from eim_jax.pretrained.checkpoints.form import Content, Form, Target, count, lm_leaves
from eim_jax.pretrained.reader import Leaf, leaves_of

_GPT, _MAPPER = "gpt.transformer.", "clip_project."
_BLOCKS = f"{_MAPPER}transformer.layers."
_RN50X4 = 640  # the width of the image features of the one ResNet that ClipCap was trained with

# to_queries is [d, d]; to_keys_values [2 d, d] has the keys first. Ours is one kernel [in, 3, out].
_QKV = Layout(
    lambda a: np.stack([x.T for x in (a[0], *np.split(a[1], 2))], axis=1),
    lambda x: [x[:, 0].T, np.concatenate([x[:, 1].T, x[:, 2].T])],
)
_MLP = (*dense_rows("st/up", f"{_MAPPER}model.0"), *dense_rows("st/down", f"{_MAPPER}model.2"))
_AT = f"{_BLOCKS}{{i}}."
_TRANSFORMER = (
    *dense_rows("st/linear", f"{_MAPPER}linear"),
    Row("st/constant", (f"{_MAPPER}prefix_const",)),
    *norm_rows("st/blocks_{i}/ln_1", f"{_AT}norm1"),
    Row("st/blocks_{i}/attn/qkv/kernel", (f"{_AT}attn.to_queries.weight", f"{_AT}attn.to_keys_values.weight"), _QKV),
    *dense_rows("st/blocks_{i}/attn/out", f"{_AT}attn.project", TRANSPOSE),
    *norm_rows("st/blocks_{i}/ln_2", f"{_AT}norm2"),
    *dense_rows("st/blocks_{i}/mlp/up", f"{_AT}mlp.fc1"),
    *dense_rows("st/blocks_{i}/mlp/down", f"{_AT}mlp.fc2"),
)


def _is_mlp(content: Content) -> bool:
    return f"{_MAPPER}prefix_const" not in content.shapes


def _leaves(content: Content, target: Target) -> dict[str, Leaf]:
    rows = _MLP if _is_mlp(content) else _TRANSFORMER
    leaves = leaves_of(rows, {"st": count(content.shapes, _BLOCKS)}, scan=False)
    return leaves | (lm_leaves(target, _GPT) if _has_gpt(content) else {})


def _has_gpt(content: Content) -> bool:
    return any(key.startswith("gpt.") for key in content.shapes)


def _problems(content: Content, target: Target) -> list[str]:
    shapes, arm, width = content.shapes, target.arm, target.lm.width
    kind = "mlp" if _is_mlp(content) else "transformer"
    found = target.differs("st", kind, f"the file holds ClipCap's {kind} mapper")
    found += target.differs("features", "cls", "ClipCap maps the image's one feature")
    found += target.differs("output_layer", True, "ClipCap maps CLIP's projected feature")
    first = shapes.get(f"{_MAPPER}model.0.weight" if _is_mlp(content) else f"{_MAPPER}linear.weight", ())
    if len(first) == 2 and arm.output_layer and first[1] != target.visual.joint:
        resnet = first[1] == _RN50X4
        found.append(
            f"its image features are {first[1]} wide{' as those of RN50x4' * resnet}, and those of config.towers.clip "
            f"{target.visual.joint}: "
            + (
                "CLIP's ResNets are not supported, take a file that was made with a ViT"
                if resnet
                else "set config.towers.clip to the CLIP that it was trained with"
            )
        )
    if _has_gpt(content) and target.lm.model_type != "gpt2":
        found.append(f"it holds a GPT-2, and config.towers.lm is a {family_of(target.lm).title}: set it to that GPT-2")
        return found
    if _has_gpt(content) and (embedding := shapes.get(f"{_GPT}wte.weight", ())) and embedding[-1] != width:
        found.append(
            f"its GPT-2 is {embedding[-1]} wide, and config.towers.lm {width}: set config.towers.lm to its size"
        )
        return found
    if _is_mlp(content):
        last = shapes.get(f"{_MAPPER}model.2.weight", (0,))
        if last[0] and last[0] % width == 0:
            found += target.differs("st_tokens", last[0] // width, "the file has another prefix_length")
        return found
    found += target.differs("st_tokens", shapes[f"{_MAPPER}prefix_const"][0], "the file has another prefix_length")
    found += target.differs("st_layers", count(shapes, _BLOCKS), "the file has another number of layers")
    if first and first[0] % width == 0:
        found += target.differs("st_clip_length", first[0] // width, "the file has another prefix_length_clip")
    return found


def _ignored(content: Content, target: Target) -> str:
    causal_masks = family_of(target.lm).ignored
    return rf"{re.escape(_GPT)}(?:{causal_masks})|gpt\.lm_head\.weight"


CLIPCAP = Form(
    title="ClipCap's checkpoint",
    fits=lambda keys: any(key.startswith(_MAPPER) for key in keys),
    leaves=_leaves,
    problems=_problems,
    ignored=_ignored,
    tied=lambda content: ("gpt.lm_head.weight", f"{_GPT}wte.weight") if _has_gpt(content) else None,
    made_with={"decode.stop_at_period": True},  # it was trained without an end token
)

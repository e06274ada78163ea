"""A CLIP, a two-layer connector and a LLaMA-like LM as one folder of transformers' LlavaForConditionalGeneration.

Its keys are those of the published LLaVA folders (llava-hf), which transformers 4 and 5, vLLM and the GGUF converters
read. The image enters through a token of its own, "<image>", which stands once for each visual token.
"""

import copy
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tokenizers import AddedToken

from eim_jax.models.connector import ST_KINDS
from eim_jax.models.hugging_face import parts_of_key
from eim_jax.models.language import family_of
from eim_jax.models.vision import VISION_TOWERS
from eim_jax.models.vision.features import takes_all
from eim_jax.models.vlm import VLM
from eim_jax.pretrained import reader
from eim_jax.pretrained.language import HEAD_KEY, LM, lm_files

IMAGE = "<image>"
_EMBEDDING = "model.embed_tokens.weight"


def why_not(vlm: VLM, lm: LM | None) -> str:
    """Returns why LlavaForConditionalGeneration cannot hold an arm; "" where it can.

    Args:
      vlm: the arm's modules.
      lm: its language model without adapters, for what follows a picture; None where no such model does what it does.
    """
    vision, kind = vlm.visual.config, ST_KINDS[vlm.st.config.kind]
    tower = VISION_TOWERS[vision.model_type]
    if not tower.in_llava:
        return f"its vision tower is a {vision.model_type}, whose last block's tokens no LLaVA class reads"
    if vision.prompts or vision.adapter is not None:
        what = "deep prompts" if vision.prompts else "adapters"
        return f"its vision tower has {what} (config.arm.*), which transformers' CLIP has not"
    if not takes_all(vlm.features, vision.tokens) or vlm.output_layer or vlm.normalize:
        return (
            "its connector does not read all of CLIP's tokens as they are: LLaVA needs config.arm.*.features='full', "
            "output_layer=False and normalize_prefix=False"
        )
    if not kind.token_mlp:
        able = " or ".join(repr(name) for name, st in ST_KINDS.items() if st.token_mlp)
        return f"its connector {vlm.st.config.kind!r} is no two-layer network on each token: config.arm.*.st={able}"
    if lm is None:
        return "its adapter stays inside the language model, and no class of transformers has it"
    if vlm.st.config.hidden_width > lm.config.width:
        return (
            f"its connector is {vlm.st.config.hidden_width} wide inside, LLaVA's as wide as the language model: "
            f"config.arm.*.st_hidden of at most {lm.config.width}"
        )
    if family_of(lm.config).rows(lm.config)[0].theirs != (_EMBEDDING,):
        return f"its language model is a {family_of(lm.config).title}, LLaVA's has to be built like LLaMA"
    if getattr(lm.config, "logit_cap", 0.0):
        return f"{family_of(lm.config).title} caps its logits, which LLaVA's class does not do"
    return ""


def export_llava(
    directory: str | pathlib.Path,
    vlm: VLM,
    params: Mapping[str, Any],
    lm: LM,
    tokenizer: Any,
    *,
    template: str,
    stretch: bool = False,
    end: int | None = None,
    dtype: DTypeLike | None = None,
    shard: str = reader.SHARD,
) -> None:
    """Writes the folder: config.json, weights, tokenizer with "<image>", picture and text processors, chat template.

    Args:
      directory: made if it is not there.
      vlm: the arm's modules, of which `why_not` says nothing.
      params: our paths -> leaves ("visual/...", "st/..." are read).
      lm: the language model.
      tokenizer: the LM's, which is left as it is.
      template: the chat template (Jinja), with "<image>" where the picture stands.
      stretch: pictures are stretched to a square, not cut (config.data.fit).
      end: the token that ends an answer; None where the model was not taught to write one.
      dtype: of the weights; None for float32.
      shard: the largest file of weights.
    """
    directory, vision = pathlib.Path(directory), vlm.visual.config
    tower, tokenizer = VISION_TOWERS[vision.model_type], _with_image(tokenizer)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    text, language = lm_files(lm)
    language, vocab = _untied(language, image + 1)
    visual = _vision(tower, vision, params)
    text |= {"vocab_size": vocab, "tie_word_embeddings": False}
    tensors = {f"language_model.{key}": x for key, x in language.items()}
    tensors |= {f"vision_tower.{key}": x for key, x in visual.items()} | _projector(params, lm.config.width)
    kind = jnp.float32 if dtype is None else dtype
    name = jnp.dtype(kind).name
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": tower.write(vision, vlm.text.config, 0.0)["vision_config"],
        "image_token_index": image,
        "image_seq_length": vision.tokens,
        "projector_hidden_act": vlm.st.config.activation_name,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "dtype": name,
        "torch_dtype": name,
    }
    reader.write(directory, config, {key: x.astype(kind) for key, x in tensors.items()}, shard)
    tokenizer.save_pretrained(directory)
    pictures = tower.write_preprocessor(vision)
    if stretch:
        sides = {"height": vision.image_size, "width": vision.image_size}
        pictures |= {"size": sides, "do_center_crop": False}
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 1,  # [CLS]
        "vision_feature_select_strategy": "full",
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    generation = {**ends, "suppress_tokens": [image], "_from_model_config": False}
    for file, content in (
        ("preprocessor_config.json", pictures | {"processor_class": "LlavaProcessor"}),
        ("processor_config.json", processor),
        ("generation_config.json", generation),
    ):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _with_image(tokenizer: Any) -> Any:
    """A copy of the tokenizer that knows "<image>", and pads with its end token where it has no padding."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # as generation needs it
    return tokenizer


def _untied(tensors: dict[str, np.ndarray], words: int) -> tuple[dict[str, np.ndarray], int]:
    """The LM's tensors with a head of its own and rows for so many words, and how many those are.

    A new word's rows are the means of the others': its logit is the mean of all, so that it is never the likeliest.
    """
    tensors = {key: x for key, x in tensors.items() if key not in (_EMBEDDING, HEAD_KEY)} | {
        _EMBEDDING: tensors[_EMBEDDING],
        HEAD_KEY: tensors.get(HEAD_KEY, tensors[_EMBEDDING]),
    }
    for key in (_EMBEDDING, HEAD_KEY):
        rows = tensors[key]
        more = np.broadcast_to(rows.mean(0, keepdims=True), (max(words - len(rows), 0), rows.shape[1]))
        tensors[key] = np.ascontiguousarray(np.concatenate([rows, more.astype(rows.dtype)]))
    return tensors, len(tensors[HEAD_KEY])


def _vision(tower: Any, vision: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The vision tower's tensors by transformers' keys, without the output layer's projection."""
    rows = tuple(row for row in tower.rows_of(vision) if row.ours.startswith("visual/"))
    leaves = reader.leaves_of(rows, {"visual": vision.layers}, vision.scan)
    found = reader.write_leaves({path: np.asarray(params[path], np.float32) for path in leaves}, leaves)
    return {key: x for key, x in found.items() if parts_of_key(key)[0].startswith("vision_model.")}


def _projector(params: Mapping[str, Any], width: int) -> dict[str, np.ndarray]:
    """The connector's two layers; a narrower one is filled up with units that give 0 and are read by nothing."""
    up, bias, down, shift = (
        np.asarray(params[f"st/{name}"], np.float32) for name in ("up/kernel", "up/bias", "down/kernel", "down/bias")
    )
    more = (0, width - len(bias))
    return {
        "multi_modal_projector.linear_1.weight": np.pad(up, ((0, 0), more)).T.copy(),
        "multi_modal_projector.linear_1.bias": np.pad(bias, more),
        "multi_modal_projector.linear_2.weight": np.pad(down, (more, (0, 0))).T.copy(),
        "multi_modal_projector.linear_2.bias": shift,
    }

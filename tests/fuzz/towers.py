"""Hugging Face folders of weights: a CLIP, a GPT-2 and a LLaMA in two shards."""

import functools
import json
import pathlib

import numpy as np
import safetensors.numpy

from eim_jax.pretrained import clip_config, lm_config, load_clip, load_lm
from eim_jax.pretrained.image_processor import image_processor

from .engine import Format
from .plain import as_json, json_of

TESTS = pathlib.Path(__file__).resolve().parent.parent
MINIATURE = TESTS.parent / "eim_jax" / "data" / "miniature" / "towers"
_SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}


def _arrays(shapes) -> bytes:
    rng = np.random.default_rng(0)
    return safetensors.numpy.save(
        {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}, metadata={"format": "pt"}
    )


def _block(prefix, names, width, mlp):
    """A CLIP block's shapes."""
    found = {}
    for name, shape in names.items():
        found |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return found


def _clip_tower(name, width, mlp):
    block = f"{name}.encoder.layers.0"
    linear = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp), "layer_norm1": (width,), "layer_norm2": (width,)}
    return _block(block, linear, width, mlp)


@functools.cache
def _clip():
    """A CLIP of a block a tower, with a vocabulary of characters."""
    vision = {**_SMALL, "image_size": 8, "patch_size": 4, "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    text = {**_SMALL, "vocab_size": 12, "max_position_embeddings": 7, "eos_token_id": 11, "hidden_act": "quick_gelu"}
    shapes = {
        "vision_model.embeddings.class_embedding": (8,),
        "vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (5, 8),
        "vision_model.pre_layrnorm.weight": (8,), "vision_model.pre_layrnorm.bias": (8,),
        "vision_model.post_layernorm.weight": (8,), "vision_model.post_layernorm.bias": (8,),
        "text_model.embeddings.token_embedding.weight": (12, 8),
        "text_model.embeddings.position_embedding.weight": (7, 8),
        "text_model.final_layer_norm.weight": (8,), "text_model.final_layer_norm.bias": (8,),
        "visual_projection.weight": (6, 8), "text_projection.weight": (6, 8), "logit_scale": (),
        **_clip_tower("vision_model", 8, 12), **_clip_tower("text_model", 8, 12),
    }  # fmt: skip
    processor = json.loads((MINIATURE / "clip" / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return {
        "config.json": as_json(
            {"model_type": "clip", "projection_dim": 6, "vision_config": vision, "text_config": text}
        ),
        "preprocessor_config.json": as_json(processor),
        "model.safetensors": _arrays(shapes),
    }


def _read_clip(folder: pathlib.Path):
    found = load_clip(folder)
    image_processor(folder).check(found.vision.image_size, "crop")
    return found


def _size(content, *path, default=None):
    for key in path:
        content = (content or {}).get(key)
    return default if content is None else content


_CLIP_FIELDS = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads", "intermediate_size": "mlp",
    "image_size": "image_size", "patch_size": "patch_size", "vocab_size": "vocab", "max_position_embeddings": "context",
}  # fmt: skip


def _agree(config, ours, fields, part=""):
    """Whether our shape has what a config.json states; a field that is absent or null keeps its default."""
    for field, name in fields.items():
        if config.get(field) is not None and hasattr(ours, name):
            assert getattr(ours, name) == config[field], f"{part}{field} {config[field]} became {getattr(ours, name)}"


def _check_clip_config(folder: pathlib.Path, found):
    config = json_of(folder / "config.json")
    for part, ours in zip(("vision_config", "text_config"), found[:2], strict=True):
        older = config.get(f"{part}_dict")
        _agree((config.get(part) or {}) if older is None else older, ours, _CLIP_FIELDS, f"{part}.")


def _check_clip(folder: pathlib.Path, found):
    _check_clip_config(folder, found)
    tensors = _tensors(folder)
    visual, text = found.params["visual"], found.params["text"]
    _equal(visual["class_embedding"], tensors["vision_model.embeddings.class_embedding"])
    _equal(visual["projection"]["kernel"], tensors["visual_projection.weight"].T)
    _equal(text["token_embedding"]["embedding"], tensors["text_model.embeddings.token_embedding.weight"])
    _equal(text["blocks_0"]["mlp"]["up"]["kernel"], tensors["text_model.encoder.layers.0.mlp.fc1.weight"].T)
    _equal(text["blocks_0"]["attn"]["qkv"]["bias"][1], tensors["text_model.encoder.layers.0.self_attn.k_proj.bias"])
    if (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        said = json_of(folder / "preprocessor_config.json")
        plain = all(said.get(key, True) in (True, None) for key in ("do_rescale", "do_normalize"))
        if plain and isinstance(said.get("image_mean"), list) and said.get("rescale_factor") is None:
            assert np.allclose(found.vision.mean, said["image_mean"]), "another mean"


def _tensors(folder: pathlib.Path):
    """The tensors by a plain reader of the format."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        kinds = {"F32": np.float32, "F16": np.float16}
        for key, entry in json.loads(content[8 : 8 + length]).items():
            if key != "__metadata__" and entry["dtype"] in kinds:
                start, stop = entry["data_offsets"]
                part = content[8 + length + start : 8 + length + stop]
                found[key] = np.frombuffer(part, kinds[entry["dtype"]]).reshape(entry["shape"])
    return found


def _equal(ours, theirs):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, f"{ours.shape} for {theirs.shape}"
    assert np.isfinite(ours).all(), "not finite"
    assert np.array_equal(ours, theirs.astype(ours.dtype)), "other numbers"


@functools.cache
def _gpt2():
    config = {
        "model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 6, "vocab_size": 9,
        "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
        "attn_pdrop": 0.1, "scale_attn_weights": True, "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = {"wte.weight": (9, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, out in (
        ("attn.c_attn", (8, 24)),
        ("attn.c_proj", (8, 8)),
        ("mlp.c_fc", (8, 32)),
        ("mlp.c_proj", (32, 8)),
    ):
        shapes |= {f"h.0.{name}.weight": out, f"h.0.{name}.bias": out[1:]}
    shapes |= {f"h.0.{name}.{part}": (8,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return {"config.json": as_json(config), "model.safetensors": _arrays(shapes)}


def _check_gpt2_config(folder: pathlib.Path, found):
    fields = {"n_embd": "width", "n_layer": "layers", "n_head": "heads", "vocab_size": "vocab"}
    _agree(json_of(folder / "config.json"), found, fields)


def _check_gpt2(folder: pathlib.Path, found):
    _check_gpt2_config(folder, found.config)
    tensors = {key.removeprefix("transformer."): value for key, value in _tensors(folder).items()}
    _equal(found.params["token_embedding"]["embedding"], tensors["wte.weight"])
    _equal(found.params["blocks_0"]["mlp"]["up"]["kernel"], tensors["h.0.mlp.c_fc.weight"])
    _equal(found.params["ln_f"]["bias"], tensors["ln_f.bias"])


@functools.cache
def _llama():
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    }  # fmt: skip
    block = {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12), "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,), "lm_head.weight": (9, 8)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in block.items()}
    arrays = safetensors.numpy.load(_arrays(shapes))
    names = sorted(arrays)
    parts = {f"model-{k:05d}-of-00002.safetensors": names[k - 1 :: 2] for k in (1, 2)}
    files = {
        file: safetensors.numpy.save({n: arrays[n] for n in held}, metadata={"format": "pt"})
        for file, held in parts.items()
    }
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, held in parts.items() for n in held}}
    return {"config.json": as_json(config), "model.safetensors.index.json": as_json(index), **files}


def _check_llama_config(folder: pathlib.Path, found):
    config = json_of(folder / "config.json")
    _agree(config, found, {**_CLIP_FIELDS, "num_key_value_heads": "kv_heads", "rms_norm_eps": "eps"})
    theta = _size(config, "rope_parameters", "rope_theta", default=config.get("rope_theta"))
    assert theta is None or found.rope_theta == theta, f"rope_theta {theta}"


def _check_llama(folder: pathlib.Path, found):
    _check_llama_config(folder, found.config)
    tensors = _tensors(folder)
    _equal(found.params["token_embedding"]["embedding"], tensors["model.embed_tokens.weight"])


FORMATS = (
    Format("clip", _clip, _read_clip, _check_clip, quick=10),
    Format("gpt2", _gpt2, load_lm, _check_gpt2, quick=15),
    Format("llama", _llama, load_lm, _check_llama, quick=15),
    Format(
        "clip-config",
        _clip,
        clip_config,
        _check_clip_config,
        names=("config.json", "preprocessor_config.json"),
        quick=30,
    ),
    Format("gpt2-config", _gpt2, lm_config, _check_gpt2_config, names=("config.json",), quick=40),
    Format("llama-config", _llama, lm_config, _check_llama_config, names=("config.json",), quick=40),
)

"""What a Hugging Face directory holds: its files, and by one table a model, which keys make which of our leaves.

Loading and export read the same rows. Every key and every shape is checked before an array is read; then leaf by leaf
is placed, so that at most one leaf is in memory twice.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file, key or field and says what to do."""


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


class Tensors:
    """Their keys, read from one model.safetensors or from the shards that an index names."""

    def __init__(self, directory: pathlib.Path, stack: contextlib.ExitStack):
        self._where, self._name = {}, {}
        for path in weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, "numpy"))
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path} cannot be read ({error}); download it again") from error
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.removeprefix("transformer.")  # GPT-2 saved with or without its head
                if name in self._where:
                    raise WeightsError(f"{path}: key {key!r} is there a second time, in another file or spelling")
                self._where[name], self._name[name] = file, key

    def __iter__(self) -> Iterator[str]:  # noqa: D105
        return iter(self._where)

    def __contains__(self, key: str) -> bool:  # noqa: D105
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._where[key].get_slice(self._name[key]).get_shape())

    def read(self, key: str) -> np.ndarray:
        """Returns a tensor."""
        return self._where[key].get_tensor(self._name[key])


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns a checkpoint's safetensors files: all shards of an index, or the single file.

    Raises:
      WeightsError: there are none, or not all; the message says what to do.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise WeightsError(
                f"{directory}: {index.name} names {', '.join(missing)}, which are missing; download them"
            )
        return files
    if single.is_file():
        return [single]
    hint = "give a directory that transformers' save_pretrained wrote"
    if list(directory.glob("pytorch_model*.bin")):
        hint = "pytorch_model.bin is not read; load it in transformers once and save_pretrained it"
    raise WeightsError(f"{directory} holds neither {single.name} nor {index.name}; {hint}")


def read_json(path: pathlib.Path) -> dict:
    """Returns a JSON file's content, or raises a WeightsError that names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; a checkpoint needs it beside its safetensors") from None
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON ({error}); download it again") from error


def check_keys(directory: pathlib.Path, tensors: Tensors, leaves: dict[str, Leaf], shapes: dict, ignored: str) -> None:
    """Raises WeightsError unless the keys are exactly the table's and every shape is the configuration's."""
    problems, known = [], set()
    for path, leaf in leaves.items():
        shape = shapes[path].shape[1:] if leaf.stacked else shapes[path].shape
        # np.empty touches no memory, and every layout only views it
        theirs = [a.shape for a in leaf.layout.save(np.empty(shape, np.int8))]
        for keys in leaf.keys:
            known.update(keys)
            for key, expected in zip(keys, theirs, strict=True):
                if key not in tensors:
                    problems.append(f"key {key!r} (our {path}) is missing")
                elif tensors.shape(key) != expected:
                    problems.append(f"key {key!r} (our {path}) has shape {tensors.shape(key)}, not {expected}")
    problems += [f"key {k!r} is unexpected" for k in tensors if k not in known and not re.fullmatch(ignored, k)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightsError(f"{directory}: {shown}. Check that config.json and the safetensors are of the same model.")


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts an array where a sharding says; on the default device if None."""
    if sharding is None:
        return jnp.asarray(array)
    # Unlike device_put this moves each device its own part only, on every process of a multi-process run.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def kind_of(dtype: DTypeLike | Mapping[str, DTypeLike], path: str) -> DTypeLike:
    """Returns a leaf's dtype: the one of all leaves, or its own in a mapping from our paths."""
    return dtype[path] if isinstance(dtype, Mapping) else dtype


def read_leaves(
    tensors: Tensors,
    leaves: dict[str, Leaf],
    *,
    dtype: DTypeLike | Mapping[str, DTypeLike],
    shardings: Callable | None,
) -> dict[str, jax.Array]:
    """Returns our paths -> arrays of `dtype`, each placed where shardings(path) says, one leaf after the other."""
    flat = {}
    for path, leaf in leaves.items():
        kind = kind_of(dtype, path)
        first = leaf.layout.load([tensors.read(k) for k in leaf.keys[0]])
        if leaf.stacked:
            array = np.empty((len(leaf.keys), *first.shape), kind)
            array[0] = first
            for i, keys in enumerate(leaf.keys[1:], start=1):
                array[i] = leaf.layout.load([tensors.read(k) for k in keys])
        else:
            array = first.astype(kind)
        flat[path] = place(array, shardings(path) if shardings else None)
    return flat


def write_leaves(flat: dict[str, jax.Array], leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
    """Returns their keys -> arrays, from our leaves.

    Raises:
      WeightsError: a leaf is missing or unexpected.
    """
    missing, unexpected = leaves.keys() - flat.keys(), flat.keys() - leaves.keys()
    if missing or unexpected:
        raise WeightsError(f"parameters to export: missing {sorted(missing)[:8]}, unexpected {sorted(unexpected)[:8]}")
    tensors = {}
    for path, leaf in leaves.items():
        array = np.asarray(flat[path])
        for keys, layer in zip(leaf.keys, array if leaf.stacked else [array], strict=True):
            theirs = leaf.layout.save(layer)
            tensors |= {k: np.ascontiguousarray(x) for k, x in zip(keys, theirs, strict=True)}
    return tensors


def hf_config(directory: pathlib.Path, model_type: str) -> dict:
    """Returns a checkpoint's config.json, or raises WeightsError when it is of another kind of model."""
    config = read_json(directory / "config.json")
    if config.get("model_type") != model_type:
        raise WeightsError(
            f"{directory}/config.json: model_type is {config.get('model_type')!r}, not {model_type!r}; "
            f"give a {model_type} checkpoint here"
        )
    return config


def ours(theirs: dict, fields: dict[str, str]) -> dict[str, Any]:
    """Returns our fields from theirs; one that is absent or null is left to our default."""
    return {ours: theirs[field] for field, ours in fields.items() if theirs.get(field) is not None}


def write(directory: str | pathlib.Path, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes config.json and model.safetensors; returns the directory."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers reads the file only if its metadata says which framework's layout it has
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def theirs(ours: Any, fields: dict[str, str]) -> dict[str, Any]:
    """Returns their fields from our configuration."""
    return {field: getattr(ours, name) for field, name in fields.items()}

"""PEFT's folder of a LoRA adapter, both ways: adapter_config.json and adapter_model.safetensors.

Its keys are "base_model.model.", the module's name in transformers' model, ".lora_A.weight" [r in] or ".lora_B.weight"
[out r], also for GPT-2's Conv1D. Three modules that share a kernel of ours (CLIP's) may be in the file in part: what is
not there is zero, gets no gradient, and is not written again. Where transformers has one module for several layers of
ours (Phi-3's qkv_proj), its A is read into each of them; written, their terms stand side by side in one of higher rank.
"""

import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from eim_jax.models.hugging_face import FUSE_KERNEL, TRANSPOSE, Layout, Row, WeightsError, part, parts_of_key
from eim_jax.models.language import family_of
from eim_jax.models.lora import A, B, LoRA
from eim_jax.models.vision import VISION_TOWERS
from eim_jax.pretrained.reader import Leaf, write_leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEFORE = "base_model.model."
_ENDS = {A: ".lora_A.weight", B: ".lora_B.weight"}

# B of one fused layer, ours [r 3 out]; B of three layers, ours [3 r out].
_FUSED_B = Layout(
    lambda a: a[0].T.reshape(a[0].shape[1], 3, -1), lambda x: [np.ascontiguousarray(x.reshape(x.shape[0], -1).T)]
)
_APART_B = Layout(lambda a: np.stack([x.T for x in a]), lambda x: [x[i].T for i in range(3)])


def rows_of(tower: str, config: Any) -> tuple[tuple[Row, ...], str]:
    """Returns a tower's key table, and what stands before its keys in transformers' model.

    Args:
      tower: "lm" or "visual".
      config: its shape.
    """
    if tower == "lm":
        family = family_of(config)
        return family.rows(config), family.prefix
    return VISION_TOWERS[config.model_type].rows_of(config), ""


def module_of(key: str) -> str:
    """Returns the name of the module that a weight's key, or a part of it, belongs to.

    >>> module_of("layers.0.qkv_proj.weight[0:4/12]"), module_of("layers.0.q_proj.weight")
    ('layers.0.qkv_proj', 'layers.0.q_proj')
    """
    return parts_of_key(key)[0].removesuffix(".weight")


def modules(layer: str, rows: Sequence[Row], prefix: str, stacked: int) -> list[tuple[str, ...]]:
    """Returns for each layer of a stack (one, if it is none) the keys of the weights that make our linear layer.

    Args:
      layer: our path, "lm/blocks_0/attn/q" or "lm/blocks/attn/q".
      rows: the tower's key table.
      prefix: what stands before its keys.
      stacked: length of the stack, 0 for none.

    Raises:
      WeightsError: the table has no such kernel.
    """
    number = re.search(r"/blocks_(\d+)/", layer)
    wanted = re.sub(r"/blocks(_\d+)?/", "/blocks_{i}/", f"{layer}/kernel")
    keys = next((row.theirs for row in rows if row.ours == wanted), None)
    if keys is None:
        raise WeightsError(f"{layer}: its family's key table has no {wanted}, so PEFT's form has no name for it")
    numbers = range(stacked) if stacked else [number[1] if number else ""]
    return [tuple(prefix + key.replace("{i}", str(i)) for key in keys) for i in numbers]


def _key(weight: str, end: str, part_apart: bool) -> str:
    """The key of a low-rank matrix beside a weight; of a part of one its own rows of B, or a name of its own."""
    whole, rows, number = parts_of_key(weight)
    name = f"{BEFORE}{whole.removesuffix('.weight')}"
    if rows is None:
        return f"{name}{_ENDS[end]}"
    if part_apart:
        return f"{part(name, rows.start, rows.stop, number)}{_ENDS[end]}"
    return part(f"{name}{_ENDS[end]}", rows.start, rows.stop, number) if end == B else f"{name}{_ENDS[end]}"


def leaves_of(
    shapes: Mapping[str, Any], towers: Mapping[str, Any], there: Collection[str] | None = None
) -> dict[str, Leaf]:
    """Returns what fills, or is written from, each of our low-rank leaves.

    Args:
      shapes: our paths -> anything with a shape.
      towers: "lm", "visual" -> the towers' shapes.
      there: the file's keys: of maps that share a kernel those that it lacks are left zero; None for what is written,
        where parts of one module have names of their own ("NAME[0:4/12].lora_A.weight").
    """
    found = {}
    for path, leaf in shapes.items():
        layer, end = path[: -len(A) - 1], path[-len(A) :]
        tower = path.partition("/")[0]
        if end not in _ENDS or tower not in towers:
            continue
        stacked = leaf.shape[0] if "/blocks/" in path else 0
        a = shapes[f"{layer}/{A}"].shape
        names = modules(layer, *rows_of(tower, towers[tower]), stacked)
        keys = [tuple(_key(weight, end, there is None) for weight in group) for group in names]
        apart = len(a) - bool(stacked) == 3
        fused = not apart and len(shapes[f"{layer}/{B}"].shape) - bool(stacked) == 3
        layout = (FUSE_KERNEL if end == A else _APART_B) if apart else _FUSED_B if fused and end == B else TRANSPOSE
        if apart and there is not None:
            keys, layout = _present(keys, layout, there)
        found[path] = Leaf(keys, layout, bool(stacked))
    return found


def _present(keys: list[tuple[str, ...]], layout: Layout, there: Collection[str]):
    """The keys that a file has of three maps, and the layout that leaves the other maps zero."""
    chosen = [i for i in range(3) if any(group[i] in there for group in keys)]
    if len(chosen) in (0, 3):
        return keys, layout

    def load(arrays: list[np.ndarray]) -> np.ndarray:
        given = dict(zip(chosen, arrays, strict=True))
        return layout.load([given.get(i, np.zeros_like(arrays[0])) for i in range(3)])

    def save(array: np.ndarray) -> list[np.ndarray]:
        return [part for i, part in enumerate(layout.save(array)) if i in chosen]

    return [tuple(group[i] for i in chosen) for group in keys], Layout(load, save)


def write(directory: pathlib.Path, leaves: Mapping[str, Any], tower: str, config: Any, lora: LoRA, base: str) -> None:
    """Writes a tower's adapter as PEFT's `from_pretrained` reads it.

    Args:
      directory: made if it is not there.
      leaves: our paths ("lm/...") -> arrays; the low-rank ones of the tower are taken.
      tower: "lm" or "visual".
      config: the tower's shape.
      lora: the terms' settings.
      base: what base_model_name_or_path says.
    """
    own = {p: np.asarray(x, np.float32) for p, x in leaves.items() if p.startswith(f"{tower}/") and p[-6:] in _ENDS}
    rows, _ = rows_of(tower, config)
    tensors = write_leaves(own, leaves_of(own, {tower: config}))
    zero = {name for name in _modules_in(tensors) if not any(tensors[f"{name}{end}"].any() for end in _ENDS.values())}
    tensors = {key: x for key, x in tensors.items() if key.rpartition(".lora_")[0] not in zero}
    tensors, parts = _side_by_side(tensors)
    names = [name.removeprefix(BEFORE) for name in _modules_in(tensors)]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if tower == "lm" else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rs,
        "fan_in_fan_out": getattr(config, "model_type", "") == "gpt2",
        "bias": "none",
        "target_modules": _targets(names, rows, config.layers),
        **_patterns(parts, rows, config.layers, lora),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _side_by_side(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Terms of parts of one module as one term of the module, and of how many parts each of these modules' is made.

    n terms of rank r make one of rank n r: A's rows one below the other, each B in its own rows and columns.
    """
    found, parts = dict(tensors), {}
    for name in _modules_in(tensors):
        whole, rows, _ = parts_of_key(name)
        if rows is not None:
            parts.setdefault(whole, []).append(name)
    for whole, names in parts.items():
        first, up = ([found.pop(f"{name}{_ENDS[end]}") for name in names] for end in (A, B))
        rank, total = len(first[0]), parts_of_key(names[0])[2]
        b = np.zeros((total, rank * len(names)), np.float32)
        for i, (name, x) in enumerate(zip(names, up, strict=True)):
            b[parts_of_key(name)[1], rank * i : rank * (i + 1)] = x
        found |= {f"{whole}{_ENDS[A]}": np.concatenate(first), f"{whole}{_ENDS[B]}": b}
    return found, {whole.removeprefix(BEFORE): len(names) for whole, names in parts.items()}


def _patterns(parts: Mapping[str, int], rows: Sequence[Row], layers: int, lora: LoRA) -> dict[str, Any]:
    """PEFT's rank_pattern and alpha_pattern of modules whose term is made of several, by which their factor stays."""
    found: dict[str, Any] = {}
    for number in sorted(set(parts.values()) - {1}):
        alpha = lora.alpha * (number**0.5 if lora.rs else number)
        for end in _targets([name for name, n in parts.items() if n == number], rows, layers):
            found.setdefault("rank_pattern", {})[end] = lora.rank * number
            found.setdefault("alpha_pattern", {})[end] = alpha
    return found


def _modules_in(tensors: Collection[str]) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors))


def _targets(names: list[str], rows: Sequence[Row], layers: int) -> list[str]:
    """The shortest ends of module names that name these and no other module of the base; else their whole names."""
    linear = [module_of(key) for row in rows for key in row.theirs if parts_of_key(key)[0].endswith(".weight")]
    every = {name.replace("{i}", str(i)) for name in linear for i in range(layers)}
    whole = {other for other in every if any(name == other or name.endswith(f".{other}") for name in names)}
    chosen = set()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[i:])
            named = {other for other in every if other == end or other.endswith(f".{end}")}
            if i == 0 or (named and named <= whole):
                chosen.add(end)
                break
    return sorted(chosen)

"""Which linear layers of an arm's towers get low-rank terms (config.arm.*.lora), and who trains them."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn

from eim_jax.config import Arm, ConfigError, Stage, patterns
from eim_jax.models.hugging_face import Row
from eim_jax.models.lora import A, Layer, LoRA, Tuned, linear_layers

Shapes = Mapping[str, Any]
Towers = dict[str, Any]


def settings(arm: Arm) -> LoRA:
    """Returns an arm's settings of its low-rank terms."""
    return LoRA(arm.lora_rank, arm.lora_alpha, arm.lora_dropout, arm.lora_rs)


def tuned(arm: Arm, towers: Towers, rows: Mapping[str, tuple[Row, ...]], shapes: Shapes) -> Towers:
    """Returns the towers, those of which a pattern of `arm.lora` matches a linear layer with low-rank terms.

    Args:
      arm: whose patterns are matched with the layers' whole paths ("lm/blocks_0/attn/q").
      towers: "visual" and "lm", as modules.
      rows: tower -> the key table of its family, which tells maps that share a kernel from one map.
      shapes: the pretrained towers' leaves by path.

    Raises:
      ConfigError: a pattern matches no linear layer.
    """
    if not arm.lora:
        return towers
    known = {
        f"{name}/{path}": layer for name, tower in towers.items() for path, layer in _layers(name, tower, rows, shapes)
    }
    for pattern in arm.lora:
        if not any(re.fullmatch(pattern, path) for path in known):
            raise ConfigError(
                f"config.arm.*.lora: {pattern!r} matches no linear layer; the towers have {_shortened(known)}"
            )
    found = {}
    for name, tower in towers.items():
        chosen = tuple(
            layer
            for path, layer in known.items()
            if path.startswith(f"{name}/") and any(re.fullmatch(pattern, path) for pattern in arm.lora)
        )
        found[name] = Tuned(tower, settings(arm), chosen) if chosen else tower
    return found


def _layers(name: str, tower: nn.Module, rows, shapes: Shapes) -> Iterable[tuple[str, Layer]]:
    """The linear layers of a pretrained tower that could have a term."""
    config: Any = getattr(tower, "config")  # noqa: B009 a module of any family has one
    side = getattr(config, "image_size", None)
    example = ((1, side, side, 3), "float32") if side else ((1, 1), "int32")
    keys = {row.ours: row.theirs for row in rows[name]}
    for path, (inputs, outputs) in linear_layers(tower, *example[0], dtype=example[1]).items():
        kernel = shapes.get(f"{name}/{path}/kernel", shapes.get(f"{name}/{path}/codes"))
        if kernel is None:  # an adapter's own
            continue
        whole = f"{name}/{path}/kernel" in shapes
        stacked = kernel.shape[0] if len(kernel.shape) > (1 + len(outputs) if whole else 2) else 0
        row = re.sub(r"blocks(_\d+)?/", "blocks_{i}/", f"{name}/{path}/kernel")
        yield path, Layer(path, inputs, outputs, stacked, apart=len(keys.get(row, ())) > 1)


def _shortened(paths: Iterable[str]) -> str:
    """Paths, those of all blocks as one."""
    short = dict.fromkeys(re.sub(r"blocks_\d+", "blocks_N", path) for path in paths)
    return ", ".join(short)


def check_trained(arm: Arm, name: str, stages: Mapping[str, Stage], towers: Iterable[Any], init: str) -> None:
    """Raises ConfigError where no stage trains an arm's low-rank terms, and no checkpoint gives them."""
    first = [f"{which}/{tower.layers[0].path}/{A}" for which, tower in towers if isinstance(tower, Tuned)]
    trained = [pattern for stage in arm.sequence for pattern, _ in patterns(stages[stage])]
    for path in first if not init else ():
        if not any(re.fullmatch(pattern, path) for pattern in trained):
            raise ConfigError(
                f"config.arm.{name}.lora={arm.lora!r}, but no stage of its sequence trains {path}: it would change "
                f"nothing. Leave it out, or add a stage that trains '{path.partition('/')[0]}/.*/lora/.*'"
            )


def described(towers: Iterable[Any]) -> str:
    """Says what low-rank terms there are, "" for none."""
    said = []
    for which, tower in towers:
        if isinstance(tower, Tuned):
            lora, count = tower.lora, sum(layer.stacked or 1 for layer in tower.layers)
            leaves = [shape for layer in tower.layers for shape in layer.shapes(lora.rank).values()]
            size = sum(math.prod(shape) for shape in leaves)
            said.append(f"{which}: {count} linear layers, rank {lora.rank}, factor {lora.scale:g}, {size:,} parameters")
    return f"low-rank terms (LoRA) in {'; '.join(said)}" if said else ""

"""PEFT's LoRA adapters (adapter_model.safetensors beside adapter_config.json), of a language model or of CLIP."""

import re
from collections.abc import Collection
from typing import Any

from eim_jax.models.lora import A
from eim_jax.pretrained import peft
from eim_jax.pretrained.checkpoints.form import EXPORT, Content, Form, Target
from eim_jax.pretrained.reader import Leaf

# What changes the forward in a way that a low-rank term alone does not, or the weights beneath it.
_OTHER = (
    *("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config", "loftq_config"),
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that subtract from the weights


def _towers(target: Target) -> dict[str, Any]:
    return {"lm": target.lm, "visual": target.visual}


def _leaves(content: Content, target: Target) -> dict[str, Leaf]:
    """The low-rank leaves of the tower whose modules the file names."""
    found = peft.leaves_of(target.shapes, _towers(target), content.shapes)
    return {path: leaf for path, leaf in found.items() if path.startswith(f"{_tower(content, target)}/")}


def _tower(content: Content, target: Target) -> str:
    """Which tower a file is for: the one whose family's keys it names."""
    for name, config in _towers(target).items():
        rows, prefix = peft.rows_of(name, config)
        known = {_numbered(peft.module_of(f"{prefix}{key}")) for row in rows for key in row.theirs}
        if any(_numbered(module) in known for module in _modules(content)):
            return name
    return ""


def _modules(content: Content) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".lora_")[0].removeprefix(peft.BEFORE) for key in content.shapes))


def _numbered(name: str) -> str:
    return re.sub(r"\.(\d+|\{i\})\.", ".N.", name)


def _problems(content: Content, target: Target) -> list[str]:
    settings = content.settings
    if not settings:
        return [f"{peft.CONFIG} is not beside it, and says its alpha: put it there"]
    if (kind := settings.get("peft_type")) != "LORA":
        return [f"its peft_type is {kind!r:.40}, and only LORA is read"]
    found = [f"its {name} is {settings[name]!r:.60}, which is not supported" for name in _OTHER if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append(f"its bias is {settings['bias']!r:.40}: only adapters that tune no biases are read")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGES_BASE):
        found.append(f"its init_lora_weights is {begun!r:.40}: it belongs to other weights than the base's own")
    if found:
        if (
            whole := next((at / EXPORT for at in content.path.parents[:3] if (at / EXPORT).is_file()), None)
        ) is not None:
            return [*found, f"it stands in an export of this package: give {whole}, which has all of its arm"]
        return [
            *found,
            "merge it in PEFT (merge_and_unload), save_pretrained that, and set config.towers to it",
        ]
    for field, theirs in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
        value = settings.get(theirs)
        if not isinstance(value, int | float) or isinstance(value, bool):
            found.append(f"{peft.CONFIG}: {theirs} is {value!r:.40}, not a number")
            continue
        wanted = value if field == "lora_rank" else float(value)
        found += target.differs(field, wanted, f"{theirs} in {peft.CONFIG} is another")
    rs = settings.get("use_rslora", False)
    found += target.differs("lora_rs", rs, f"use_rslora in {peft.CONFIG} is {rs!r:.20}")
    tower = _tower(content, target)
    if not tower:
        first = next(iter(_modules(content)), "")
        return [*found, f"its modules ({first!r:.80}, ...) are none of the towers': set config.towers to its base"]
    return found + _other_layers(content, target, tower)


def _other_layers(content: Content, target: Target, tower: str) -> list[str]:
    """A line where the arm's low-rank terms stand beside other layers than the file's, with the patterns to set."""
    rows, prefix = peft.rows_of(tower, _towers(target)[tower])
    there, wanted = set(_modules(content)), set()
    for row in rows:
        for i in range(_towers(target)[tower].layers) if "{i}" in row.ours else [0]:
            names = {prefix + peft.module_of(key).replace("{i}", str(i)) for key in row.theirs}
            if row.ours.endswith("/kernel") and names & there:
                wanted.add(row.ours.removesuffix("/kernel").replace("{i}", str(i)))
    own = set()
    for path, leaf in target.shapes.items():
        if path.startswith(f"{tower}/") and path.endswith(f"/{A}"):
            layer = path.removesuffix(f"/{A}")
            numbers = range(leaf.shape[0]) if "/blocks/" in layer else [""]
            own |= {layer.replace("/blocks/", f"/blocks_{i}/") for i in numbers}
    if own == wanted:
        return []
    kinds = sorted({re.sub(r"blocks_\d+", "blocks.*", path) for path in wanted})
    whole = len(wanted) == sum(1 if "blocks.*" not in kind else _towers(target)[tower].layers for kind in kinds)
    patterns = tuple(kinds if whole else sorted(wanted))
    return [f"it has terms beside other layers than config.arm.{target.name}.lora names: set that to {patterns!r}"]


def _fits(keys: Collection[str]) -> bool:
    return bool(keys) and all(key.startswith(peft.BEFORE) and ".lora_" in key for key in keys)


PEFT = Form(
    "PEFT's LoRA adapter",
    fits=_fits,
    leaves=_leaves,
    problems=_problems,
    lacking=lambda content: "st/",
)

"""Parameters added to frozen towers: the table of adapters, and what a run's config asks of it.

An adapter is added by writing one file with one subclass of `Adapter` and one line in `ADAPTERS`; from outside the
package, `ADAPTERS["mine"] = Mine` does the same.
"""

import re

from eim_jax.config import Config, ConfigError, Decode, patterns
from eim_jax.models.adapters.adapter import Adapter, Markers
from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit

__all__ = ["ADAPTERS", "Adapter", "Markers", "adapter_of", "check", "has_layer_axis"]

# config.arm.*.adapter -> the adapter's class, whose `from_arm` reads the arm's settings.
ADAPTERS: dict[str, type[Adapter] | None] = {"none": None, "lavin": Router, "prompts": ZeroInit}


def adapter_of(arm) -> Adapter | None:
    """Returns the adapter that an arm (config.Arm) asks for, with the arm's settings.

    Raises:
      ConfigError: there is none of that name.
    """
    if arm.adapter not in ADAPTERS:
        raise ConfigError(
            f"config.arm.*.adapter: {arm.adapter!r} is none of {', '.join(ADAPTERS)}; one of your own is entered in "
            "eim_jax.models.adapters.ADAPTERS first"
        )
    kind = ADAPTERS[arm.adapter]
    return None if kind is None else kind.from_arm(arm)


def check(config: Config) -> None:
    """Raises ConfigError where an arm names no adapter, or one that none of its stages trains."""
    for name, arm in config.arm.items():
        if arm.adapter not in ADAPTERS:
            raise ConfigError(f"config.arm.{name}.adapter: {arm.adapter!r} is none of {', '.join(ADAPTERS)}")
    kinds = [ADAPTERS[config.arm[name].adapter] for name in config.arms]
    for kind in filter(None, ADAPTERS.values()):
        for field in getattr(kind, "decode_fields", ()):
            changed = getattr(config.decode, field) != getattr(Decode(), field)
            if changed and not any(field in getattr(used, "decode_fields", ()) for used in kinds):
                raise ConfigError(
                    f"config.decode.{field} changes {kind.title} alone, which no arm of config.arms has: leave it out"
                )
    for name in config.arms:
        arm, kind = config.arm[name], ADAPTERS[config.arm[name].adapter]
        if arm.visual_adapter and (kind is None or not kind.adapts_vision):
            able = " or ".join(repr(n) for n, k in ADAPTERS.items() if k is not None and k.adapts_vision)
            raise ConfigError(f"config.arm.{name}.visual_adapter needs config.arm.{name}.adapter={able}")
        if arm.visual_routing != "sample" and not arm.visual_adapter:
            raise ConfigError(
                f"config.arm.{name}.visual_routing={arm.visual_routing!r} needs config.arm.{name}.visual_adapter=True"
            )
        trained = [p for stage in arm.sequence for p, _ in patterns(config.stages[stage])]
        if kind is None:
            continue
        added = [(f"adapter={arm.adapter!r}", "lm")]
        added += [("visual_adapter=True", "visual")] if arm.visual_adapter else []
        for what, tower in added:
            if not any(re.fullmatch(p, f"{tower}/adapter/{kind.trained_leaf}") for p in trained):
                raise ConfigError(
                    f"config.arm.{name}.{what}, but no stage of its sequence trains it: it would stay as it was drawn. "
                    f"Leave it out, or add a stage that trains '{tower}/adapter/.*'"
                )


def has_layer_axis(path: str) -> bool:
    """Whether a parameter belongs to an adapter or to prompts and its first axis counts layers.

    >>> has_layer_axis("lm/adapter/up/kernel"), has_layer_axis("lm/adapter/modality"), has_layer_axis("st/up/kernel")
    (True, False, False)
    """
    added = re.fullmatch(r"visual/prompt/.*|(?:lm|visual)/adapter/(.*)", path)
    shared = {leaf for kind in ADAPTERS.values() if kind is not None for leaf in kind.unstacked}
    return added is not None and added[1] not in shared

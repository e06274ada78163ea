"""The way to and from nested plain values: ml_collections' ConfigDict, run.json, and flat names.

`configs/*.py` build a ConfigDict (so that every field can be overridden on the command line); `from_config_dict` turns
it into dataclasses at the door, and nothing behind the door sees a ConfigDict.
"""

import dataclasses
import difflib
import typing
from typing import TYPE_CHECKING, Any

from eim_jax.config.checks import ConfigError, check
from eim_jax.config.fields import Config

if TYPE_CHECKING:
    import ml_collections


def to_config_dict(config: Config) -> "ml_collections.ConfigDict":
    """The same fields as a ConfigDict, for `configs/*.py` and the command line."""
    import ml_collections  # here, because a step that is built from the dataclasses alone does without it

    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: Any) -> Config:
    """Turns a ConfigDict or nested dict into a checked `Config`; raises ConfigError naming the field."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    config = _build(Config, values, "config")
    check(config, flatten(config))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """The fields as {"data.max_tokens": 40, ...}."""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    visit("", dataclasses.asdict(config))
    return flat


def explain_unknown(values: Any, field: str) -> str | None:
    """Why the dotted `field` is not in a ConfigDict, with the nearest valid name; None if it is there."""
    path = []
    for name in field.split("."):
        known = list(values.keys()) if hasattr(values, "keys") else []
        if name not in known:
            where = ".".join(["config", *path])
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            return f"{where} has no field {name!r}" + (
                f"; did you mean {where}.{near[0]}?" if near else f"; it has {', '.join(known) or 'no fields'}"
            )
        path.append(name)
        values = values[name]
    return None


def as_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values, for run.json."""
    return dataclasses.asdict(config)


def _build(kind, values, where):
    """One dataclass from nested plain values."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}.{name}: no such field{hint}")
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint, value, where):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is dict:
        return {name: _build(typing.get_args(hint)[1], child, f"{where}.{name}") for name, child in value.items()}
    if hint is tuple and isinstance(value, (list, tuple)):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {value!r} is not a {hint.__name__}")
    return value

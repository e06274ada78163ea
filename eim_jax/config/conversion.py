"""The way to and from nested plain values: ml_collections' ConfigDict, run.json, and flat names.

`configs/*.py` build a ConfigDict (so that every field can be overridden on the command line); `from_config_dict` turns
it into dataclasses at the door, and nothing behind the door sees a ConfigDict.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from eim_jax.config.checks import ConfigError, check
from eim_jax.config.fields import Config, Data, LossWeights
from eim_jax.config.tables import LOSSES

if TYPE_CHECKING:
    import ml_collections

Built = TypeVar("Built")


def to_config_dict(config: Config) -> "ml_collections.ConfigDict":
    """Turns a config into a ConfigDict, of which a config file or a flag may set every field.

    Config files call `training.kinds.to_config_dict`, which first fills in the fields that kinds have for themselves.

    Args:
      config: a run's config.

    Returns:
      The same fields, those of `config.data.own` beside the other fields of `config.data`.
    """
    import ml_collections  # here, because a step that is built from the dataclasses alone does without it

    return ml_collections.ConfigDict(as_dict(config))


def from_config_dict(values: Any) -> Config:
    """Turns a ConfigDict or nested dict into a `Config` of sound structure and ranges.

    Args:
      values: a ConfigDict, or the "config" of a run.json.

    Returns:
      The config. Names of kinds, and the fields that they have for themselves, are looked at by `training.kinds.check`.

    Raises:
      ConfigError: a field is unknown, has another type, is out of its range or contradicts another.
    """
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    config = build(Config, values, "config")
    check(config, flatten(config))
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain values, for run.json: each stage names every loss there is, with its weight.

    The fields of `data.own` stand beside the others.
    """
    values = _nested(config)
    for stage in values["stages"].values():
        stage["losses"] = {**dict.fromkeys(LOSSES, 0.0), **stage["losses"]}
    return values


def _nested(config: Config) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    own = values["data"].pop("own")
    return {**values, "data": {**values["data"], **own}}


def flatten(config: Config) -> dict[str, Any]:
    """Returns the fields, {"data.max_tokens": 40, ...}; of losses those alone that have a weight."""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, child in value.items():
                if isinstance(value, LossWeights) and child == 0:
                    continue
                visit(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    visit("", _nested(config))
    return flat


def explain_unknown(values: Any, field: str) -> str | None:
    """Says why a dotted field is not in a ConfigDict.

    Args:
      values: the ConfigDict.
      field: such as "data.max_tokns".

    Returns:
      A sentence with the nearest valid name, or None if the field is there.
    """
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


def build(kind: type[Built], values: Any, where: str) -> Built:
    """Builds a dataclass from nested plain values.

    Args:
      kind: the dataclass.
      values: its fields by name; a missing one keeps its default.
      where: what stands before a field's name in a message, such as "config.data".

    Returns:
      The dataclass, lists turned into tuples and whole numbers into floats where a field asks for it.

    Raises:
      ConfigError: a name is no field, or a value has another type than its field.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {values!a:.60} is not a group of fields")
    hints, own = typing.get_type_hints(kind), issubclass(kind, Data)  # what Data does not know is a data set's own
    known = [f.name for f in dataclasses.fields(typing.cast(Any, kind))]
    for name in values:
        if name not in known and not own:
            raise ConfigError(f"{where}.{name}: {no_such_field(name, known)}")
    converted = {name: _convert(hints.get(name, Any), value, f"{where}.{name}") for name, value in values.items()}
    return kind(**converted)


def no_such_field(name: str, known: Collection[str]) -> str:
    """Returns the end of a message on an unknown field: the nearest of the known names, or all of them.

    >>> no_such_field("max_tokn", ["kind", "max_tokens"])
    "no such field; did you mean 'max_tokens'?"
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"no such field; did you mean {near[0]!r}?" if near else f"no such field; known: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is LossWeights and isinstance(value, Mapping):
        return LossWeights({name: _convert(float, weight, f"{where}.{name}") for name, weight in value.items()})
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    plain = typing.get_origin(hint) or hint
    if plain is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {value!r} is not a dict of named entries")
        return {name: _convert(typing.get_args(hint)[1], child, f"{where}.{name}") for name, child in value.items()}
    if plain in (tuple, Any) and isinstance(value, (list, tuple)):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{where}: a number of {len(str(value))} digits is no float") from error
    if plain is Any:
        return value
    kinds: Any = typing.get_args(hint) if plain in (typing.Union, types.UnionType) else (plain,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{where}: {value!r} is not a {' or '.join(kind.__name__ for kind in kinds)}")
    return value

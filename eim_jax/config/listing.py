"""Every field of a run with its type, its default and what is said of it, read from the dataclasses themselves."""

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from typing import NamedTuple


class Field(NamedTuple):
    """One field: its dotted path ("stages.*.lr"), the name of its type, its default, and the comment beside it."""

    path: str
    type: str
    default: object
    said: str


class Group(NamedTuple):
    """One dataclass of a config: where it stands ("" for the run itself), its docstring and its plain fields."""

    path: str
    said: str
    fields: tuple[Field, ...]


def groups(kind: type, path: str = "") -> list[Group]:
    """Lists a dataclass and every dataclass that its fields hold, alone or by name in a dict.

    Args:
      kind: the dataclass, for instance `config.Config`.
      path: where it stands in a run's config.

    Returns:
      One group a dataclass, in the order of the fields; entries of a dict stand under "*".
    """
    found = [Group(path, inspect.getdoc(kind) or "", _fields(kind, path))]
    for name, hint in typing.get_type_hints(kind).items():
        inside, where = hint, f"{path}.{name}" if path else name
        if typing.get_origin(hint) is dict:
            inside, where = typing.get_args(hint)[1], f"{where}.*"
        if dataclasses.is_dataclass(inside) and isinstance(inside, type):
            found += groups(inside, where)
    return found


def comments(kind: type) -> dict[str, str]:
    """Returns what is said of each field of a dataclass: the comment behind it, or the lines of comment above it."""
    source = inspect.cleandoc("\n" + inspect.getsource(kind))
    lines = source.splitlines()
    by_line = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, line = [], node.lineno - 1
            while line in by_line and lines[line - 1].lstrip().startswith("#"):
                above.insert(0, by_line[line])
                line -= 1
            last = node.end_lineno or node.lineno
            behind = [by_line[n] for n in range(node.lineno, last + 1) if n in by_line]
            found[node.target.id] = " ".join([*above, *behind])
    return found


def _fields(kind: type, path: str) -> tuple[Field, ...]:
    """The plain fields of one dataclass; those that hold dataclasses are groups of their own."""
    said, hints, found = comments(kind), typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        held = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else hint
        if dataclasses.is_dataclass(held):
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        name = f"{path}.{field.name}" if path else field.name
        found.append(Field(name, getattr(hint, "__name__", str(hint)), default, said.get(field.name, "")))
    return tuple(found)

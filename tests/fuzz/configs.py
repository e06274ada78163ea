"""Fields on the real command line: `--config=PRESET --config.FIELD=VALUE ...`, flags and all."""

import ast
import contextlib
import copy
import functools
import pathlib
import sys

from absl import flags
from hypothesis import strategies as st

from eim_jax import main
from eim_jax.config import flatten

from .engine import Format
from .mutations import TEXTS, Files
from .plain import as_json, json_of

PRESETS = ("miniature", "photos", "lavin7b_eim_chat", "llama_adapter_eim_scienceqa")
VALUES = (
    "", "0", "1", "-1", "2", "7", "1000000", "1e3", "1e-3", "1e400", "-0.5", "0.0", "nan", "inf", "-inf", "True",
    "False", "None", "true", "no", "()", "(1,)", "(1, -1, 1)", "(0, 1, 1)", "(2, 2, 2)", "('eim',)",
    "('baseline', 'eim')", "[]", "['greedy']", "('beam',)", "('lm/.*',)", "(('st/.*', 0.1),)", "(('[', 1),)", "{}",
    "{'a': 1}", "auto", "float32",
    "bfloat16", "nf4", "error", "drop", "int8", "cosine", "dot", "linear", "10:15", "15:10", "coco", "scienceqa",
    "miniature/gpt2", "1" * 400, "0x10", "1_000", "1,2", "'a'", '"', "\\", "a=b", "--x", "(" * 300, "lambda: 1",
)  # fmt: skip


@functools.cache
def _fields() -> tuple[str, ...]:
    """Every field of every preset, by its dotted name."""
    found: dict[str, None] = {}
    for name in PRESETS:
        with _flags():
            main._parse(["eim_jax", f"--config={name}"])
            found |= dict.fromkeys(flatten(main._asked()))
    return (*found, "data", "arm.eim", "stages", "no.such.field", "data.max_tokns", "")


@contextlib.contextmanager
def _flags():
    """The command line's flags as a fresh process has them, and these again afterwards."""
    inside = flags.FLAGS.__dict__
    before = {name: copy.copy(value) for name, value in inside.items()}
    lists = {
        name: {key: list(held) for key, held in value.items()} for name, value in before.items() if "by_module" in name
    }
    for flag in {flags.FLAGS[name] for name in flags.FLAGS}:
        flag.unparse()
    try:
        yield
    finally:
        inside.clear()
        inside.update(before | lists)


def _valid() -> Files:
    return {"arguments.json": as_json(["--config=miniature", "--workdir=w"])}


def _changed(files: Files):
    value = st.one_of(st.sampled_from(VALUES), st.sampled_from(TEXTS), st.integers().map(str), st.floats().map(str))
    override = st.tuples(st.sampled_from(_fields()), value).map(lambda pair: f"--config.{pair[0]}={pair[1]}")
    other = st.sampled_from(
        ("--config", "--config=", "--config=nosuch", "--config=a.py", "--mode=nosuch", "--mode=eval", "--workdir=",
         "--samples=0", "--samples=x", "--nosuch", "stray", "--config.seed", "-config.seed=3", "--process_id=-1")
    )  # fmt: skip
    preset = st.sampled_from(PRESETS).map(lambda name: f"--config={name}")
    words = st.lists(st.one_of(override, override, override, override, other), min_size=1, max_size=4)
    return st.tuples(preset, words).map(lambda pair: {"arguments.json": as_json([pair[0], "--workdir=w", *pair[1]])})


def _read(folder: pathlib.Path):
    """The config that a command arrives at, by the door that every command goes through."""
    arrived = []

    def stands_in(argv):
        kept(argv) if len(argv) > 1 else arrived.append(main._config(folder / "w", main._MODE.value))

    kept, before = main.main, sys.argv
    with _flags():
        main.main, sys.argv = stands_in, ["eim_jax", *json_of(folder / "arguments.json")]
        try:
            main.cli()
        except SystemExit as stop:
            if stop.code:
                raise
        finally:
            main.main, sys.argv = kept, before
    return arrived[0] if arrived else None


def _check(folder: pathlib.Path, found):
    arguments = json_of(folder / "arguments.json")
    if found is None:
        assert any(word in ("--help", "--version") for word in arguments), "nothing was said, and nothing done"
        return
    words = [word.lstrip("-").partition("=") for word in arguments]
    given = [(name.removeprefix("config."), text) for name, sign, text in words if sign and name.startswith("config.")]
    ours, names = flatten(found), [name for name, _ in given]
    for name, value in given:
        if name not in ours or names.count(name) > 1:  # of a tuple given twice ml_collections takes both
            continue
        got = ours[name]
        if isinstance(got, str):
            assert got in (value, value.strip("'\"")), f"{name}: {got!r} for {value!r}"
        elif isinstance(got, bool):
            assert got == (value.lower() in ("true", "t", "1", "yes", "y")), f"{name}: {got!r} for {value!r}"
        elif isinstance(got, int | float):
            assert got == _number(value), f"{name}: {got!r} for {value!r}"
        else:
            assert _plain(got) in _meant(value), f"{name}: {got!r} for {value!r}"


def _number(value: str) -> int | float:
    try:
        return int(value, 0)
    except ValueError:
        return float(value)


def _meant(value: str) -> tuple:
    """What a text may stand for in a field of several entries: a literal, one entry, or entries between commas."""
    try:
        found = _plain(ast.literal_eval(value))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return (), (value,), tuple(value.split(",")), tuple(part.strip() for part in value.split(","))
    return found, (found,)


def _plain(value):
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


FORMATS = (
    Format(
        "command-line", _valid, _read, _check, change=_changed, quick=30,
        words=("config.", "config has", "--config", "--mode", "--workdir", "--samples", "--process_id", "flag",
               "unexpected argument"),
    ),
)  # fmt: skip

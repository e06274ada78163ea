"""The command line: `--config` as a preset, a file or the finished run's own; a flag's fault is one line."""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from eim_jax import __version__
from eim_jax import config as settings
from eim_jax.commands.help import fields, general, presets
from eim_jax.utils.files import Damaged, user_path
from eim_jax.utils.this_machine import versions

OF_A_RUN = ("caption", "chat", "eval", "export", "inspect", "serve")  # modes that may be given a finished run alone


def _config_of_run(argv: list[str]) -> tuple[list[str], ml_collections.ConfigDict | None]:
    """The config that the workdir's run was trained with, where the command is about it or names no file.

    A file that is given with a run is executed all the same: what it enters into the tables of kinds (a loss, an
    adapter, ...) the workdir knows by name alone.

    Returns:
      The words without such a file, and the run's config, or None.
    """
    from eim_jax.losses import table  # noqa: F401 a config names a weight for each loss of this table
    from eim_jax.training import kinds

    workdir, file = given(argv, "workdir"), given(argv, "config")
    folder = user_path(workdir) if workdir else None
    if file is not None and folder is not None and _is_command(argv, folder):
        found = _executed(argv[0], file)
        if isinstance(found, ml_collections.ConfigDict):  # what stands for a missing file tells its error later
            argv, file = _without(argv, "config"), None
    saved = settings.read_saved(folder) if folder is not None and file is None else None
    return argv, None if saved is None else kinds.to_config_dict(saved)


def _is_command(argv: list[str], workdir: Path) -> bool:
    """Whether it is about what a run has made, and nothing from elsewhere."""
    return given(argv, "mode") in OF_A_RUN and given(argv, "init") is None and (workdir / "run.json").exists()


def _without(argv: list[str], flag: str) -> list[str]:
    """The words without a flag and its value, in the forms that `given` reads."""
    kept, words = [], iter(argv)
    for word in words:
        name, sign, _ = word.partition("=")
        if name not in (f"--{flag}", f"-{flag}"):
            kept.append(word)
        elif not sign:
            next(words, None)
    return kept


def _executed(program: str, file: str) -> Any:
    """The config of a file as it stands, without what the command line changes."""
    alone = flags.FlagValues()
    command = [program, f"--config={file}"]
    holder = config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=command)
    alone(command)
    return holder.value


def given(argv: list[str], flag: str) -> str | None:
    """Returns a flag's value before flags are parsed (--flag=value, --flag value); None where it is not given."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, sign, value = word.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if sign else following
    return None


def said(argv: list[str], own: Sequence[flags.Flag]) -> str | None:
    """Returns what the command line is asked to say of itself (--version, --help, --help=config); None for a run.

    Args:
      argv: the command's words, its own name first.
      own: the flags that --help lists.
    """
    if "--version" in argv:
        return (
            f"eim_jax {__version__} (" + ", ".join(f"{k} {v}" for k, v in versions().items() if k != "eim_jax") + ")\n"
        )
    if "--help=config" in argv:
        return fields()
    if {"--help", "-h", "-help"} & set(argv):
        return general({flag.name: flag for flag in own})
    return None


def presets_as_files(argv: list[str]) -> list[str]:
    """Returns the words with --config=NAME, or --config NAME, of a preset as its file (NAME:ARG as FILE:ARG).

    Raises:
      SystemExit: no preset has that name, the name is empty, or --config is given twice.
    """
    asked, known = given(argv, "config"), presets()
    if asked is None:
        return argv
    name, colon, argument = asked.partition(":")
    if sum(word.partition("=")[0] in ("--config", "-config") for word in argv) > 1:
        sys.exit("error: --config is given more than once: a run has one config")
    if not name:
        sys.exit(f"error: --config={asked} names nothing: give a preset ({', '.join(known)}) or a Python file")
    if Path(name).suffix or os.sep in name:
        file = f"{user_path(name)}{colon}{argument}" if name.startswith("~") else asked
        return _with_config(argv, asked, file)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"presets are {', '.join(known)}"
        sys.exit(f"error: --config={name} is no preset and no Python file; {hint}")
    return _with_config(argv, asked, f"{known[name]}{colon}{argument}")


def _with_config(argv: list[str], asked: str, file: str) -> list[str]:
    return [file if word == asked else f"--config={file}" if word == f"--config={asked}" else word for word in argv]


def parse(argv: list[str], own: Sequence[flags.Flag]) -> list[str]:
    """Reads all flags and the config; --help and --version are answered here, and end the process.

    Args:
      argv: the command's words, its own name first.
      own: the flags that --help lists.

    Returns:
      The words that are no flags, the command's name first.

    Raises:
      SystemExit: with one line that names what is wrong: a preset, a config's file, a misspelt field and the nearest.
    """
    if text := said(argv, own):
        sys.stdout.write(text)
        sys.exit(0)
    argv = presets_as_files(argv)
    try:
        argv, values = _config_of_run(argv)
    except settings.ConfigError as error:
        sys.exit(f"error: {error}")
    except Damaged as error:
        sys.exit(f"error: {error}, given --config")
    flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind the images of --mode=caption
    try:
        if values is not None:
            config_flags.DEFINE_config_dict("config", values, sys_argv=argv)
        else:
            about = "A preset or a file; any field: --config.data.max_tokens=30."
            config_flags.DEFINE_config_file("config", None, about, sys_argv=argv)
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, ValueError) as error:  # ValueError: the field is no name at all
        file = given(argv, "config")
        values = _executed(argv[0], file) if file is not None else values
        if values is not None:
            for field in (a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")):
                message = settings.explain_unknown(values, field)
                if message:
                    sys.exit(f"error: {message}")
        raise error

"""The command line: `--config` as a preset, a file or the finished run's own; a flag's fault is one line."""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from eim_jax import __version__
from eim_jax import config as settings
from eim_jax.commands.help import fields, general, presets
from eim_jax.utils.files import Damaged, user_path
from eim_jax.utils.this_machine import versions


def _define_config(argv: list[str]) -> None:
    """--config is a file; without it, the config of the workdir's run, whose fields can be overridden all the same."""
    from eim_jax.losses import table  # noqa: F401 a config names a weight for each loss of this table

    workdir = given(argv, "workdir")
    saved = settings.read_saved(user_path(workdir)) if workdir and given(argv, "config") is None else None
    if saved is not None:
        from eim_jax.training import kinds

        config_flags.DEFINE_config_dict("config", kinds.to_config_dict(saved))
    else:
        config_flags.DEFINE_config_file("config", None, "A preset or a file; any field: --config.data.max_tokens=30.")


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
        _define_config(argv)
    except settings.ConfigError as error:
        sys.exit(f"error: {error}")
    except Damaged as error:
        sys.exit(f"error: {error}, given --config")
    flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind the images of --mode=caption
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, ValueError) as error:  # ValueError: the field is no name at all
        file = given(argv, "config")
        if file is not None:
            alone = flags.FlagValues()  # the file as it stands, without what the command line changes
            command = [argv[0], f"--config={file}"]
            holder = config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=command)
            alone(command)
            for field in (a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")):
                message = settings.explain_unknown(holder.value, field)
                if message:
                    sys.exit(f"error: {message}")
        raise error

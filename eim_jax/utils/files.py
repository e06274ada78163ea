"""Files that appear whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import jax


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path as its user means it: "~" is the home folder, also behind `--flag=`, where no shell expands it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no home folder is known: then it is an ordinary name
        return Path(path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file beside its place and renames it: a kill leaves the old file or the new one.

    Args:
      path: where the file shall stand; its folder is made.
      text: the whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")  # processes that share a folder may write at once
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file as `write_text` does; of several processes, the first one does.

    Args:
      path: where the file shall stand; its folder is made.
      value: what `json.dumps` takes.
      indent: spaces a level; None for one line.
    """
    if jax.process_index() == 0:
        write_text(path, json.dumps(value, indent=indent) + "\n")

"""What `--help` prints: the modes with their flags, the presets, and with `--help=config` every field of a run."""

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eim_jax import configs


class Mode(NamedTuple):
    """One mode: what it does, and the flags that it reads besides those that every mode has."""

    does: str
    flags: tuple[str, ...] = ()


MODES = {
    "train": Mode("trains all arms, scores them, writes the report; continues what was begun (the default)", ("init",)),
    "eval": Mode("scores a finished run again, with the decoding settings given now", ("init",)),
    "caption": Mode("captions image files, or all images in folders", ("images", "init", "arm", "out")),
    "chat": Mode("talks about an image, or without one", ("image", "init", "arm")),
    "inspect": Mode("shows training samples as the losses see them", ("arm", "samples", "neighbours")),
    "export": Mode(
        "writes a trained arm as plain files, and as models that transformers reads",
        ("init", "arm", "out", "dtype", "shard", "merge", "push"),
    ),
    "serve": Mode(
        "serves a finished run: a page in the browser, and OpenAI's chat completions",
        ("host", "port", "arm", "neighbours", "api_key", "max_waiting", "max_body", "ignore_text"),
    ),
    "prepare": Mode("packs a data set into shards for a bucket; needs no workdir", ("out",)),
    "plan": Mode(
        "says what each stage would cost, also on hardware that is not here; needs no workdir",
        ("topology", "arm", "stages", "samples", "table", "meshes", "out"),
    ),
}
USAGE = """usage: eim_jax --config=PRESET_OR_FILE --workdir=FOLDER [--mode=MODE] [--config.FIELD=VALUE ...] [FLAGS]

Vision-language models trained by EIM: segmented stages, contrastive losses against queues of the whole data set.
A workdir remembers its config: later modes need --workdir alone.

  eim_jax --config=miniature --workdir=runs/miniature            the embedded example, minutes on a CPU
  eim_jax --config=photos --workdir=runs/photos --config.data.annotations=captions.json --config.data.images=photos/
  eim_jax --mode=caption --workdir=runs/photos --images=new_photos/

--help=config lists every field, --helpfull every flag of every library, --version the versions."""


def presets() -> dict[str, Path]:
    """Returns the configs that come with the package: name -> file."""
    folder = Path(str(configs.__file__)).parent
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem not in ("__init__", "base")}


def general(flags: Mapping[str, Any]) -> str:
    """Returns the text of `--help`.

    Args:
      flags: name -> flag (with `help` and `default`) of every flag that the command line has of its own.
    """
    own = {name for mode in MODES.values() for name in mode.flags}
    modes = [(name, f"{mode.does}{_list_flags(mode.flags)}") for name, mode in MODES.items()]
    named = [(f"--{name}", _say(flag)) for name, flag in flags.items() if name in own]
    every = [(f"--{name}", _say(flag)) for name, flag in flags.items() if name not in own]
    shipped = [(name, _first_sentence(file)) for name, file in presets().items()]
    parts = [
        USAGE,
        _section("modes", modes),
        _section("flags of a mode", named),
        _section("flags of every mode", every),
    ]
    return "\n\n".join([*parts, _section("presets (--config=NAME)", shipped)]) + "\n"


def fields() -> str:
    """Returns the text of `--help=config`: every field with its type, its default and what it means."""
    from eim_jax.training import kinds  # here: the tables bring the readers of every data set with them

    parts = ["Every field of a run, set by --config.FIELD=VALUE; * is the name of an arm or a stage."]
    for group in kinds.field_groups():
        if group.fields:
            rows = [(f"{f.path} ({f.type}, {f.default!r})", f.said) for f in group.fields]
            parts.append(_section(" ".join(group.said.split("\n\n")[0].split()).rstrip("."), rows, below=True))
    return "\n\n".join(parts) + "\n"


def _list_flags(names: tuple[str, ...]) -> str:
    return f" [{' '.join(f'--{name}' for name in names)}]" if names else ""


def _say(flag: Any) -> str:
    default = "" if flag.default in (None, "", [], False) else f" (default {flag.default})"
    return f"{flag.help}{default}"


def _section(title: str, rows: list[tuple[str, str]], below: bool = False) -> str:
    """A titled list; what is said of a name stands beside it, or `below` it."""
    width = 0 if below else max(len(name) for name, _ in rows) + 2
    lines = [f"{title}:"]
    for name, said in rows:
        if below:
            lines.append(f"  {name}")
            lines += textwrap.wrap(
                said, 110, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
            )
        else:
            first, *rest = textwrap.wrap(said, 112 - width, break_on_hyphens=False) or [""]
            lines += [f"  {name:<{width}}{first}".rstrip(), *(" " * (width + 2) + line for line in rest)]
    return "\n".join(lines)


def _first_sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())

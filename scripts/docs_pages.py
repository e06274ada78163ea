"""What the documentation's site takes from the package: flags, presets, every config field (a hook of mkdocs.yml).

A page holds a line `<!-- generated: NAME -->`; it becomes NAME's table when the site is built.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
RESULTS = ("miniature.html", "miniature-time.html")  # pages of experiments/results that stand beside the results


def on_config(config: Any) -> Any:
    """Puts every page of docs/extend into the menu (mkdocs calls it)."""
    section = next(entry["Extend"] for entry in config.nav if "Extend" in entry)
    section += [f"extend/{file.name}" for file in kind_pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the committed pages of results to the site (mkdocs calls it)."""
    from mkdocs.structure.files import File

    for name in RESULTS:
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(ROOT / "experiments/results" / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is generated (mkdocs calls it)."""
    return MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuses a page that would fetch something when it is read (mkdocs calls it)."""
    from mkdocs.exceptions import PluginError

    fetched = re.search(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>", output)
    if fetched:
        raise PluginError(f"{page.file.src_uri} would fetch {fetched[0]}: put the file into docs/assets")
    return output


def flags() -> str:
    """The flags of `main`, as its --help says them."""
    from absl import flags as absl_flags

    from eim_jax import main
    from eim_jax.commands.help import MODES

    rows = [("`--config`", "A preset or a file; any of its fields: `--config.data.max_tokens=30`.", "all", "")]
    for flag in absl_flags.FLAGS.flags_by_module_dict()[main.__name__]:
        default = "" if flag.default in (None, "", []) else f"`{flag.default}`"
        modes = ", ".join(name for name, mode in MODES.items() if flag.name in mode.flags)
        rows.append((f"`--{flag.name}`", _cell(flag.help), modes or "all", default))
    return _table(("flag", "what", "modes", "default"), rows)


def presets() -> str:
    """Every file of configs/ with the first sentence of its docstring."""
    from eim_jax.commands import help as listing

    rows = []
    for name, file in listing.presets().items():
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append((f"`{name}`", _cell(" ".join(docstring.split("\n\n")[0].split()))))
    return _table(("preset", "what"), rows)


def config() -> str:
    """Every field of a run, a table for each dataclass, with the comment that stands at the field."""
    from eim_jax.training import kinds

    parts = []
    for group in kinds.field_groups():
        rows = [(f"`{f.path}`", f.type, f"`{f.default!r}`".replace("|", "\\|"), _cell(f.said)) for f in group.fields]
        parts += [
            f"## {_heading(group)}",
            _cell(group.said),
            _table(("field", "type", "default", "what"), rows),
        ]
    return "\n\n".join(parts)


def _heading(group: Any) -> str:
    """`stages.*`, or for a data set's own fields the kind that reads them."""
    kind, found, _ = group.said.partition(": ")
    return f"`{kind}`" if found and kind.startswith("data.kind=") else f"`{group.path or 'the run'}`"


def kinds() -> str:
    """The pages of docs/extend with the first sentence of each."""
    rows = []
    for file in kind_pages():
        title, body = file.read_text(encoding="utf-8").removeprefix("# ").split("\n", 1)
        said = re.split(r"(?<=[.:])\s|\n\n", body.strip())[0].rstrip(":.")
        rows.append((f"[{title}]({file.name})", " ".join(said.split())))
    return _table(("page", "in a sentence"), rows)


def kind_pages() -> list[Path]:
    """The pages of docs/extend but its index."""
    return [file for file in sorted((ROOT / "docs/extend").glob("*.md")) if file.name != "index.md"]


GENERATED = {"flags": flags, "presets": presets, "config": config, "kinds": kinds}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

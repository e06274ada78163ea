"""The page's templates and the filters that they use."""

from importlib import resources
from pathlib import Path

import jinja2

from eim_jax.utils.console import duration


def environment(*folders: Path) -> jinja2.Environment:
    """Returns the package's templates, and those of other folders, with the filters that they use."""
    package = resources.files("eim_jax.reporting") / "templates"
    loader = jinja2.ChoiceLoader(
        [
            jinja2.FileSystemLoader(folders),
            jinja2.FunctionLoader(lambda name: package.joinpath(name).read_text("utf-8")),
        ]
    )
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "duration": duration,
        "millions": _millions,
        "count": lambda n: f"{n:,}",
        "bytes": lambda size: f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB",
        "percent": lambda share: f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %",
    }
    return environment


def _millions(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)

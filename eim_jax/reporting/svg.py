"""A matplotlib figure as inline SVG, in the page's own colours, light and dark."""

import io
import re

import matplotlib
from matplotlib.figure import Figure

# matplotlib cannot write CSS variables, so each is drawn in a colour of its own and replaced in the text of the SVG.
INK, GRID, LINES = "#010203", "#010204", tuple(f"#01021{i}" for i in range(6))
CSS = {INK: "currentColor", GRID: "var(--line)"} | {colour: f"var(--c{i})" for i, colour in enumerate(LINES)}

# A file of its own knows nothing of the style of the page that shows it: these are a page's light colours.
_ALONE = (
    "svg{background:#fff;color:#3c444d;font-family:system-ui,'Segoe UI','DejaVu Sans',sans-serif;--line:#dfe1e4;"
    "--c0:#2468c9;--c1:#c4611a;--c2:#22855a;--c3:#8650b8;--c4:#6b7480;--c5:#b5386f}"
)


def text_style(name: str, size: int | float):
    """Returns a context in which figures keep their text as text; `name` makes their element ids repeatable."""
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": size, "text.parse_math": False}
    return matplotlib.rc_context(style)


def inline_svg(figure: Figure, name: str, spoken: str) -> str:
    """Returns the figure as an <svg> element that refers to nothing outside of it.

    Args:
      figure: drawn in INK, GRID and LINES.
      name: unique in the page: it prefixes the element ids.
      spoken: what a screen reader says of it.
    """
    figure.patch.set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue(), name, spoken)


def alone(svg: str) -> str:
    """Returns an element of `inline_svg` as the text of an .svg file, on white."""
    head, body = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_ALONE}</style>{body}\n'


def _inline(svg: str, name: str, label: str) -> str:
    """Keeps the <svg> element alone: page colours, ids of its own, size from its container, nothing to fetch."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head).group()
    prefix = re.sub(r"\W+", "-", name)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", body).replace("xlink:href", "href")
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for colour, value in CSS.items():
        body = body.replace(colour, value)
    spoken = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg {box} role="img" aria-label="{spoken}">{body.strip()}'

"""What the documentation says, as data: pages, fences, inline code, links, headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<skip>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Fence:
    """A block of code: its language, its text, and why it is not run, if it says so."""

    page: Path
    kind: str
    text: str
    skip: str


def text(page: Path) -> str:
    """The whole page."""
    return page.read_text(encoding="utf-8")


def fences(kind: str) -> list[Fence]:
    """Every block of this language."""
    return [
        Fence(page, found["kind"], found["text"], found["skip"] or "")
        for page in PAGES
        for found in FENCE.finditer(text(page))
        if found["kind"] == kind
    ]


def prose(page: Path) -> str:
    """The page without its fences."""
    return FENCE.sub("", text(page))


def inline(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page).replace("\\|", "|"))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(page)))


def anchors(page: Path) -> list[str]:
    """The anchors of the page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]


def commands() -> list[tuple[Path, list[str]]]:
    """(page, words) of every command: the lines of shell fences, and inline code that starts like one."""
    found = [
        (fence.page, line)
        for fence in fences("sh")
        for line in fence.text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    starts = ("python ", "make ", "eim_jax ", "benchmarks/", "scripts/", "--")
    found += [(page, code) for page in PAGES for code in inline(page) if code.startswith(starts) and code[-1] != "/"]
    found += [(fence.page, line) for fence in fences("text") for line in fence.text.splitlines() if line[:2] == "--"]
    split = []
    for page, line in found:
        loop = re.fullmatch(r"for .*?; do (.*); done", line)
        words = shlex.split((loop[1] if loop else line), comments=True)
        split.append((page, words))
    return split

"""How the package speaks: one console, tables, and progress of anything longer than two seconds.

On a terminal, waits show a live bar; in a file or a CI log the same calls print plain lines: a start, a line every ten
seconds, an end.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL = 10.0  # seconds between the lines of a wait when nobody watches a terminal

# Written as \x1b and so on: what a caption, a file name or a message holds must not steer the reader's terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def shown(text: str) -> str:
    r"""Returns the text with its control characters written out.

    >>> shown("a \x1b[31mred\x1b[0m cat")
    'a \\x1b[31mred\\x1b[0m cat'
    """
    return text.translate(_CONTROL)


class _Console(Console):
    def render_str(self, text: str, **options) -> Text:
        return super().render_str(shown(text), **options)


# Markup is off: path patterns such as visual/[^/]+ would be read as styles. A pipe has no width of its own.
console = _Console(
    markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
)


@contextmanager
def silent() -> Iterator[None]:
    """Shows nothing of what its body says: for what is done often, and told in one line by whoever does it."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def duration(seconds: int | float) -> str:
    """Seconds as 0.8 s, 42 s, 3:07 or 2:03:07."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; a column whose cells are all numbers is set to the right, with thousands marked."""
    console.print(title, style="bold", soft_wrap=True)  # as the table's own title it would wrap at the table's width
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@contextmanager
def progress(description: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Shows the progress of anything longer than two seconds; yields `advance(count)`; no count without a `unit`.

    On a terminal a live bar with the time left; elsewhere a line at the start, every ten seconds and at the end.
    """
    start = last = time.monotonic()
    done, of = 0, f"{total:,} {unit}".strip()

    if console.is_interactive:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        with bar:
            task = bar.add_task(description, total=total)

            def advance(count: int = 1) -> None:
                nonlocal done
                done += count
                bar.advance(task, count)

            yield advance
    else:
        console.print(f"{description}: {of}" if unit else description, soft_wrap=True)

        def advance(count: int = 1) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= PLAIN_INTERVAL and 0 < done < total:
                last = now
                left = duration((now - start) / done * (total - done))
                console.print(f"  {done:,}/{total:,} ({done / total:.0%}), {left} left", soft_wrap=True)

        yield advance
    seconds = time.monotonic() - start
    if unit:
        pace = done / max(seconds, 1e-9)
        rate = f" ({pace:,.{0 if pace >= 10 else 1}f}/s)" if seconds >= 1 else ""
        description = f"{description}: {done:,} {unit}"
    else:
        rate = ""
    console.print(f"{description} in {duration(seconds)}{rate}", soft_wrap=True)

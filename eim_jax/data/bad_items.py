"""What is unusable in a data set: the items that loading names, and what is said of them."""

import dataclasses
from collections.abc import Sequence

LONGEST_NAME = 255  # bytes of a file's name on every common file system
_SHOWN = 20  # bad items that an error or a report lists; `bad` holds all


@dataclasses.dataclass(frozen=True)
class BadItem:
    """One unusable item: `kind` is "image", "caption", "row" or the like, `id` its id, `file` where it stands."""

    kind: str
    id: str
    file: str
    problem: str

    def __str__(self) -> str:
        """Returns one readable line."""
        return printable(f"{self.kind} {self.id} ({self.file}): {self.problem}")


class BadDataError(ValueError):
    """Some items of a data set are unusable; `bad` holds all of them, the message the first 20."""

    def __init__(self, where: str, bad: Sequence[BadItem]):
        self.bad = tuple(bad)
        hint = "Repair or remove these, or pass on_bad='drop' to leave them out of the data and of the queues."
        missing = sum(item.kind == "image" and "no such file" in item.problem for item in bad)
        if missing > 1 and missing == len(bad):
            hint = "Is the image folder the right one? " + hint
        super().__init__("\n".join([f"{where}: {counted(bad)}", *listed(bad), hint]))


def counted(bad: Sequence[BadItem]) -> str:
    """Returns the heading of a list of bad items.

    >>> counted([BadItem("image", "3", "3.jpg", "no such file")])
    '1 bad item:'
    """
    return f"{len(bad):,} bad item{'s' if len(bad) > 1 else ''}:"


def listed(bad: Sequence[BadItem]) -> list[str]:
    """Returns a line for each of the first 20 items, and one that counts the rest."""
    lines = [f"  {item}" for item in bad[:_SHOWN]]
    return lines if len(bad) <= _SHOWN else [*lines, f"  ... and {len(bad) - _SHOWN:,} more"]


def check_on_bad(on_bad: str) -> None:
    """Refuses a word that no loader knows.

    Args:
      on_bad: "error": bad items stop the run; "drop": they are left out of the data, hence also of the queues.

    Raises:
      ValueError: it is another word.
    """
    if on_bad not in ("error", "drop"):
        raise ValueError(f"on_bad is {on_bad!r}: give 'error' or 'drop'")


def text_problem(text: str) -> str | None:
    r"""Returns what to say of a text that no tokenizer, file or terminal takes; else None.

    That is half a character, which JSON can escape, or a NUL, at which programs in C end a text.

    >>> text_problem("ab\ud83d")
    "holds half a character, '\\ud83d', at 2"
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, {text[error.start]!a}, at {error.start}"
    return f"holds a NUL, '\\x00', at {text.index(chr(0))}" if "\0" in text else None


def name_problem(name: str) -> str | None:
    """Returns why no file can go by a name, or none that can be written down; else None.

    >>> name_problem("x" * 300)
    'its name is 300 bytes long, more than the 255 that a file name may have: rename it'
    """
    if problem := text_problem(name):
        return f"its name {problem}: rename it"
    longest = max((len(part.encode()) for part in name.split("/")), default=0)
    if longest > LONGEST_NAME:
        return f"its name is {longest} bytes long, more than the {LONGEST_NAME} that a file name may have: rename it"
    return None


def outside(name: str) -> bool:
    r"""Returns whether a file name leads out of the folder that it is looked for in.

    >>> [outside(name) for name in ("a.jpg", "train/a.jpg", "a..b.jpg", "../a.jpg", "/a.jpg", "a/../../b", "C:\\a.jpg")]
    [False, False, False, True, True, True, True]
    """
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or not parts[0] or (len(parts[0]) == 2 and parts[0][1] == ":")


def printable(text: str) -> str:
    """Returns a text as a message may hold it: half characters and control characters as their escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

"""What is unusable in a data set: the items that loading names, and what is said of them."""

import dataclasses
from collections.abc import Sequence

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
        return f"{self.kind} {self.id} ({self.file}): {self.problem}"


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


def half_character(text: str) -> str | None:
    r"""Returns what to say of a text with half a character, which JSON can escape and no tokenizer takes; else None.

    >>> half_character("ab\ud83d")
    "holds half a character, '\\ud83d', at 2"
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, {text[error.start]!a}, at {error.start}"
    return None

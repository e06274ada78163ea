"""Text and JSON files as people's programs write them: with or without a byte-order mark, and named when damaged."""

import codecs
import json
import os
from typing import Any

from eim_jax.utils.files import user_path

# Longest first: UTF-32's mark begins with UTF-16's. Windows' own programs write all of these.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(content: bytes) -> str:
    r"""Returns a file's bytes as text: UTF-8, or what a byte-order mark says; every line end is a \n.

    Raises:
      ValueError: they are no such text; the byte is named.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"is not {name} text (byte {error.start}): save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """Returns a file's text as `decode` does.

    Raises:
      ValueError: it is no text; it names the file and the byte.
      OSError: it cannot be read.
    """
    content = user_path(path).read_bytes()
    try:
        return decode(content)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def parse_json(text: str, once: bool = False) -> Any:
    """Returns what a JSON text holds.

    Args:
      text: the text.
      once: whether a key that stands twice in one object is an error; JSON readers silently keep the last.

    Raises:
      ValueError: it is not JSON, is nested too deeply, or holds a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns what a JSON file holds; a ValueError names a file that is not text or not JSON."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def identifier(value: Any) -> str | None:
    """Returns an id as a text: a text that is not empty, or a whole number (tables write 5 as 5.0); else None.

    >>> [identifier(value) for value in ("a", 5, 5.0, 5.5, "", True, None, float("nan"))]
    ['a', '5', '5', None, None, None, None, None]
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if isinstance(value, bool) or not isinstance(value, int | str) or value == "" else str(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found

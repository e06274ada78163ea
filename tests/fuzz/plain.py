"""What the oracles share: pictures, a plain JSON reader, and ids and texts as any careful reader would take them."""

import codecs
import functools
import io
import json
import math
import os
import pathlib
import unicodedata
from typing import Any

import numpy as np
from PIL import Image

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16"}


@functools.cache
def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A small picture of noise as a file of that kind."""
    noise = np.random.default_rng(seed).integers(0, 256, (8 + seed, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def text_of(file: pathlib.Path) -> str:
    """A file's text: UTF-8, or what its byte-order mark says."""
    content = file.read_bytes()
    codec = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(codec)


def json_of(file: pathlib.Path) -> Any:
    """A JSON file's content."""
    return json.loads(text_of(file).replace("\r\n", "\n").replace("\r", "\n"))


def as_json(value: Any) -> bytes:
    """A JSON file."""
    return json.dumps(value).encode()


def name_of(value: Any) -> str | None:
    """An id as a text; None for what is none."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def sound(text: Any) -> bool:
    """Whether a value is a text that UTF-8 and C take."""
    return isinstance(text, str) and "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text)


def opens(folder: pathlib.Path, name: str) -> bool:
    """Whether PIL decodes a file of a folder, found under either Unicode form, and inside it."""
    if not sound(name) or os.path.isabs(name) or ".." in name.split("/"):
        return False
    for form in (str, lambda n: unicodedata.normalize("NFC", n), lambda n: unicodedata.normalize("NFD", n)):
        try:
            with Image.open(folder / form(name)) as found:
                found.load()
            return True
        except Exception:
            continue
    return False

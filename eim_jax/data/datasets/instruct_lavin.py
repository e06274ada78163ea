"""LaVIN's all_data.json: {"all": [...]} of rows whose prompt is already made, about pictures of COCO or of ScienceQA.

A row is {"instruction", "answer", "image", "image_source", "qid", "options"}. Its picture is COCO's train2014 file of
that name ("mscoco"), or ScienceQA's "{qid}/image.png" ("sqa"), each in a folder of its own.
"""

import re
from collections.abc import Mapping
from typing import Any

from eim_jax.data.text_files import identifier

KEYS = {"instruction", "answer", "image", "image_source", "qid", "options"}
SCIENCEQA = "scienceqa://"  # before the name of a picture of ScienceQA's, in the other folder
_COCO = ("mscoco", "coco")


def is_all_data(text: str) -> bool:
    """Returns whether a file's text is such an object, and no JSON Lines."""
    return re.match(r'\s*\{\s*"all"\s*:\s*\[', text) is not None


def rows(content: Mapping[str, Any]) -> list[Any]:
    """Returns the rows of the object.

    Raises:
      ValueError: it holds another thing beside them.
    """
    others = [key for key in content if key != "all"]
    if others:
        raise ValueError(f'beside "all" it holds {", ".join(map(repr, others))}, which is not read: remove it')
    return content["all"]


def is_row(record: Any) -> bool:
    """Returns whether a row is LaVIN's: an answer in place of Alpaca's output, and where its picture comes from."""
    return isinstance(record, dict) and "answer" in record and "image_source" in record and "output" not in record


def image_of(record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns (what is wrong, the picture's name); "" where nothing is, None where there is no picture."""
    image, source = record.get("image"), record["image_source"]
    if image is None:
        return "", None
    if not isinstance(image, str) or not image.strip():
        return f'"image" must be the name of one file, not {image!r:.60}', None
    if source == "sqa":
        number = identifier(record.get("qid"))
        if number is None:
            return '"qid" is missing, by which ScienceQA\'s picture is found', None
        return "", f"{SCIENCEQA}{number}/image.png"
    if source not in _COCO:
        return f'"image_source" is {source!r:.60}, neither "mscoco" nor "sqa"', None
    return "", image

"""Test pictures with their references and captions, and which words of a caption differ or are in no reference."""

import base64
import difflib
import io
import re
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from eim_jax.reporting.scores import BASELINE

GALLERY = 24  # pictures shown
SIDE = 320  # longest side of an embedded picture, pixels; smaller ones are kept as they are


def gallery(
    captions: Mapping[str, Mapping[str, str]],
    images: Callable[[str], Image.Image | None],
    references: Mapping[str, Sequence[str]],
) -> dict:
    """Returns evenly spaced test images in order of id: references and every arm's caption, differences marked.

    Args:
      captions: arm -> image id -> text.
      images: gives an image by its id, or None.
      references: captions by people, by image id.

    Returns:
      {"items", "total" images with a caption, "compared": the arm that the baseline's captions are compared with, or
      ""}.
    """
    captions = {arm: texts for arm, texts in captions.items() if texts}
    ids = sorted(
        {key for texts in captions.values() for key in texts}, key=lambda key: (not key.isdigit(), len(key), key)
    )
    shown = [ids[i * len(ids) // GALLERY] for i in range(GALLERY)] if len(ids) > GALLERY else ids
    others = [arm for arm in captions if arm != BASELINE]
    compared = others[-1] if BASELINE in captions and others else ""
    items = []
    for key in shown:
        known = {_key(word) for text in references[key] for word in text.split()} if key in references else None
        lines = []
        for arm, texts in captions.items():
            other = captions[compared if arm == BASELINE else BASELINE].get(key) if compared else None
            if key in texts:
                lines.append({"arm": arm, "words": mark(texts[key], other, known)})
        picture, small = embed(images(key))
        items.append(
            {
                "id": key,
                "references": list(references.get(key, ())),
                "captions": lines,
                "same": len({texts.get(key) for texts in captions.values()}) == 1,
                "picture": picture,
                "small": small,
            }
        )
    return {"items": items, "total": len(ids), "compared": compared}


def mark(text: str, other: str | None, known: set[str] | None) -> list[dict]:
    """Returns the words of a caption, each with what is marked in it.

    Args:
      text: the caption.
      other: the caption that it is compared with (by difflib), or None.
      known: the words of the references, or None.

    Returns:
      [{"text", "differs" from the other caption, "absent" from every reference}].
    """
    words = text.split()
    keys = [_key(word) for word in words]
    differs = set(range(len(words))) if other is not None else set()
    if other is not None:
        matcher = difflib.SequenceMatcher(a=[_key(word) for word in other.split()], b=keys, autojunk=False)
        differs -= {i for block in matcher.get_matching_blocks() for i in range(block.b, block.b + block.size)}
    return [
        {"text": word, "differs": i in differs, "absent": known is not None and bool(key) and key not in known}
        for i, (word, key) in enumerate(zip(words, keys, strict=True))
    ]


def _key(word: str) -> str:
    return re.sub(r"[^\w']+", "", word.lower())


def embed(image: Image.Image | None) -> tuple[str, bool]:
    """Returns a data URI, and whether the picture is so small that the page should enlarge its pixels."""
    if image is None:
        return "", False
    image = image.convert("RGB")
    small = max(image.size) < 128
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    if small:
        image.save(data, "PNG", optimize=True)
    else:
        image.save(data, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", small

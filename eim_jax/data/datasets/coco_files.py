"""Caption files as they are read: COCO's own JSON and Karpathy's dataset_coco.json, and which captions can be used."""

import dataclasses
import pathlib
from collections import defaultdict
from typing import Any

from eim_jax.data.bad_items import BadItem, name_problem, text_problem
from eim_jax.data.text_files import identifier, read_json

# Karpathy's train set is his "train" and "restval" together: 113,287 images.
_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


@dataclasses.dataclass
class Raw:
    """A captions file as read: {image id: file}, captions (id, image id, text), and what is wrong so far."""

    images: dict[str, str] = dataclasses.field(default_factory=dict)
    captions: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    bad: list[BadItem] = dataclasses.field(default_factory=list)
    broken: set[str] = dataclasses.field(default_factory=set)  # ids of images that no file can be looked for


def read_annotations(path: pathlib.Path) -> tuple[list[Any], list[Any] | None]:
    """Returns the file's "images" and "annotations" (None in Karpathy's form)."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotation file {path}") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or not content["images"]:
        raise ValueError(f'{path}: needs a list "images" with at least one image, as in captions_train2014.json')
    first = content["images"][0]
    if isinstance(first, dict) and "sentences" in first:
        return content["images"], None
    if not isinstance(content.get("annotations"), list):
        raise ValueError(f'{path}: needs a list "annotations" (COCO), or "sentences" in every image (Karpathy)')
    return content["images"], content["annotations"]


def _add_image(raw: Raw, image_id: str, file: str) -> bool:
    if image_id in raw.images:
        raw.bad.append(BadItem("image", image_id, file, f"image id listed twice (first as {raw.images[image_id]})"))
        return False
    raw.images[image_id] = file
    for what, text in (("id", image_id), ("file name", file)):
        if problem := text_problem(text):
            raw.bad.append(BadItem("image", image_id, file, f"its {what} {problem}"))
            raw.broken.add(image_id)
    return True


def official_form(path: pathlib.Path, records: list[Any], listed: list[Any]) -> Raw:
    """Reads COCO's own form: its "images" and, by image id, its "annotations"."""
    raw = Raw()
    for place, record in enumerate(records):
        where = f"{path.name} images[{place}]"
        image_id = identifier(record.get("id")) if isinstance(record, dict) else None
        file = record.get("file_name") if isinstance(record, dict) else None
        if image_id is None or not isinstance(file, str) or not file:
            raw.bad.append(BadItem("image", str(image_id), where, 'needs "id" and "file_name"'))
        else:
            _add_image(raw, image_id, file)
    count: dict[str, int] = defaultdict(int)
    for place, record in enumerate(listed):
        where = f"{path.name} annotations[{place}]"
        image_id = identifier(record.get("image_id")) if isinstance(record, dict) else None
        text = record.get("caption") if isinstance(record, dict) else None
        if image_id is None or not isinstance(text, str):
            caption_id = str(record.get("id")) if isinstance(record, dict) else "None"
            raw.bad.append(BadItem("caption", caption_id, where, 'needs "image_id" and a text "caption"'))
            continue
        caption_id = identifier(record.get("id")) or f"{image_id}#{count[image_id]}"
        count[image_id] += 1
        raw.captions.append((caption_id, image_id, text))
    return raw


def karpathy_form(path: pathlib.Path, records: list[Any], split: str | None, folder: pathlib.Path | None) -> Raw:
    """Reads Karpathy's form, in which each image has its "sentences": the images of one split, or of all (None)."""
    if split is not None and split not in _KARPATHY:
        raise ValueError(f"split {split!r}: {path} has {', '.join(_KARPATHY)}")
    wanted = None if split is None else _KARPATHY[split]
    # COCO's folders train2014/ and val2014/ as in the file, or all pictures in one folder.
    named = (record.get("filepath") for record in records if isinstance(record, dict))
    subfolders = {name for name in named if isinstance(name, str) and name and not name_problem(name)}
    nested = {name for name in subfolders if folder is not None and (folder / name).is_dir()}
    raw = Raw()
    for place, record in enumerate(records):
        where = f"{path.name} images[{place}]"
        if not isinstance(record, dict):
            raw.bad.append(BadItem("image", "None", where, "is not a record"))
            continue
        if wanted is not None and record.get("split") not in wanted:
            continue
        image_id = identifier(record.get("cocoid", record.get("imgid")))
        file = record.get("filename")
        if image_id is None or not isinstance(file, str) or not file or not isinstance(record.get("sentences"), list):
            raw.bad.append(BadItem("image", str(image_id), where, 'needs "cocoid" or "imgid", "filename", "sentences"'))
            continue
        filepath = record.get("filepath") or ""
        if not isinstance(filepath, str):
            raw.bad.append(BadItem("image", image_id, where, f'its "filepath" is no text, but {filepath!r:.60}'))
            raw.broken.add(image_id)
            filepath = ""
        if not _add_image(raw, image_id, f"{filepath}/{file}" if filepath in nested else file):
            continue
        for number, sentence in enumerate(record["sentences"]):
            text = sentence.get("raw") if isinstance(sentence, dict) else None
            if not isinstance(text, str):
                raw.bad.append(BadItem("caption", f"{image_id}#{number}", where, 'needs a text "raw"'))
                continue
            raw.captions.append((identifier(sentence.get("sentid")) or f"{image_id}#{number}", image_id, text))
    return raw


def good_captions(raw: Raw, path: pathlib.Path, max_chars: int, strip: bool) -> list[tuple[str, str, str]]:
    """Returns the captions that can be used; the others, and images that no caption names, join `raw.bad`."""
    good, seen = [], set()
    for caption_id, image_id, text in raw.captions:
        file = raw.images.get(image_id)
        where = f"image {image_id}, {file or path.name}"
        if file is None:
            raw.bad.append(BadItem("caption", caption_id, where, "its image is not listed"))
        elif not text.strip():
            raw.bad.append(BadItem("caption", caption_id, where, "the text is empty"))
        elif problem := text_problem(text):
            raw.bad.append(BadItem("caption", caption_id, where, f"the text {problem}"))
        elif problem := text_problem(caption_id):
            raw.bad.append(BadItem("caption", caption_id, where, f"its id {problem}"))
        elif len(text) > max_chars:
            raw.bad.append(BadItem("caption", caption_id, where, f"{len(text)} characters, more than {max_chars}"))
        elif caption_id in seen:
            raw.bad.append(BadItem("caption", caption_id, where, "caption id listed twice"))
        else:
            seen.add(caption_id)
            good.append((caption_id, image_id, text.strip() if strip else text))
    named = {image_id for _, image_id, _ in raw.captions}
    for image_id, file in raw.images.items():
        if image_id not in named:
            raw.bad.append(BadItem("image", image_id, file, "it has no caption"))
    return good

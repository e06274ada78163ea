"""COCO captions, or your own photos in the same form: COCO's own JSON and Karpathy's dataset_coco.json."""

import dataclasses
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from eim_jax.data.samples import DrawnImages, FileImages, ImageSource, Sample, Split
from eim_jax.data.validation import BadDataError, BadItem, LoadReport, check_images
from eim_jax.utils.console import console

# Karpathy's train set is his "train" and "restval" together: 113,287 images.
_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class Loaded(NamedTuple):
    """A split and what was wrong with its source."""

    split: Split
    report: LoadReport


@dataclasses.dataclass
class _Raw:
    """The file as read: {image id: file}, captions (id, image id, text), and what is wrong so far."""

    images: dict[str, str] = dataclasses.field(default_factory=dict)
    captions: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    bad: list[BadItem] = dataclasses.field(default_factory=list)


def load_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    split: str | None = None,
    *,
    on_bad: str = "error",
    max_caption_chars: int = 2000,
    strip: bool = True,
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
) -> Loaded:
    """Returns one sample a caption (no instruction), in the file's order, and a report of the bad items.

    Reads {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]} (COCO's form: `split` only
    names the result) or Karpathy's {"images": [{"filename", "filepath", "split", "sentences"}]} (detected; `split` is
    train = his train + restval, val, test, or None for all). Sample ids are the annotation (sentence) ids, or
    "<image id>#<k>" where there are none. White space around captions is removed unless `strip` is False (ClipCap keeps
    it). Every image is decoded once (see checks.py; `cache` remembers the verdict); `images=None` loads text only.

    Bad items are missing or unreadable images, images without a caption, empty or over-long captions, captions of an
    unlisted image, repeated ids. on_bad="error" raises BadDataError listing them; "drop" leaves them out of the split,
    hence also of the queues: of a repeated id the first item stays, an image without a good caption goes.
    """
    if on_bad not in ("error", "drop"):
        raise ValueError(f"on_bad is {on_bad!r}: give 'error' or 'drop'")
    path = pathlib.Path(annotations)
    folder = None if images is None else pathlib.Path(images)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no image folder {folder}")
    records, listed = _read(path)
    raw = _karpathy(path, records, split, folder) if listed is None else _official(path, records, listed)
    captions = _good_captions(raw, path, max_caption_chars, strip)

    ids = list(raw.images)
    broken: set[str] = set()
    if folder is not None:
        files = FileImages(folder, ids, list(raw.images.values()))
        problems = check_images(files, threads, cache)
        raw.bad.extend(BadItem("image", ids[row], files.names[row], problem) for row, problem in problems.items())
        broken = {ids[row] for row in problems}
    if raw.bad and on_bad == "error":
        raise BadDataError(str(path), raw.bad)

    kept = [caption for caption in captions if caption[1] not in broken]
    if not kept:
        raise ValueError(
            f"{path}: no captions{f' of split {split!r}' if split else ''} are left; {len(raw.bad)} bad items"
        )
    used = {image_id for _, image_id, _ in kept}
    ids = [image_id for image_id in ids if image_id in used]
    names = [raw.images[image_id] for image_id in ids]
    source = DrawnImages(ids, _no_image, names) if folder is None else FileImages(folder, ids, names)
    result = caption_split(split or path.stem, kept, source)
    report = LoadReport(tuple(raw.bad), len(raw.images) - len(ids), len(raw.captions) - len(kept))
    if raw.bad:
        console.print(f"{path}: {report}", soft_wrap=True)
    return Loaded(result, report)


def caption_split(name: str, captions: Sequence[tuple[str, str, str]], images: ImageSource) -> Split:
    """Returns one sample a caption (id, image id, text), in order, with every image's captions as its references."""
    row_of = {image_id: row for row, image_id in enumerate(images.ids)}
    references = defaultdict(list)
    for _, image_id, text in captions:
        references[image_id].append(text)
    samples = tuple(Sample(caption_id, row_of[image_id], "", text) for caption_id, image_id, text in captions)
    return Split(name, samples, images, dict(references))


def _no_image(row: int) -> Image.Image:
    raise ValueError("this split was loaded as text only; give load_coco the image folder")


def _read(path: pathlib.Path) -> tuple[list[Any], list[Any] | None]:
    """Returns the file's "images" and "annotations" (None in Karpathy's form)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotation file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or not content["images"]:
        raise ValueError(f'{path}: needs a list "images" with at least one image, as in captions_train2014.json')
    first = content["images"][0]
    if isinstance(first, dict) and "sentences" in first:
        return content["images"], None
    if not isinstance(content.get("annotations"), list):
        raise ValueError(f'{path}: needs a list "annotations" (COCO), or "sentences" in every image (Karpathy)')
    return content["images"], content["annotations"]


def _identifier(value: Any) -> str | None:
    """Returns an id as a string; None for anything but a non-empty string or an integer."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value)


def _add_image(raw: _Raw, image_id: str, file: str) -> bool:
    if image_id in raw.images:
        raw.bad.append(BadItem("image", image_id, file, f"image id listed twice (first as {raw.images[image_id]})"))
        return False
    raw.images[image_id] = file
    return True


def _official(path: pathlib.Path, records: list[Any], listed: list[Any]) -> _Raw:
    raw = _Raw()
    for place, record in enumerate(records):
        where = f"{path.name} images[{place}]"
        image_id = _identifier(record.get("id")) if isinstance(record, dict) else None
        file = record.get("file_name") if isinstance(record, dict) else None
        if image_id is None or not isinstance(file, str) or not file:
            raw.bad.append(BadItem("image", str(image_id), where, 'needs "id" and "file_name"'))
        else:
            _add_image(raw, image_id, file)
    count: dict[str, int] = defaultdict(int)
    for place, record in enumerate(listed):
        where = f"{path.name} annotations[{place}]"
        image_id = _identifier(record.get("image_id")) if isinstance(record, dict) else None
        text = record.get("caption") if isinstance(record, dict) else None
        if image_id is None or not isinstance(text, str):
            identifier = str(record.get("id")) if isinstance(record, dict) else "None"
            raw.bad.append(BadItem("caption", identifier, where, 'needs "image_id" and a text "caption"'))
            continue
        identifier = _identifier(record.get("id")) or f"{image_id}#{count[image_id]}"
        count[image_id] += 1
        raw.captions.append((identifier, image_id, text))
    return raw


def _karpathy(path: pathlib.Path, records: list[Any], split: str | None, folder: pathlib.Path | None) -> _Raw:
    if split is not None and split not in _KARPATHY:
        raise ValueError(f"split {split!r}: {path} has {', '.join(_KARPATHY)}")
    wanted = None if split is None else _KARPATHY[split]
    # COCO's folders train2014/ and val2014/ as in the file, or all pictures in one folder.
    subfolders = {record.get("filepath") for record in records if isinstance(record, dict)} - {None, ""}
    nested = {name for name in subfolders if folder is not None and (folder / name).is_dir()}
    raw = _Raw()
    for place, record in enumerate(records):
        where = f"{path.name} images[{place}]"
        if not isinstance(record, dict):
            raw.bad.append(BadItem("image", "None", where, "is not a record"))
            continue
        if wanted is not None and record.get("split") not in wanted:
            continue
        image_id = _identifier(record.get("cocoid", record.get("imgid")))
        file = record.get("filename")
        if image_id is None or not isinstance(file, str) or not file or not isinstance(record.get("sentences"), list):
            raw.bad.append(BadItem("image", str(image_id), where, 'needs "cocoid" or "imgid", "filename", "sentences"'))
            continue
        filepath = record.get("filepath", "")
        if not _add_image(raw, image_id, f"{filepath}/{file}" if filepath in nested else file):
            continue
        for number, sentence in enumerate(record["sentences"]):
            text = sentence.get("raw") if isinstance(sentence, dict) else None
            if not isinstance(text, str):
                raw.bad.append(BadItem("caption", f"{image_id}#{number}", where, 'needs a text "raw"'))
                continue
            raw.captions.append((_identifier(sentence.get("sentid")) or f"{image_id}#{number}", image_id, text))
    return raw


def _good_captions(raw: _Raw, path: pathlib.Path, max_chars: int, strip: bool) -> list[tuple[str, str, str]]:
    """Returns the captions that can be used; the others, and images that no caption names, join `raw.bad`."""
    good, seen = [], set()
    for caption_id, image_id, text in raw.captions:
        file = raw.images.get(image_id)
        where = f"image {image_id}, {file or path.name}"
        if file is None:
            raw.bad.append(BadItem("caption", caption_id, where, "its image is not listed"))
        elif not text.strip():
            raw.bad.append(BadItem("caption", caption_id, where, "the text is empty"))
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

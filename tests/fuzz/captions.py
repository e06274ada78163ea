"""Caption files in COCO's form and in Karpathy's, with their pictures."""

import functools
import pathlib

from eim_jax.data.datasets.coco import load_coco

from .engine import Format
from .plain import as_json, json_of, name_of, opens, picture, sound

_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
LONGEST = 2000  # characters, max_caption_chars by default


def _coco():
    images = [{"id": i, "file_name": f"{i}.jpg", "license": 1} for i in (5, 3, 9)]
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f" a dög {i} runs {k} "} for k in range(2) for i in (3, 5, 9)
    ]
    pictures = {f"images/{i}.jpg": picture(i) for i in (5, 3, 9)}
    return {"captions.json": as_json({"info": {}, "images": images, "annotations": captions}), **pictures}


def _karpathy():
    splits = {1: "train", 2: "restval", 3: "test", 4: "train"}
    images = [
        {
            "filepath": "val2014" if i % 2 else "train2014", "filename": f"{i}.jpg", "imgid": i, "cocoid": 100 + i,
            "split": split, "sentids": [2 * i, 2 * i + 1],
            "sentences": [{"raw": f"A cat {i}, {k}.", "imgid": i, "sentid": 2 * i + k} for k in range(2)],
        }
        for i, split in splits.items()
    ]  # fmt: skip
    pictures = {f"images/{'val2014' if i % 2 else 'train2014'}/{i}.jpg": picture(i) for i in splits}
    return {"captions.json": as_json({"dataset": "coco", "images": images}), **pictures}


def _read(split, on_bad, folder: pathlib.Path):
    return load_coco(folder / "captions.json", folder / "images", split, on_bad=on_bad, cache=folder / "cache")


def _listed(content, split, folder):
    """(images {id: file}, captions (id, image, text)) of a file as it stands, nothing left out but by split."""
    first = content["images"][0]
    if isinstance(first, dict) and "sentences" in first:
        images, captions = [], []
        for record in content["images"]:
            if not isinstance(record, dict) or (split and record.get("split") not in _KARPATHY[split]):
                continue
            name = name_of(record.get("cocoid", record.get("imgid")))
            place, file = record.get("filepath", ""), record.get("filename")
            nested = sound(place) and place and (folder / "images" / place).is_dir()
            images.append((name, f"{place}/{file}" if nested and isinstance(file, str) else file))
            sentences = record.get("sentences")
            for k, sentence in enumerate(sentences if isinstance(sentences, list) else []):
                said = sentence if isinstance(sentence, dict) else {}
                captions.append((name_of(said.get("sentid")) or f"{name}#{k}", name, said.get("raw")))
        return images, captions
    images = [
        (name_of(r.get("id")), r.get("file_name")) if isinstance(r, dict) else (None, None) for r in content["images"]
    ]
    captions, count = [], {}
    for record in content["annotations"]:
        said = record if isinstance(record, dict) else {}
        image, text = name_of(said.get("image_id")), said.get("caption")
        captions.append((name_of(said.get("id")) or f"{image}#{count.get(image, 0)}", image, text))
        if image is not None and isinstance(text, str):
            count[image] = count.get(image, 0) + 1
    return images, captions


def _check(split, on_bad, folder: pathlib.Path, loaded):
    images, captions = _listed(json_of(folder / "captions.json"), split, folder)
    first = {}
    for name, file in images:
        if name is not None and isinstance(file, str) and file:
            first.setdefault(name, file)
    usable = {name for name, file in first.items() if sound(name) and opens(folder / "images", file)}
    wanted, seen = [], set()
    for name, image, text in captions:
        good = sound(name) and sound(text) and text.strip() and len(text) <= LONGEST
        if image in first and good and name not in seen:
            seen.add(name)
            if image in usable:
                wanted.append((name, first[image], text.strip()))
    found = [(s.id, loaded.split.images.names[s.image], s.response) for s in loaded.split.samples]
    if on_bad == "error":
        assert len(found) == len(captions), "captions are missing"
        assert len(loaded.split.images) == len(images), "images are missing"
    assert sorted(found) == sorted(wanted), "captions are others than the file's"
    assert [row[0] for row in found] == [row[0] for row in wanted], "captions are in another order"
    for row in range(len(loaded.split.images)):
        assert loaded.split.images[row].mode == "RGB", "a picture is not RGB"


def _form(name, files, split, on_bad):
    return Format(
        name, files, functools.partial(_read, split, on_bad), functools.partial(_check, split, on_bad), quick=30
    )


FORMATS = (
    _form("coco", _coco, None, "error"),
    _form("coco-drop", _coco, None, "drop"),
    _form("karpathy", _karpathy, "train", "error"),
    _form("karpathy-drop", _karpathy, "train", "drop"),
)

"""Small data sets of every kind that `prepare` takes, as files and prepared."""

import dataclasses
import json

import numpy as np
from PIL import Image

from eim_jax.config import Arm, Config, Data
from eim_jax.data import shard_writer as writing

SMALL = 4000  # bytes in a shard: several shards for a few pictures
KINDS = ("coco", "scienceqa", "instruct")
DATASET = {"coco": "captions", "scienceqa": "scienceqa", "instruct": "instructions"}


def picture(file, seed):
    """JPEG, PNG, transparent PNG, or a JPEG lying on its side, in turn: what decoders disagree about."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3 + (seed % 4 == 2)), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(
        file, "PNG" if seed % 4 in (1, 2) else "JPEG", **({"exif": exif} if seed % 4 == 3 else {})
    )


def coco(place):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (5, 3, 9, 4, 8, 7, 2)]
    for record in images:
        picture(place / "images" / record["file_name"], record["id"])
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f"a dög {i} runs {k}"}
        for k in range(2)
        for i in (3, 5, 9, 8, 4, 2, 7)
    ]
    (place / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    test = {"images": images[:3], "annotations": [c for c in captions if c["image_id"] in (5, 3, 9)]}
    (place / "test.json").write_text(json.dumps(test))
    return Data(
        annotations=str(place / "captions.json"),
        images=str(place / "images"),
        eval_annotations=str(place / "test.json"),
    )


def scienceqa(place):
    problems = {}
    for i in range(1, 12):
        problems[str(i)] = {
            "question": f"Which {i}?", "choices": ["x", "y", "z"][: 2 + i % 2], "answer": 1, "hint": "h" * (i % 3),
            "image": "image.png" if i % 3 else None, "grade": "grade2", "lecture": "L.", "solution": "S.",
            "split": "train" if i < 9 else "test",
        }  # fmt: skip
        if i % 3:
            picture(place / "images" / problems[str(i)]["split"] / str(i) / "image.png", i)
    ids = {split: [i for i in problems if problems[i]["split"] == split][::-1] for split in ("train", "test")}
    (place / "problems.json").write_text(json.dumps(problems))
    (place / "pid_splits.json").write_text(json.dumps(ids))
    (place / "captions.json").write_text(json.dumps({"captions": {"2": "two", "5": "five"}}))
    return Data(kind="scienceqa", folder=str(place))


def instruct(place):
    rows = []
    for i in range(9):
        image = f"{i % 4}.jpg" if i % 3 else None
        if image:
            picture(place / "images" / image, i % 4)
        turns = [("human", f"what {i}?"), ("gpt", f"a {i}"), ("human", "and then?"), ("gpt", "nothing")]
        rows.append(
            {
                "id": str(i),
                **({"image": image} if image else {}),
                "conversations": [{"from": a, "value": b} for a, b in turns],
            }
        )
    (place / "llava.json").write_text(json.dumps(rows))
    alpaca = [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(6)]
    (place / "alpaca.json").write_text(json.dumps(alpaca))
    sources = (str(place / "llava.json"), (str(place / "alpaca.json"), 0.5))
    return Data(kind="instruct", sources=sources, images=str(place / "images"), multi_turn=True)


def make(tmp_path, kind, **changes):
    """(A kind's config on files, the same on the prepared folder, that folder)."""
    place = tmp_path / kind
    place.mkdir()
    data = dataclasses.replace({"coco": coco, "scienceqa": scienceqa, "instruct": instruct}[kind](place), **changes)
    config, folder = Config(data=data, arm={"eim": Arm()}), tmp_path / f"{kind}-prepared"
    writing.prepare(config, folder, SMALL)
    return config, reading(config, folder), folder


def reading(config, folder, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(folder), **changes))


def shards(folder):
    return sorted(folder.glob("*/1.0.0/*.array_record-*"))


def emptied(file):
    file.write_bytes(b"")

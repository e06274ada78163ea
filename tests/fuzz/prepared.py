"""Folders that --mode=prepare wrote: manifest, index, notes and shards."""

import dataclasses
import functools
import pathlib
import tempfile

from eim_jax.config import Arm, Config, Data
from eim_jax.data.datasets import load_split

from .captions import _coco
from .engine import Format, lay, taken
from .questions import _scienceqa


def _config(kind, folder, **more) -> Config:
    if kind == "coco":
        more = {"annotations": str(folder / "captions.json"), "images": str(folder / "images"), **more}
    else:
        more = {"kind": kind, "folder": str(folder), "splits": ("train", "train", "test"), **more}
    shared = {field.name for field in dataclasses.fields(Data)}
    own = {name: value for name, value in more.items() if name not in shared}
    return Config(data=Data(**{k: v for k, v in more.items() if k in shared}, own=own), arm={"eim": Arm()})


def _source(kind):
    return _coco() if kind == "coco" else _scienceqa()


@functools.cache
def _prepared(kind):
    from eim_jax.data.shard_writer import prepare  # half a second

    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        lay(_source(kind), place / "files")
        prepare(_config(kind, place / "files"), place / "made", 900)
        return {name: content for name, content in taken(place / "made").items() if not name.startswith("cache")}


def _read(kind, folder: pathlib.Path):
    config = _config(kind, folder / "elsewhere", prepared=str(folder))
    split = load_split(config, "train", folder)
    return split, [split.images[row].tobytes() for row in range(len(split.images))]


@functools.cache
def _right(kind):
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        lay(_source(kind), place)
        split = load_split(_config(kind, place), "train", place / "work")
        pixels = [split.images[row].tobytes() for row in range(len(split.images))]
        return split.samples, dict(split.references), split.fingerprint(), pixels


def _check(kind, folder: pathlib.Path, found):
    split, pixels = found
    samples, references, fingerprint, wanted = _right(kind)
    assert split.samples == samples, "other samples"
    assert dict(split.references) == references, "other references"
    assert split.fingerprint() == fingerprint, "another fingerprint"
    assert pixels == wanted, "other pixels"


FORMATS = tuple(
    Format(
        f"prepared-{kind}",
        functools.partial(_prepared, kind),
        functools.partial(_read, kind),
        functools.partial(_check, kind),
        most=2,
        quick=12,
    )
    for kind in ("coco", "scienceqa")
)

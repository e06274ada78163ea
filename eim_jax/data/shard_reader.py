"""Data that --mode=prepare wrote: ArrayRecord shards with the pictures' own bytes, and an index of everything else.

    manifest.json                    what the folder holds, written last
    index/train.json, index/test.json   ids, texts, and each picture's record: all that stays in memory
    captions/1.0.0/                  a TFDS data set (or scienceqa/, instructions/), read by random access

The split is the one that the files give, with the same fingerprint, so a workdir may change between them.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eim_jax.config import ConfigError, Data
from eim_jax.data.datasets import coco, instruct, scienceqa
from eim_jax.data.datasets.scienceqa_prompt import Problem
from eim_jax.data.samples import ImageSource, Sample, Split
from eim_jax.data.validation import BadDataError, BadItem
from eim_jax.utils.images import load_rgb

VERSION = 1  # of the manifest and the index
MANIFEST, PARTIAL, INDEX = "manifest.json", "manifest.partial.json", "index"
DATASETS = {"coco": "captions", "scienceqa": "scienceqa", "instruct": "instructions"}  # TFDS's name for each kind


class PreparedImages(ImageSource):
    """Pictures in ArrayRecord shards, each read and decoded on access; the identity is the file's: name and bytes."""

    def __init__(self, dataset: Path, split: str, images: Mapping[str, Sequence[Any]]):
        import tensorflow_datasets as tfds  # half a second that runs on other data need not wait

        super().__init__(images["id"], images["name"])
        self._sizes, self._records = images["size"], images["record"]
        self._source = tfds.builder_from_directory(dataset).as_data_source(split)

    def content(self, row: int) -> bytes:
        """Returns the picture's file, byte for byte; ValueError when the shard holds something else."""
        content = self._source[self._records[row]]["image"]
        if len(content) != self._sizes[row]:
            raise ValueError(f"its record has {len(content)} bytes, not {self._sizes[row]}: the shard is damaged")
        return content

    def _load(self, row: int) -> Image.Image:
        return load_rgb(io.BytesIO(self.content(row)))

    def identity(self, row: int) -> str:
        """Returns the name and the size in bytes, as FileImages does."""
        return f"{self.names[row]}:{self._sizes[row]}"


def load(data: Data, name: str) -> Split:
    """The split "train" or "test" of the folder `data.prepared`, as its files would give it; opens no picture.

    Errors: FileNotFoundError for a folder without prepared data and for missing shards, ConfigError where the config
    asks for other data than was prepared or its files have changed since, BadDataError where data.on_bad is "error" and
    bad items were left out, ValueError for a damaged folder.
    """
    folder = Path(data.prepared)
    manifest = read_manifest(folder)
    _same_data(data, folder, manifest)
    if name not in manifest["splits"]:
        raise ValueError(f"{folder} holds the splits {', '.join(manifest['splits'])}, not {name!r}")
    stored = manifest["splits"][name].get("same_as", name)
    entry = manifest["splits"][stored]
    bad = [BadItem(**item) for item in entry["bad"]]
    if bad and data.on_bad == "error":
        raise BadDataError(f"{folder}, prepared with on_bad='drop', split {name!r}", bad)
    check_files(folder, manifest)
    index = _read_index(folder / INDEX / f"{stored}.json", entry["index"])
    images = PreparedImages(dataset_folder(folder, data.kind), stored, index["images"])
    if data.kind == "scienceqa":
        problems = [Problem(**{**problem, "choices": tuple(problem["choices"])}) for problem in index["problems"]]
        return scienceqa.qa_split(name, problems, images, data.form, use_caption=data.captions_in_context)
    if data.kind == "coco":
        captions = [(id_, images.ids[row], text) for id_, row, _, text in index["samples"]]
        return coco.caption_split(name, captions, images)
    return Split(name, tuple(Sample(*sample) for sample in index["samples"]), images)


def dataset_folder(folder: Path, kind: str) -> Path:
    """Where the TFDS data set of a prepared folder lies."""
    return folder / DATASETS[kind] / "1.0.0"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; FileNotFoundError without one, ValueError for a damaged or other one."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        if (folder / PARTIAL).exists():
            raise FileNotFoundError(f"{folder}: preparing was interrupted; run the same --mode=prepare again") from None
        hint = "write it with --mode=prepare --out=FOLDER" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder} holds no prepared data (no {MANIFEST}): {hint}") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete the folder and prepare again") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION or "splits" not in manifest:
        raise ValueError(f"{file} is not a manifest of this version of eim_jax: prepare into another folder")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError or ValueError for a shard that is missing or has another size than was written."""
    for name, size in manifest["files"].items():
        try:
            found = os.stat(folder / name).st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder / name} is missing: copy the whole folder, or prepare again") from None
        if found != size:
            raise ValueError(f"{folder / name} has {found:,} bytes, not {size:,}: copy it again, or prepare again")


def settings(data: Data) -> dict[str, Any]:
    """The fields of the config that decide what is prepared, beside the files themselves."""
    if data.kind == "scienceqa":
        return {"splits": list(data.splits)}
    if data.kind == "instruct":
        return {"multi_turn": data.multi_turn, "sources": instruct.shares(data.sources) if data.sources else []}
    return {}


def source_files(data: Data) -> dict[str, Path]:
    """The text files that the config names, by what they are; those that are optional and absent are left out."""
    if data.kind == "scienceqa":
        found = {name: Path(data.folder) / name for name in scienceqa.FILES} if data.folder else {}
        return {name: path for name, path in found.items() if path.exists()}
    if data.kind == "instruct":
        paths = (source if isinstance(source, str) else source[0] for source in data.sources)
        return {f"sources[{place}]": Path(path) for place, path in enumerate(paths)}
    named = {"annotations": data.annotations, "eval_annotations": data.eval_annotations}
    return {field: Path(path) for field, path in named.items() if path}


def digest(file: Path) -> str:
    """The sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _same_data(data: Data, folder: Path, manifest: Mapping[str, Any]) -> None:
    if manifest["kind"] != data.kind:
        raise ConfigError(
            f"config.data.prepared: {folder} was prepared from data of kind {manifest['kind']!r}, but config.data.kind "
            f"is {data.kind!r}"
        )
    for field, wanted in settings(data).items():
        found = manifest["settings"][field]
        if found != wanted and wanted != []:  # sources may be absent where only the prepared folder is at hand
            raise ConfigError(
                f"config.data.{field} is {wanted}, but {folder} was prepared with {found}: prepare another folder"
            )
    for what, file in source_files(data).items():
        # Where the files are at hand they must be the ones prepared; on a pod they usually are not.
        if file.exists() and digest(file) != manifest["sources"].get(what):
            raise ConfigError(
                f"config.data.prepared: {file} is not the file that {folder} was prepared from, or has changed since: "
                "prepare another folder"
            )
    if data.captions_in_context and data.kind == "scienceqa" and "captions.json" not in manifest["sources"]:
        raise ConfigError(f"config.data.captions_in_context: {folder} was prepared without captions.json")


def _read_index(file: Path, sha256: str) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: copy the whole folder, or prepare again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{file} is damaged: copy it again, or prepare again")
    return json.loads(content)

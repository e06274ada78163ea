"""Data that --mode=prepare wrote: ArrayRecord shards with the pictures' own bytes, and an index of everything else.

    manifest.json                    what the folder holds, written last
    index/train.json, index/test.json   ids, texts, and each picture's record: all that stays in memory
    captions/1.0.0/                  a TFDS data set (or scienceqa/, instructions/), read by random access

The split is the one that the files give, with the same fingerprint, so a workdir may change between them.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eim_jax.config import ConfigError, Data
from eim_jax.data.bad_items import BadDataError, BadItem, name_problem, outside
from eim_jax.data.data_set import DataSet, Shards
from eim_jax.data.samples import ImageSource, Split
from eim_jax.utils.files import Damaged, read_json, user_path
from eim_jax.utils.images import load_rgb

VERSION = 1  # of the manifest and the index
MANIFEST, PARTIAL, INDEX = "manifest.json", "manifest.partial.json", "index"


class PreparedImages(ImageSource):
    """Pictures in ArrayRecord shards, each read and decoded on access; the identity is the file's: name and bytes."""

    def __init__(self, dataset: Path, split: str, images: Mapping[str, Sequence[Any]], contents: str = ""):
        import tensorflow_datasets as tfds  # half a second that runs on other data need not wait

        super().__init__(images["id"], images["name"])
        self._sizes, self._records, self._contents = images["size"], images["record"], contents
        self._remedy = f"A shard in {dataset} is damaged: copy the whole folder again, or prepare again."
        try:
            self._source = tfds.builder_from_directory(dataset).as_data_source(split)
        except Exception as error:  # TFDS and protobuf raise many types on damaged notes
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise ValueError(f"{dataset} is damaged ({reason}): copy the whole folder, or prepare again") from error

    def content(self, row: int) -> bytes:
        """Returns the picture's file, byte for byte; ValueError when the shard holds something else."""
        content = self._source[self._records[row]]["image"]
        if len(content) != self._sizes[row]:
            raise ValueError(f"its record has {len(content)} bytes, not {self._sizes[row]}")
        return content

    def _load(self, row: int) -> Image.Image:
        return load_rgb(io.BytesIO(self.content(row)))

    def identity(self, row: int) -> str:
        """Returns the name and the size in bytes, as FileImages does."""
        return f"{self.names[row]}:{self._sizes[row]}"

    def contents(self) -> str:
        """Returns what FileImages said when the folder was prepared; "" for one of an earlier version."""
        return self._contents


def load(data: Data, kind: DataSet, name: str) -> Split:
    """Reads a split of a prepared folder, as its files would give it; opens no picture.

    Args:
      data: a run's `config.data`; its `prepared` names the folder.
      kind: the data set; it has `shards`.
      name: "train" or "test".

    Returns:
      The split, with the fingerprint of the one that was prepared.

    Raises:
      FileNotFoundError: no prepared data in the folder, or a shard is missing.
      ConfigError: the config asks for other data than was prepared, or its files have changed since.
      BadDataError: bad items were left out, and `data.on_bad` is "error".
      ValueError: the folder is damaged, or does not hold this split.
    """
    folder, shards, own = user_path(data.prepared), kind.shards, kind.settings(data)
    manifest = read_manifest(folder)
    _same_data(kind, own, folder, manifest)
    _same_turns(data.seam, folder, manifest["settings"])
    if name not in manifest["splits"]:
        raise ValueError(f"{folder} holds the splits {', '.join(manifest['splits'])}, not {name!r}")
    stored = manifest["splits"][name].get("same_as", name)
    entry = manifest["splits"][stored]
    bad = [BadItem(**item) for item in entry["bad"]]
    if bad and data.on_bad == "error":
        raise BadDataError(f"{folder}, prepared with on_bad='drop', split {name!r}", bad)
    check_files(folder, manifest)
    index = _read_index(folder / INDEX / f"{stored}.json", entry["index"])
    images = PreparedImages(dataset_folder(folder, shards), stored, index["images"], entry.get("contents", ""))
    return shards.split(own, name, index, images)


def dataset_folder(folder: Path, shards: Shards) -> Path:
    """Returns where the TFDS data set of a prepared folder lies."""
    return folder / shards.folder / "1.0.0"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a prepared folder.

    Args:
      folder: what `--mode=prepare --out=` was given.

    Returns:
      Its content.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of another version.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
    except FileNotFoundError:
        if (folder / PARTIAL).exists():
            raise FileNotFoundError(f"{folder}: preparing was interrupted; run the same --mode=prepare again") from None
        hint = "write it with --mode=prepare --out=FOLDER" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder} holds no prepared data (no {MANIFEST}): {hint}") from None
    except Damaged as error:
        raise ValueError(f"{error.what}: prepare again into the same folder") from error
    if manifest.get("version") != VERSION:
        raise ValueError(f"{file} is not a manifest of this version of eim_jax: prepare into another folder")
    try:
        fields = {"kind": str, "settings": dict, "sources": dict, "splits": dict, "files": dict}
        manifest = read_json(file, fields, {"notes": dict})
        _check_entries(file, manifest)
        return manifest
    except Damaged as error:
        raise ValueError(f"{error.what}: prepare again into the same folder") from error


def _check_entries(file: Path, manifest: Mapping[str, Any]) -> None:
    """Raises Damaged for an entry of a manifest that is not of its form."""
    for name, entry in manifest["splits"].items():
        if not isinstance(entry, dict):
            raise Damaged(file, f"splits.{name} is {entry!a:.60}")
        if "same_as" in entry:
            other = entry["same_as"]
            if not isinstance(other, str) or "same_as" in manifest["splits"].get(other, {"same_as": ""}):
                raise Damaged(file, f"splits.{name}.same_as is {other!a:.60}, none of the splits that are written")
            continue
        bad, names = entry.get("bad"), {field.name for field in dataclasses.fields(BadItem)}
        if not isinstance(entry.get("index"), str):
            raise Damaged(file, f"splits.{name}.index is {entry.get('index')!a:.60}, not a sha256")
        items = bad if isinstance(bad, list) else [None]
        if not all(isinstance(item, dict) and item.keys() == names for item in items):
            raise Damaged(file, f"splits.{name}.bad is {bad!a:.60}, not a list of bad items")
    for group, kind in (("files", int), ("notes", str)):
        for name, value in manifest.get(group, {}).items():
            if type(value) is not kind or name_problem(name) or outside(name):
                raise Damaged(file, f"{group} has an entry {name!a:.60}: {value!a:.60}")


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks that every shard is there, with the size that was written, and that the notes beside them are unchanged.

    Args:
      folder: the prepared folder.
      manifest: its manifest.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a shard has another size, or a note is another one.
    """
    for name, size in manifest["files"].items():
        try:
            found = os.stat(folder / name).st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder / name} is missing: copy the whole folder, or prepare again") from None
        if found != size:
            raise ValueError(f"{folder / name} has {found:,} bytes, not {size:,}: copy it again, or prepare again")
    for name, wanted in manifest.get("notes", {}).items():  # folders of earlier versions have none
        try:
            sound = digest(folder / name) == wanted
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder / name} is missing: copy the whole folder, or prepare again") from None
        if not sound:
            raise ValueError(f"{folder / name} is damaged: copy it again, or prepare again")


def digest(file: Path) -> str:
    """Returns the sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _same_data(kind: DataSet, own: Any, folder: Path, manifest: Mapping[str, Any]) -> None:
    if manifest["kind"] != kind.name:
        raise ConfigError(
            f"config.data.prepared: {folder} was prepared from data of kind {manifest['kind']!r}, but config.data.kind "
            f"is {kind.name!r}"
        )
    settings = kind.shards.settings(own)
    # What was prepared and is at its default now is not among them.
    given = {field: getattr(own, field, None) for field in manifest["settings"] if field not in settings}
    for field, wanted in {**{field: value for field, value in given.items() if value}, **settings}.items():
        default = getattr(kind.config(), field, None)  # folders of earlier versions lack newer fields
        found = manifest["settings"].get(field, default)
        if found != wanted:
            raise ConfigError(
                f"config.data.{field} is {wanted}, but {folder} was prepared with {found}: prepare another folder"
            )
    for what, file in kind.shards.sources(own).items():
        # Where the files are at hand they must be the ones prepared; on a pod they usually are not.
        if file.exists() and digest(file) != manifest["sources"].get(what):
            raise ConfigError(
                f"config.data.prepared: {file} is not the file that {folder} was prepared from, or has changed since: "
                "prepare another folder"
            )
    for field, source in kind.shards.needs(own).items():
        if source not in manifest["sources"]:
            raise ConfigError(f"config.data.{field}: {folder} was prepared without {source}")


def _same_turns(seam: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses prompts whose earlier answers are joined otherwise than this run's."""
    found = settings.get("seam", "apart" if settings.get("multi_turn") else "auto")  # auto: there are none
    if "auto" not in (found, seam) and (found == "spaced") != (seam == "spaced"):
        raise ConfigError(
            f"config.data.seam is {seam}, but the conversations in {folder} were prepared with {found}: prepare "
            f"another folder with --config.data.seam={seam}"
        )


def _read_index(file: Path, sha256: str) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: copy the whole folder, or prepare again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{file} is damaged: copy it again, or prepare again")
    return json.loads(content)

"""--mode=prepare: a data set's files into ArrayRecord shards that TFDS reads, with the pictures' bytes untouched."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from eim_jax.config import Config, ConfigError
from eim_jax.data.data_set import Shards
from eim_jax.data.datasets import data_set, load_files
from eim_jax.data.samples import FileImages, Sample, Split
from eim_jax.data.shard_reader import (
    INDEX,
    MANIFEST,
    PARTIAL,
    VERSION,
    check_files,
    dataset_folder,
    digest,
)
from eim_jax.parallel.signals import doing
from eim_jax.utils.console import console, progress
from eim_jax.utils.files import Damaged, check_sums, flush, read_json, room_in, user_path, write_json, write_text

SHARD_BYTES = 256 * 2**20  # about so much in a file: few files for a bucket, little to redo after an interruption
_SPARE = 256 * 2**20  # bytes that stay free on the disk

# What every record holds; "image" is the file itself, b"" for text only.
_PICTURE = {"image": tfds.features.Scalar(np.object_), "image_id": str, "file_name": str}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A split as it is written: its index, and which picture and which samples each record holds."""

    split: Split
    records: list[tuple[int | None, list[Sample]]]  # (image row, samples)
    index: dict[str, Any]
    shard: int  # records in a shard

    @property
    def size(self) -> int:
        return sum(self.index["images"]["size"])


def prepare(config: Config, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the splits of config.data into a folder, or continues where it was interrupted.

    The files are read and checked exactly as a run reads them. A finished shard is never written again. A folder that
    is complete and up to date is left alone.

    Args:
      config: a run's config.
      folder: an empty or new folder, or one that was begun from the same data.
      shard_bytes: about so many bytes of pictures in a file.

    Raises:
      ConfigError: this kind of data cannot be prepared, or the folder holds something else.
      BadDataError: bad items, with `config.data.on_bad="error"`.
      OSError: the disk lacks room.
      ValueError: as the data set's reader says.
    """
    data = dataclasses.replace(config.data, prepared="")
    kind = data_set(data)
    if kind.shards is None:
        raise ConfigError(f"config.data.kind={kind.name!r} draws its pictures, or has no shards: nothing to prepare")
    doing("checking the data")
    shards, own = kind.shards, kind.settings(data)
    known = {"cache", INDEX, shards.folder, MANIFEST, PARTIAL}
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    # A kill in the middle of writing a manifest leaves its partial file, which the next writing removes.
    begun = tuple(f"{name}." for name in known)
    strange = sorted(n for n in names if n not in known and not (n.startswith(begun) and n.endswith(".partial")))
    if strange:
        raise ConfigError(f"--out={folder} holds other things ({', '.join(strange[:3])}): choose an empty folder")
    plans, manifest = {}, {"version": VERSION, "kind": kind.name, "settings": shards.settings(own), "splits": {}}
    manifest["sources"] = {what: digest(file) for what, file in shards.sources(own).items()}
    for name in shards.splits:
        split, bad = load_files(data, name, user_path(data.cache) if data.cache else folder / "cache")
        if split is None:
            raise ConfigError(f"config.data has no split {name!r} to prepare: {kind.unscored}")
        if getattr(split, "turns", False):  # prompts hold earlier answers, joined as a run must join its own
            manifest["settings"]["seam"] = "one_string" if data.seam == "auto" else data.seam
        entry = {"fingerprint": split.fingerprint(), "samples": len(split), "images": len(split.images)}
        entry |= {"contents": split.images.contents()}
        same = [other for other in plans if manifest["splits"][other]["fingerprint"] == entry["fingerprint"]]
        if same:  # one captions file for training and scores
            manifest["splits"][name] = {"same_as": same[0]}
            continue
        plans[name] = _plan(split, shards, shard_bytes)
        manifest["splits"][name] = {**entry, "bad": [dataclasses.asdict(item) for item in bad]}
    if (folder / MANIFEST).exists() and _is_whole(folder, manifest):
        console.print(f"{folder} is prepared and up to date", soft_wrap=True)
        return
    doing("writing shards")
    _write(folder, shards, plans, manifest)
    total = sum(plan.size for plan in plans.values())
    console.print(
        f"prepared {sum(len(plan.split) for plan in plans.values()):,} samples and {total / 2**20:,.1f} MiB of "
        f"pictures in {len(manifest['files']):,} shards: read them with --config.data.prepared={folder}",
        soft_wrap=True,
    )


def _is_whole(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a folder that has a manifest holds all of it; else says what is wrong and takes the manifest away.

    Raises:
      ConfigError: it was prepared from other data.
    """
    file = folder / MANIFEST
    try:
        found = read_json(file, {"kind": str, "settings": dict, "sources": dict, "splits": dict, "files": dict})
        if found.get("version") != VERSION:
            raise ConfigError(f"{file} is not a manifest of this version of eim_jax: prepare into another folder")
        if not all(isinstance(split, dict) for split in found["splits"].values()):
            raise Damaged(file, "its splits are no splits", folder)
        if _essence(found) != _essence(wanted) or _others(found, wanted):
            raise ConfigError(f"--out={folder} was prepared from other files, or with other settings: choose another")
        check_files(folder, found)
        for name, split in found["splits"].items():
            if "index" in split:
                check_sums(folder, {f"{INDEX}/{name}.json": split["index"]})
        return True
    except ConfigError:
        raise
    except (Damaged, FileNotFoundError, ValueError) as error:
        reason = error.what if isinstance(error, Damaged) else str(error).partition(":")[0]
        console.print(f"{reason}: writing what is missing", soft_wrap=True)
        file.unlink()
        return False


def _plan(split: Split, shards: Shards, shard_bytes: int) -> _Plan:
    images = split.images
    # A split that has no picture folder has texts alone.
    sizes = [images.path(row).stat().st_size for row in range(len(images))] if isinstance(images, FileImages) else []
    if len(sizes) != len(images):
        raise ConfigError(f"split {split.name!r}: its images are no files of a folder, which is what shards keep")
    records = shards.records(split)
    record_of = {row: number for number, (row, _) in enumerate(records) if row is not None}
    table = {"id": images.ids, "name": images.names, "size": sizes, "record": [record_of[r] for r in range(len(sizes))]}
    mean = (sum(sizes) + 1000 * len(records)) / len(records)
    return _Plan(split, records, {"images": table, **shards.index(split)}, max(1, round(shard_bytes / mean)))


def _write(folder: Path, shards: Shards, plans: Mapping[str, _Plan], manifest: dict[str, Any]) -> None:
    dataset, partial = dataset_folder(folder, shards), folder / PARTIAL
    _continue_or_clear(folder, dataset, {**manifest, "shards": {name: plan.shard for name, plan in plans.items()}})
    for name, plan in plans.items():
        file = folder / INDEX / f"{name}.json"
        write_text(file, json.dumps(plan.index))
        manifest["splits"][name]["index"] = digest(file)
        with room_in(folder):
            _write_split(dataset, name, plan, shards)
    files = sorted(dataset.glob("*.array_record-*"))
    for file in [*dataset.iterdir(), dataset]:
        flush(file)
    manifest["files"] = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    manifest["notes"] = {str(file.relative_to(folder)): digest(file) for file in sorted(dataset.glob("*.json"))}
    write_json(folder / MANIFEST, manifest)  # last: a folder is complete when it has a manifest
    partial.unlink()


def _continue_or_clear(folder: Path, dataset: Path, wanted: Mapping[str, Any]) -> None:
    """Leaves the whole shards of an interrupted prepare of the same data, removes those of another."""
    partial = folder / PARTIAL
    try:
        if read_json(partial) == json.loads(json.dumps(wanted)):
            for file in {dataset / "dataset_info.json", *dataset.glob("*.json")}:
                read_json(file)  # TFDS does not write them in one piece
            _check_shards(dataset)
            return
        reason = "it was begun from other data"
    except FileNotFoundError as error:
        reason = f"{error.filename} is missing"
    except Damaged as error:
        reason = error.what
    if dataset.exists():
        console.print(f"{dataset} is written anew: {reason}", soft_wrap=True)
        shutil.rmtree(dataset)
    dataset.mkdir(parents=True)
    write_json(partial, wanted)


def _check_shards(dataset: Path) -> None:
    """Opens the shards that TFDS's notes call finished.

    Raises:
      FileNotFoundError: one is missing.
      Damaged: one is cut off or otherwise not what was written.
    """
    file = dataset / "dataset_info.json"
    for split in read_json(file, optional={"splits": list}).get("splits", []):
        try:
            name, lengths = split["name"], [int(length) for length in split["shardLengths"]]
        except (TypeError, KeyError, ValueError) as error:
            raise Damaged(file, f"its splits are no splits: {error}") from error
        for number, length in enumerate(lengths):
            shard = dataset / f"{dataset.parent.name}-{name}.array_record-{number:05d}"
            if not shard.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(shard))
            reader = array_record_module.ArrayRecordReader(str(shard))
            if not reader.ok() or reader.num_records() != length:
                raise Damaged(shard, f"it does not hold {length} records")


def _write_split(dataset: Path, name: str, plan: _Plan, shards: Shards) -> None:
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=shards.folder, version=tfds.core.Version("1.0.0"), data_dir=str(dataset), module_name=__name__
        ),
        features=tfds.features.FeaturesDict(_feature({**_PICTURE, **shards.features})),
        description="Encoded pictures and their texts, prepared by eim_jax.",
    )
    # A builder's download_and_prepare starts again after an interruption; this writer goes on after its last shard.
    writer = tfds.core.SequentialWriter(info, plan.shard, overwrite=False, file_format="array_record")
    writer.initialize_splits([name], fail_if_exists=False)
    done = sum(info.splits[name].shard_lengths)
    if done == len(plan.records):
        return
    if done:
        console.print(f"{name}: continuing after {done:,} of {len(plan.records):,} records", soft_wrap=True)
    need = sum(plan.index["images"]["size"][row] for row, _ in plan.records[done:] if row is not None)
    free = shutil.disk_usage(dataset).free
    if need + _SPARE > free:
        raise OSError(
            f"{name}: {need / 2**30:.1f} GiB of pictures remain to be written to {dataset}, but {free / 2**30:.1f} GiB "
            "are free: make room or choose another --out"
        )
    with progress(f"writing {name}", len(plan.records) - done, "records") as advance:
        records = _examples(plan, shards, done, advance)
        for _ in range(done, len(plan.records), plan.shard):
            writer.add_examples({name: islice(records, plan.shard)})  # a whole shard, and a note that it is
        writer.close_splits([name])


def _feature(form: Any) -> Any:
    """Returns TFDS's feature of a form as `Shards.features` writes it."""
    if isinstance(form, Mapping):
        return {name: _feature(child) for name, child in form.items()}
    if isinstance(form, list):
        return tfds.features.Sequence(_feature(form[0]))
    return {str: tfds.features.Text(), int: tfds.features.Scalar(np.int32)}.get(form, form)


def _examples(plan: _Plan, shards: Shards, start: int, advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yields what each record from `start` on holds."""
    images = plan.split.images
    for row, samples in plan.records[start:]:
        example: dict[str, Any] = {"image": b"", "image_id": "", "file_name": ""}
        if row is not None:
            content = images.path(row).read_bytes()
            if len(content) != plan.index["images"]["size"][row]:
                raise ValueError(f"image id {images.ids[row]} ({images.path(row)}) changed while it was being prepared")
            example = {"image": content, "image_id": images.ids[row], "file_name": images.names[row]}
        advance(1)
        yield example | shards.record(plan.split, samples)


def _essence(manifest: Mapping[str, Any]) -> list[Any]:
    """What two manifests of the same data share."""
    splits = {name: split.get("fingerprint", split.get("same_as")) for name, split in manifest["splits"].items()}
    settings = {"seam": "one_string", **manifest["settings"]}  # as in folders of earlier versions, which do not say it
    return [manifest["kind"], settings, manifest["sources"], splits]


def _others(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether pictures are others than were prepared, of the same names and sizes; folders of old cannot tell."""
    splits = [(found["splits"].get(name, {}), split) for name, split in wanted["splits"].items()]
    return any(old.get("contents", new.get("contents")) != new.get("contents") for old, new in splits)

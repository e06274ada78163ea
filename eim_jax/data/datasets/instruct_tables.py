"""Tables as instruction rows: a Parquet file, or a data set of the Hugging Face hub, with their pictures inside.

A row's columns are the keys of one of the forms. A picture inside a table becomes a file of the cache, named after its
content: equal pictures are one, and a second start writes nothing.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eim_jax.utils.files import room_in, user_path

INSIDE = "inside://"  # before the name of a picture that was inside a table
HUB = "hf://"
FOLDER = "pictures_inside"  # in the cache
_EXTRA = "pip install '.[datasets]' in eim_jax's folder"
_HUB = re.compile(
    HUB + r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?"
)
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


@dataclass(frozen=True)
class HubSource:
    """A split of a data set of the hub, "hf://owner/name/config@revision:split"; all behind the name may be missing."""

    text: str
    repository: str
    config: str | None
    revision: str | None
    split: str

    @classmethod
    def read(cls, text: str) -> "HubSource":
        """Returns what a source says.

        Raises:
          ValueError: it has another form.
        """
        found = _HUB.fullmatch(text)
        if found is None:
            raise ValueError(f"source {text!r}: write hf://owner/name, behind it perhaps /config, @revision, :split")
        return cls(text, found["name"], found["config"], found["revision"], found["split"] or "train")

    @property
    def name(self) -> str:
        """Returns how the source is called in messages and in a prepared folder."""
        return self.text

    @property
    def stem(self) -> str:
        """Returns the beginning of its samples' ids."""
        own = self.repository.rpartition("/")[2]
        return "-".join(filter(None, (own, self.config, self.split)))

    def __str__(self) -> str:
        """Returns the source as it was written."""
        return self.text


def is_table(path: Any) -> bool:
    """Returns whether a source is read as a table."""
    return isinstance(path, HubSource) or path.suffix == ".parquet"


def source_path(path: Any) -> pathlib.Path | HubSource:
    """Returns a source as `data.sources` names it: a file, or a data set of the hub."""
    return HubSource.read(path) if isinstance(path, str) and path.startswith(HUB) else user_path(path)


def read_rows(path: pathlib.Path | HubSource, cache: Any) -> list[tuple[str, Any]]:
    """Returns (where it stands, row) of every row; pictures inside are files of the cache, by the names in the rows.

    Args:
      path: the source.
      cache: the folder that keeps the pictures, None for none.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it cannot be read, or holds pictures and there is no cache.
    """
    records = _hub_records(path) if isinstance(path, HubSource) else _parquet_records(path)
    folder = None if cache is None else user_path(cache) / FOLDER
    return [(f"{path.name} row {row}", _with_files(record, path, folder)) for row, record in enumerate(records)]


def _parquet_records(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet files are read by pyarrow: {_EXTRA}") from None
    if not path.exists():
        raise FileNotFoundError(f"no instruction file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):  # pictures inside make rows large
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


def _hub_records(source: HubSource) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source}: data sets of the hub are read by the datasets library: {_EXTRA}") from None
    try:
        found = datasets.load_dataset(source.repository, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # of many libraries: of the hub, of the file systems, of the formats
        raise ValueError(f"{source}: the datasets library says: {error or type(error).__name__}") from error
    return records_of(found)


def records_of(table: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a `datasets.Dataset`, pictures as the bytes that they were stored in."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, type(feature)(datasets.Image(decode=False)))
    yield from table


def _with_files(record: Mapping[str, Any], path: Any, folder: pathlib.Path | None) -> dict[str, Any]:
    """A row with the names of its pictures' files in place of the pictures; those of columns not read are left out."""
    found = dict(record)
    for key, value in record.items():
        if _is_picture(value):
            found[key] = _file(value, path, folder) if key in ("image", "images") else None
        elif isinstance(value, list) and value and all(map(_is_picture, value)):
            found[key] = [_file(one, path, folder) for one in value] if key == "images" else None
    return found


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _file(picture: Mapping[str, Any], path: Any, folder: pathlib.Path | None) -> str | None:
    content, name = picture["bytes"], picture["path"]
    if content is None and name and pathlib.Path(name).is_absolute():
        content = pathlib.Path(name).read_bytes()
    if content is None:
        return name  # a file of config.data.images
    if folder is None:
        raise ValueError(f"{path} has pictures inside: give `cache`, the folder that keeps them as files")
    suffix = next((suffix for begin, suffix in _SUFFIXES.items() if content.startswith(begin)), ".picture")
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    if not (file.exists() and file.stat().st_size == len(content)):
        _write(file, content)
    return INSIDE + file.name


def _write(file: pathlib.Path, content: bytes) -> None:
    """Writes a picture whole or not at all; without flushing each to the disk, as all pictures are looked at next."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with room_in(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

"""The files that an instruction data set is mixed from: their shares, the rows that a share takes, their ids."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from eim_jax.config import ConfigError
from eim_jax.data.datasets.instruct_lavin import is_row
from eim_jax.data.datasets.instruct_tables import source_path
from eim_jax.data.mixture import Mixture
from eim_jax.data.samples import Sample
from eim_jax.data.text_files import identifier
from eim_jax.utils.console import console


def shares(sources: Sequence[Any] | str | os.PathLike[str]) -> list[list[Any]]:
    """Returns [file name, share] of each source: what a mix of files is, wherever they lie."""
    return [[path.name, share] for path, share, _ in sources_of(sources)]


def sources_of(sources: Sequence[Any] | str | os.PathLike[str]) -> list[tuple[Any, float, str]]:
    """Returns (file or data set of the hub, share, stem made unique) of each source."""
    listed: list[tuple[Any, float, str]] = []
    seen: Counter[str] = Counter()
    for source in [sources] if isinstance(sources, str | os.PathLike) else sources:
        path, share = (source, 1.0) if isinstance(source, str | os.PathLike) else _path_and_share(source)
        if not 0 < share <= 1:
            raise ValueError(f"source {path}: its share is {share}, but must be above 0 and at most 1")
        place = source_path(path)
        stem = place.stem
        seen[stem] += 1
        listed.append((place, share, stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"))
    if not listed:
        raise ValueError("no sources: give at least one instruction file")
    return listed


def _path_and_share(source: Any) -> tuple[Any, float]:
    if isinstance(source, Sequence) and len(source) == 2:
        path, share = source
        if isinstance(path, str | os.PathLike) and isinstance(share, int | float) and not isinstance(share, bool):
            return path, float(share)
    raise ValueError(f"source {source!r}: give a file, or (file, share)")


def taken_rows(count: int, share: float, seed: int, number: int) -> list[int]:
    """Returns the places of the rows that a share takes, in the file's order; at least one of a file with rows."""
    if share == 1:
        return list(range(count))
    size = max(1, round(share * count))
    return sorted(np.random.default_rng([seed, number]).permutation(count)[:size].tolist())


def mixture(samples: Sequence[Sample], mix: Sequence[Any]) -> Mixture:
    """Returns how often the sources of samples are shown, by `data.mix`: a weight a source, in the sources' order.

    Raises:
      ConfigError: a weight is none, or there are more or fewer than sources.
    """
    if not all(isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < 1e9 for w in mix):
        raise ConfigError(f"config.data.mix={mix!r}: give a number above 0 for each of config.data.sources")
    stems = [sample.id.partition("/")[0] for sample in samples]
    names = list(dict.fromkeys(stems))
    if len(names) != len(mix):
        raise ConfigError(
            f"config.data.mix has {len(mix)} weights, but there are samples of {len(names)} sources: {', '.join(names)}"
        )
    places = {name: place for place, name in enumerate(names)}
    mixed = Mixture([places[stem] for stem in stems], mix)
    shown = zip(names, mixed.counts, mixed.rows_of, strict=True)
    parts = ", ".join(f"{count:,} of {name} (of its {len(rows):,})" for name, count, rows in shown)
    console.print(f"mixed by weight: of {len(stems):,} samples an epoch shows, {parts}", soft_wrap=True, markup=False)
    return mixed


def row_ids(stem: str, records: Sequence[Any]) -> list[str]:
    """Returns "{stem}/{the row's own id, or its place}" of each row; a repeated id gets its place behind it."""
    seen: set[str] = set()
    ids = []
    for place, record in enumerate(records):
        own = record.get("qid" if is_row(record) else "id") if isinstance(record, dict) else None
        name = identifier(own) or str(place)
        if name in seen:  # LLaVA's files ask several rows about one image, with one id
            name = f"{name}#{place}"
        seen.add(name)
        ids.append(f"{stem}/{name}")
    return ids

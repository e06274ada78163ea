"""The table of data sets, and what the rest of the program asks of the one that `config.data.kind` names."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eim_jax.config import Config, ConfigError, Data
from eim_jax.config.conversion import no_such_field
from eim_jax.data import shard_reader
from eim_jax.data.bad_items import BadItem
from eim_jax.data.conversation import TOKENIZER
from eim_jax.data.data_set import DataSet
from eim_jax.data.datasets.coco import COCO
from eim_jax.data.datasets.instruct import INSTRUCT
from eim_jax.data.datasets.miniature import MINIATURE
from eim_jax.data.datasets.miniature_chat import MINIATURE_CHAT
from eim_jax.data.datasets.miniature_qa import MINIATURE_QA
from eim_jax.data.datasets.scienceqa import SCIENCEQA
from eim_jax.data.rows import earlier_turns
from eim_jax.data.samples import Split
from eim_jax.utils.files import user_path

# One entry a kind. Your own: DATASETS["mine"] = DataSet(...), in a script or in the config file.
DATASETS: dict[str, DataSet] = {
    "coco": COCO,
    "scienceqa": SCIENCEQA,
    "instruct": INSTRUCT,
    "miniature": MINIATURE,
    "miniature_qa": MINIATURE_QA,
    "miniature_chat": MINIATURE_CHAT,
}


def data_set(data: Data) -> DataSet:
    """Looks up the data set of a config.

    Args:
      data: a run's `config.data`.

    Returns:
      The entry of DATASETS that `data.kind` names.

    Raises:
      ConfigError: there is none.
    """
    if data.kind not in DATASETS:
        near = difflib.get_close_matches(data.kind, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "a kind of your own is added by the file that --config names"
        raise ConfigError(f"config.data.kind: {data.kind!r} is none of {', '.join(DATASETS)}; {hint}")
    return DATASETS[data.kind]


def load_split(config: Config, name: str, workdir: Path) -> Split | None:
    """Loads a split of the configured data set, from its files or from prepared shards.

    Args:
      config: a run's config.
      name: "train", "val" or "test"; "test" stands for `config.data.scored`.
      workdir: the run's work directory, which holds its cache where `config.data.cache` is empty.

    Returns:
      The split, or None where the config gives nothing to score (instruct without MME).

    Raises:
      ConfigError: a field that the data set needs is empty or cannot be meant.
      BadDataError: bad items, with `config.data.on_bad="error"`.
      ValueError, OSError: a file is missing or has another form; the message names it.
    """
    data, kind = config.data, data_set(config.data)
    name = data.scored if name == "test" else name
    if data.prepared and kind.shards and name not in kind.shards.from_files:
        return shard_reader.load(data, kind, name)
    return load_files(data, name, user_path(data.cache) if data.cache else workdir / "cache")[0]


def load_files(data: Data, name: str, cache: Path) -> tuple[Split | None, Sequence[BadItem]]:
    """Loads a split from the data set's own files, or draws it.

    Args:
      data: a run's `config.data`.
      name: "train", "val" or "test".
      cache: the folder that keeps what need not be found out twice.

    Returns:
      The split (None: nothing to score), and the bad items left out of it.

    Raises:
      As `load_split`.
    """
    kind = data_set(data)
    return kind.load(data, kind.settings(data), name, cache)


def chat_prompt(data: Data, question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    """Writes a question asked in `--mode=chat` as the instruction that the model was trained on.

    Args:
      data: the run's `config.data`.
      question: what is asked.
      earlier: the (question, answer) turns before it, joined as `data.seam` says; a data set of single turns passes
        them over.

    Returns:
      The instruction; a data set without any has that of `instruct`, and so has a question in the tokenizer's form.
    """
    kind = data_set(data)
    kind = kind if kind.prompt and data.own.get("template") != TOKENIZER else INSTRUCT
    return kind.prompt(kind.settings(data), question, earlier_turns(earlier, data.seam))


def own_defaults() -> dict[str, Any]:
    """Returns the fields that data sets have for themselves, of all sets together: {name: default}.

    Raises:
      ConfigError: a field has the name of one that all sets share; two sets have a field of one name and of another
        default or type; a field has no default.
    """
    found: dict[str, Any] = {}
    home: dict[str, str] = {}
    shared = {field.name for field in dataclasses.fields(Data)}
    for kind in DATASETS.values():
        for field in dataclasses.fields(kind.config):
            where = f"data set {kind.name!r}: its field {field.name!r}"
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if default is dataclasses.MISSING:
                raise ConfigError(f"{where} needs a default")
            if field.name in shared:
                raise ConfigError(f"{where} stands among the fields that all data sets share: give it another name")
            if field.name in found and (type(found[field.name]), found[field.name]) != (type(default), default):
                raise ConfigError(
                    f"{where} is {default!r} by default, but {found[field.name]!r} in {home[field.name]!r}: use the "
                    "same default, or another name"
                )
            found[field.name] = default
            home.setdefault(field.name, kind.name)
    return found


def complete(config: Config) -> Config:
    """Fills in the fields that data sets have for themselves, of all of DATASETS, at their defaults.

    Args:
      config: a run's config; what it gives stays.

    Returns:
      A config of which a flag or a config file may set every field, and that can be compared with another.
    """
    return dataclasses.replace(config, data=dataclasses.replace(config.data, own=own_defaults() | config.data.own))


def free_on_resume() -> frozenset[str]:
    """Returns the fields of data sets that may change when a run resumes: {"data.mme", ...}."""
    return frozenset(f"data.{name}" for kind in DATASETS.values() for name in kind.free_on_resume)


def check(config: Config) -> None:
    """Checks what `config.data` asks of its data set.

    Args:
      config: a run's config.

    Raises:
      ConfigError: an unknown kind, a field that no data set has, a value of another type, a split that this kind is not
        scored on, or prepared data of a kind that cannot be prepared.
    """
    data, kind, known = config.data, data_set(config.data), own_defaults()
    for name in data.own:
        if name not in known:
            names = [field.name for field in dataclasses.fields(Data) if field.name != "own"]
            raise ConfigError(f"config.data.{name}: {no_such_field(name, [*names, *known])}")
    kind.settings(data)
    if data.prepared and kind.shards is None:
        raise ConfigError(f"config.data.prepared: data of kind {kind.name!r} is drawn, or cannot be prepared")
    if (data.own.get("template") == TOKENIZER) != (data.seam == TOKENIZER) and data.seam != "auto":
        raise ConfigError(
            f"config.data.seam={data.seam!r} with config.data.template={data.own.get('template')!r}: where the "
            "tokenizer's chat template writes the turns, it also joins them; leave config.data.seam at 'auto'"
        )
    if data.scored not in kind.scored:
        splits = ", ".join(kind.scored)
        raise ConfigError(f"config.data.scored={data.scored!r}: data of kind {kind.name!r} is scored on {splits} alone")

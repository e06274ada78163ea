"""Which reader serves config.data.kind: the split "train", "val" or "test" of the configured data set."""

from collections.abc import Sequence
from pathlib import Path

from eim_jax.config import Config, ConfigError, Data
from eim_jax.data import shard_reader
from eim_jax.data.datasets import coco, instruct, mme, scienceqa
from eim_jax.data.miniature import captioning, chat, qa
from eim_jax.data.samples import Split
from eim_jax.data.validation import BadItem

SPLITS = ("train", "val", "test")


def load_split(config: Config, name: str, workdir: Path) -> Split | None:
    """The split "train", "val" or "test" of the configured data set; errors name the field, file or id.

    "test" stands for config.data.scored. None for the test of instruction data without config.data.mme: there is
    nothing to score.
    """
    data = config.data
    name = data.scored if name == "test" else name
    if data.kind == "miniature":
        return captioning.load(name, seed=0, scenes=data.scenes if name == "train" else None)
    if data.kind == "miniature_qa":
        return qa.load(name, seed=0, problems=data.scenes if name == "train" else None, form=data.form)
    if data.kind == "miniature_chat":
        if name == "test":
            return chat.load_yes_no(seed=0)
        return chat.load_chat(name, seed=0, samples=data.scenes if name == "train" else None)
    cache = Path(data.cache) if data.cache else workdir / "cache"
    if data.kind == "instruct" and name != "train":  # tested on MME, which lies in its own folder
        common = {"on_bad": data.on_bad, "threads": data.threads, "cache": cache}
        return mme.load_mme(data.mme, **common).split if data.mme else None
    if data.prepared:
        return shard_reader.load(data, name)
    return load_files(data, name, cache)[0]


def load_files(data: Data, name: str, cache: Path) -> tuple[Split, Sequence[BadItem]]:
    """The split as the files of a coco, scienceqa or instruct data set hold it, and the bad items left out of it."""
    common = {"on_bad": data.on_bad, "threads": data.threads, "cache": cache}
    if data.kind == "scienceqa":
        _given(data.folder, "folder", "the folder that holds problems.json, pid_splits.json and the images")
        if len(data.splits) != 3:
            raise ConfigError(f"config.data.splits: {data.splits} is not three names, for train, val and test")
        options = {"form": data.form, "use_caption": data.captions_in_context}
        loaded = scienceqa.load_scienceqa(data.folder, data.splits[SPLITS.index(name)], **options, **common)
    elif data.kind == "instruct":
        _given(data.sources, "sources", "files of Alpaca's or LLaVA's form, as a tuple")
        loaded = instruct.load_instruct(data.sources, data.images or None, multi_turn=data.multi_turn, **common)
    else:
        annotations, images = data.annotations, data.images
        if name != "train":
            annotations, images = data.eval_annotations or annotations, data.eval_images or images
        _given(annotations, "annotations", "the captions file")
        _given(images, "images", "the folder of the captions' images")
        loaded = coco.load_coco(annotations, images, name, **common)
    return loaded.split, loaded.report.bad


def _given(value, field: str, what: str) -> None:
    if not value:
        raise ConfigError(f"config.data.{field} is empty: give {what}")

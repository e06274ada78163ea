"""COCO captions, or your own photos in the same form: COCO's own JSON and Karpathy's dataset_coco.json."""

import dataclasses
import os
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eim_jax.config import ConfigError, Data
from eim_jax.data.bad_items import BadDataError, BadItem, check_on_bad, counted, listed
from eim_jax.data.data_set import DataSet, Published, Shards, exists
from eim_jax.data.datasets.coco_files import Raw, good_captions, karpathy_form, official_form, read_annotations
from eim_jax.data.held_out import HeldOut, check_share
from eim_jax.data.image_checks import check_images
from eim_jax.data.samples import FileImages, ImageSource, NoImages, Sample, Split
from eim_jax.utils.collector import collector_paused
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading found: the bad items, and how many images and captions were left out because of them."""

    bad: tuple[BadItem, ...]
    dropped_images: int
    dropped_captions: int

    def __str__(self) -> str:
        """Returns a summary of one line, or several when something was left out."""
        if not self.bad:
            return "no bad items"
        head = f"left out {self.dropped_captions} captions and {self.dropped_images} images"
        return "\n".join([f"{head}, because of {counted(self.bad)}", *listed(self.bad)])


class Loaded(NamedTuple):
    """A split and what was wrong with its source."""

    split: Split
    report: LoadReport


def load_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    split: str | None = None,
    *,
    on_bad: str = "error",
    max_caption_chars: int = 2000,
    strip: bool = True,
    outside_images: bool = False,
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
    held_out: HeldOut | None = None,
) -> Loaded:
    """Returns one sample a caption (no instruction), in the file's order, and a report of the bad items.

    Reads {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]} (COCO's form: `split` only
    names the result) or Karpathy's {"images": [{"filename", "filepath", "split", "sentences"}]} (detected; `split` is
    train = his train + restval, val, test, or None for all). Sample ids are the annotation (sentence) ids, or
    "<image id>#<k>" where there are none. White space around captions is removed unless `strip` is False (ClipCap keeps
    it). Every image is decoded once (image_checks.py; `cache` remembers the verdict); `images=None` loads text only.
    A file_name stays inside the folder unless `outside_images` lets it lead out.

    Bad items are missing or unreadable images, images without a caption, empty or over-long captions, captions of an
    unlisted image, repeated ids. on_bad="error" raises BadDataError listing them; "drop" leaves them out of the split,
    hence also of the queues: of a repeated id the first item stays, an image without a good caption goes.

    With `held_out` the split is what its side of a share leaves: see `HeldOut`.
    """
    check_on_bad(on_bad)
    path = user_path(annotations)
    folder = None if images is None else user_path(images)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no image folder {folder}")
    with collector_paused():
        raw = _read(path, split, folder)
        captions = good_captions(raw, path, max_caption_chars, strip)

    ids = list(raw.images)
    broken = set(raw.broken)
    if folder is not None:
        named = {image_id: file for image_id, file in raw.images.items() if image_id not in broken}
        files = FileImages(folder, list(named), list(named.values()))
        problems = check_images(files, threads, cache, outside_images=outside_images)
        raw.bad.extend(BadItem("image", files.ids[row], files.names[row], text) for row, text in problems.items())
        broken |= {files.ids[row] for row in problems}
    if raw.bad and on_bad == "error":
        raise BadDataError(str(path), raw.bad)

    kept = [caption for caption in captions if caption[1] not in broken]
    if not kept:
        raise ValueError(
            f"{path}: no captions{f' of split {split!r}' if split else ''} are left; {len(raw.bad)} bad items"
        )
    good = len(kept), len({image_id for _, image_id, _ in kept})
    if held_out is not None:
        kept = held_out.kept(kept, [image_id for _, image_id, _ in kept], str(path))
    used = {image_id for _, image_id, _ in kept}
    ids = [image_id for image_id in ids if image_id in used]
    names = [raw.images[image_id] for image_id in ids]
    why = "this split was loaded as text only; give load_coco the image folder"
    source = NoImages(ids, names, why) if folder is None else FileImages(folder, ids, names)
    with collector_paused():
        result = caption_split(split or path.stem, kept, source)
    report = LoadReport(tuple(raw.bad), len(raw.images) - good[1], len(raw.captions) - good[0])
    if raw.bad:
        console.print(f"{path}: {report}", soft_wrap=True)
    return Loaded(result, report)


def _read(path: pathlib.Path, split: str | None, folder: pathlib.Path | None) -> Raw:
    """A captions file in either form; what the file itself holds, several times as large, is let go."""
    records, listed = read_annotations(path)
    return karpathy_form(path, records, split, folder) if listed is None else official_form(path, records, listed)


def caption_split(name: str, captions: Sequence[tuple[str, str, str]], images: ImageSource) -> Split:
    """Returns one sample a caption (id, image id, text), in order, with every image's captions as its references."""
    row_of = {image_id: row for row, image_id in enumerate(images.ids)}
    references = defaultdict(list)
    for _, image_id, text in captions:
        references[image_id].append(text)
    samples = tuple(Sample(caption_id, row_of[image_id], "", text) for caption_id, image_id, text in captions)
    return Split(name, samples, images, dict(references))


@dataclasses.dataclass(frozen=True)
class CocoFields:
    """The fields of `config.data` that captions of files alone read."""

    annotations: str = ""  # captions_train*.json, or dataset_coco.json (Karpathy: holds all splits)
    images: str = ""  # folder of the images
    eval_annotations: str = ""  # for val and test; "" = the file above (COCO form: then scores are on training images)
    eval_images: str = ""  # "" = the folder above
    # This share of the images is not trained on; which, says eval_seed. It is scored on where no file is named above.
    eval_share: float = 0.0
    eval_seed: int = 0
    max_caption_chars: int = 2000  # a longer caption is a bad item
    strip: bool = True  # coco: white space around captions is removed (ClipCap keeps it)
    outside_images: bool = False  # whether a file's name may lead out of the folder of the images


def _load(data: Data, own: CocoFields, name: str, cache: pathlib.Path) -> tuple[Split, Sequence[BadItem]]:
    annotations, images, part, held_out = own.annotations, own.images, name, None
    check_share(own.eval_share)
    if own.eval_share and (name == "train" or not own.eval_annotations):  # of what would be trained on
        part, held_out = "train", HeldOut(own.eval_share, own.eval_seed, name != "train")
    elif name != "train":
        annotations, images = own.eval_annotations or annotations, own.eval_images or images
    if not annotations:
        raise ConfigError("config.data.annotations is empty: give the captions file")
    if not images:
        raise ConfigError("config.data.images is empty: give the folder of the captions' images")
    loaded = load_coco(
        annotations,
        images,
        part,
        on_bad=data.on_bad,
        max_caption_chars=own.max_caption_chars,
        strip=own.strip,
        outside_images=own.outside_images,
        threads=data.threads,
        cache=cache,
        held_out=held_out,
    )
    return dataclasses.replace(loaded.split, name=name), loaded.report.bad


def _source_files(own: CocoFields) -> dict[str, pathlib.Path]:
    named = {"annotations": own.annotations, "eval_annotations": own.eval_annotations}
    return {field: user_path(path) for field, path in named.items() if path}


def _prepared_split(own: CocoFields, name: str, index: Mapping[str, Any], images: ImageSource) -> Split:
    captions = [(id_, images.ids[row], text) for id_, row, _, text in index["samples"]]
    return caption_split(name, captions, images)


def _prepared_settings(own: CocoFields) -> dict[str, Any]:
    held_out = {"eval_share": own.eval_share, "eval_seed": own.eval_seed} if own.eval_share else {}
    return held_out | ({} if own.strip else {"strip": False})  # folders of earlier versions say neither


COCO = DataSet(
    "coco",
    CocoFields,
    _load,
    published=Published(566747, 113287, "COCO captions, Karpathy's train + restval"),
    at_hand=lambda own: exists(own.annotations),
    free_on_resume=("eval_annotations", "eval_images"),
    shards=Shards(
        folder="captions",
        features={"captions": [{"id": str, "text": str}]},
        record=lambda split, samples: {"captions": [{"id": s.id, "text": s.response} for s in samples]},
        split=_prepared_split,
        settings=_prepared_settings,
        sources=_source_files,
    ),
)

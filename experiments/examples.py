"""What the rows of a table say about the same test items, and what captions score that no model made."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from eim_jax.data.miniature import captioning, chat, qa
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import caption_scores, metric_of
from eim_jax.reporting.gallery import gallery
from experiments.cells import FAMILIES
from experiments.layout import Table
from experiments.report_tables import Found


def examples(table: Table, found: Found, scale: str) -> dict[str, Any] | None:
    """The first test items by the hash of their ids, with the text of each row (its lowest seed); None: no pictures.

    References are the true captions, or the question with its right answer.
    """
    cells = [(row, found[row.name][min(found[row.name])]) for row in table.rows if found.get(row.name)]
    if not cells or scale != "miniature":
        return None
    said = {row.title: one["examples"] for row, one in cells}
    images, references = _shown(cells[0][0].family)
    if not set().union(*said.values()) <= references.keys():  # rates are compared on the validation split
        return None
    return gallery(said, images, references)


@functools.cache
def _shown(family: str) -> tuple[Callable[[str], Image.Image | None], Mapping[str, tuple[str, ...]]]:
    """(test item's id -> its picture, {id: true texts})."""
    if family == "clipcap":
        scenes = _scenes()
        where = {str(key): place for place, key in enumerate(scenes.images.ids)}
        return lambda key: scenes.images[where[key]], scenes.references
    form = FAMILIES[family].configs["miniature"].get_config().data.form
    split: Split = chat.load_yes_no() if family == "chat" else qa.load("test", form=form)
    samples = {str(sample.id): sample for sample in split.samples}

    def picture(key: str) -> Image.Image | None:
        row = samples[key].image
        return None if row is None else split.images[row]

    return picture, {key: (f"{sample.instruction} {sample.response}",) for key, sample in samples.items()}


@functools.cache
def _scenes() -> captioning.MiniatureSplit:
    return captioning.load("test")


@functools.cache
def anchors() -> list[tuple[str, str]]:
    """What captions without any model score on the miniature's test pictures, for scale: (what, scores)."""
    scenes = _scenes()
    ids = list(scenes.references)
    others = {id_: scenes.references[before][-1] for before, id_ in zip(ids, [*ids[1:], ids[0]], strict=True)}
    fifth = {id_: texts[-1] for id_, texts in scenes.references.items()}
    told = []
    for what, said in (("a fifth true caption", fifth), ("the caption of another picture", others)):
        scores = caption_scores.score(said, {id_: texts[:-1] for id_, texts in scenes.references.items()}, java=False)
        scores |= captioning.attribute_f1(said, scenes.scenes)
        keys = [(metric_of(key), scores[key]) for key in ("Bleu_4", "CIDEr", "shape_colour_f1")]
        told.append((what, ", ".join(f"{how.title} {how.text(value)}" for how, value in keys)))
    return told

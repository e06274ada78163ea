"""What each test item adds to a corpus score, so that the score of any resampling of the items can be had exactly.

Every score here is a function of sums over the items: an item is a row of numbers, rows are added up, and `value` turns
the sums into the score. BLEU's rows are its n-gram counts; a mean's are (value, 1). Items are test images (captions,
yes/no questions) or questions with options.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eim_jax.data.datasets.mme import COGNITION, PERCEPTION, YesNoSplit
from eim_jax.data.miniature.captioning import attribute_counts
from eim_jax.data.miniature.drawing import Scene
from eim_jax.evaluation.metrics import mme
from eim_jax.evaluation.metrics.ptb import ptb_captions
from eim_jax.utils.files import write_text

Rows = list[list[int | float]]

NGRAMS = 4
TASKS = {"mme/perception": PERCEPTION, "mme/cognition": COGNITION}


def value(metric: str, sums: np.ndarray) -> np.ndarray | np.floating:
    """The score of a metric from the sums [..., k] of its items' rows; shape [...]. nan where nothing was counted."""
    sums = np.asarray(sums, np.float64)
    if metric == "Bleu_4":
        return _bleu(sums)
    if metric == "shape_colour_f1":
        return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)
    if metric.startswith("mme/"):
        right, questions, both, pictures = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 4), -1, 0)
        there = pictures > 0
        task = 100 * right / np.maximum(questions, 1) + 100 * both / np.maximum(pictures, 1)
        return np.where(there, task, 0).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / np.where(sums[..., 1] == 0, np.nan, sums[..., 1])


def _bleu(sums: np.ndarray) -> np.ndarray | np.floating:
    """BLEU-4 as coco-caption computes it from (length, reference length, guessed n-grams x 4, right n-grams x 4)."""
    length, reference = sums[..., 0] + 1e-15, sums[..., 1] + 1e-9
    guess, right = sums[..., 2 : 2 + NGRAMS], sums[..., 2 + NGRAMS :]
    precision = np.exp(np.mean(np.log((right + 1e-15) / (guess + 1e-9)), axis=-1))
    ratio = length / reference
    return precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def captions(results: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, Rows]:
    """Rows of Bleu_4 and CIDEr for captions {image id: text}, in their order, by pycocoevalcap's scorers on PTB tokens.

    CIDEr's document frequencies stay those of all images: its value for one image is what the reference reports.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider

    said = {key: ptb_captions([text]) for key, text in results.items()}
    truth = {key: ptb_captions(list(references[key])) for key in results}
    scorer = BleuScorer(n=NGRAMS)
    for key in results:
        scorer += (said[key][0], truth[key])
    bleu = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(other - length), other) for other in counts["reflen"])[1]
        bleu.append([length, closest, *counts["guess"], *counts["correct"]])
    with contextlib.redirect_stdout(sys.stderr):
        _, cider = Cider().compute_score(truth, said)
    return {"Bleu_4": bleu, "CIDEr": [[round(float(score), 5), 1] for score in cider]}


def objects(results: Mapping[str, str], scenes: Mapping[str, Scene]) -> dict[str, Rows]:
    """Rows of the miniature world's F1 of named (colour, shape) pairs: named rightly, named, there."""
    counts = attribute_counts(results, scenes)
    return {"shape_colour_f1": [[int(n) for n in counts[key]["shape_colour"]] for key in results]}


def likelihoods(
    metric: str, nats: np.ndarray, tokens: np.ndarray, item: Sequence[int] | np.ndarray, items: int
) -> dict[str, Rows]:
    """Rows (nats, tokens) of a mean over tokens; `item` [N] is the item of each of the N samples."""
    sums = np.zeros((items, 2))
    np.add.at(sums, np.asarray(item), np.stack([nats, tokens], axis=1))
    return {metric: [[round(float(total), 4), int(count)] for total, count in sums]}


def options(chosen: Mapping[str, int | None], problems: Mapping[str, Any]) -> dict[str, Rows]:
    """Rows of the accuracy of questions with options, of all and of those with a picture (their own metric)."""
    right = {key: int(option == problems[key].answer) for key, option in chosen.items()}
    pictured = {key: int(problems[key].image is not None) for key in chosen}
    return {
        "accuracy/Avg": [[right[key], 1] for key in chosen],
        "accuracy/IMG": [[right[key] * pictured[key], pictured[key]] for key in chosen],
    }


def yes_no(split: YesNoSplit, outputs: Mapping[str, str]) -> dict[str, Rows]:
    """Rows of MME's scores; an item is a task's picture, in the split's order. A row holds four numbers for each task
    that the score sums up: right answers, questions, both answers right, pictures."""
    right: dict[str, list[bool]] = {}
    for key, question in split.questions.items():
        answer = mme.read_answer(outputs[key]) == question.answer.lower()
        right.setdefault(f"{question.task}/{question.image}", []).append(answer)
    there = {question.task for question in split.questions.values()}
    tables = {name: [task for task in tasks if task in there] for name, tasks in TASKS.items()}
    tables |= {"mme/sum": [t for tasks in tables.values() for t in tasks], **{f"mme/{task}": [task] for task in there}}
    rows: dict[str, Rows] = {}
    for name, tasks in tables.items():
        for item, answers in right.items() if tasks else ():
            row, task = np.zeros((len(tasks), 4), int), item.split("/")[0]
            if task in tasks:
                row[tasks.index(task)] = sum(answers), len(answers), all(answers), 1
            rows.setdefault(name, []).append(row.ravel().tolist())
    return rows


def write(path: pathlib.Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes {decoding: {"ids": [...], score: rows}}, one score a line."""
    lines = [
        f"{json.dumps(method)}: {{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(rows, separators=(',', ':'))}" for key, rows in found.items())
        + "\n}"
        for method, found in parts.items()
    ]
    write_text(path, "{" + ",\n".join(lines) + "}\n")

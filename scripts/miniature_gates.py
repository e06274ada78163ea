"""What the miniature towers must do before anything is built on them: see objects and bind colours to shapes."""

from collections.abc import Callable

import numpy as np

from eim_jax.data.miniature.captioning import MiniatureSplit, attribute_f1
from eim_jax.data.miniature.drawing import COLOURS, SHAPES

CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _answers(split: MiniatureSplit) -> np.ndarray:
    """Returns int [scenes 4 2]: 1 + colour and 1 + shape of the thing in each cell, 0 where the cell is empty."""
    answers = np.zeros((len(split.scenes), 4, 2), int)
    for row, scene in zip(answers, split.scenes.values(), strict=True):
        for thing in scene.things:
            row[CELLS.index((thing.row, thing.column))] = (
                1 + list(COLOURS).index(thing.colour),
                1 + SHAPES.index(thing.shape),
            )
    return answers


def _ridge(x: np.ndarray, labels: np.ndarray, classes: int, test: np.ndarray) -> np.ndarray:
    """Fits a linear classifier (ridge regression onto +-1) and returns its labels for `test`; x: f32 [n features]."""
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x, test = ((a - centre) / scale for a in (x, test))
    x, test = (np.concatenate([a, np.ones((len(a), 1))], 1) for a in (x, test))
    targets = 2.0 * np.eye(classes)[labels] - 1.0
    weights = np.linalg.solve(x.T @ x + 0.003 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return (test @ weights).argmax(1)


def cell_patches(seen: np.ndarray) -> np.ndarray:
    """Returns [scenes 4 4v]: the four patch features of each cell of the 2x2 grid, from `see`'s [scenes 17 v]."""
    width = seen.shape[-1]
    grid = seen[:, 1:].reshape(-1, 2, 2, 2, 2, width).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(len(seen), 4, 4 * width)


def probe(
    train: MiniatureSplit, train_features: np.ndarray, held_out: MiniatureSplit, features: np.ndarray
) -> dict[str, float]:
    """Names the thing in each cell by linear probes and scores shape and colour.

    Features: [scenes 4 f], one vector a cell (probes shared by the cells), or [scenes f] (a probe a cell).
    Returns attribute_f1 of the probes' namings on `held_out`.
    """
    known, named = _answers(train), np.zeros((len(features), 4, 2), int)
    for kind, classes in enumerate((1 + len(COLOURS), 1 + len(SHAPES))):
        if features.ndim == 3:
            flat, test = (a.reshape(-1, a.shape[-1]) for a in (train_features, features))
            named[..., kind] = _ridge(flat, known[..., kind].ravel(), classes, test).reshape(-1, 4)
        else:
            for cell in range(4):
                named[:, cell, kind] = _ridge(train_features, known[:, cell, kind], classes, features)
    texts = {}
    for name, cells in zip(held_out.scenes, named, strict=True):
        things = [f"a {list(COLOURS)[c - 1]} {SHAPES[s - 1]}" for c, s in cells if c and s]
        texts[name] = " and ".join(things)
    return attribute_f1(texts, held_out.scenes)


def retrieval(images: np.ndarray, texts: np.ndarray) -> float:
    """Returns top-1 of image -> text: row i of both belongs together; joint features [n j]."""
    images, texts = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (images, texts))
    return float(((images @ texts.T).argmax(1) == np.arange(len(images))).mean())


def in_batches(function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, size: int = 200) -> np.ndarray:
    """Applies `function` to slices of `rows` and joins the results."""
    return np.concatenate([np.asarray(function(rows[i : i + size])) for i in range(0, len(rows), size)])

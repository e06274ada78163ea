"""The miniature world: a captioning task that the package draws and describes itself, for learning, demos and tests.

Downstream training never shows eight of the 64 (colour, shape) pairs; half of the validation and test scenes hold one.
The towers in `towers/` were pretrained on other scenes (see scripts/pretrain_miniature.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from eim_jax.data.miniature.drawing import Dice, Scene, draw, random_scene
from eim_jax.data.miniature.language import captions, parse
from eim_jax.data.samples import DrawnImages, Sample, Split

# Each colour and each shape once: the parts are known from other pairs, their combination is not.
HELD_OUT = frozenset(
    {
        ("red", "diamond"),
        ("orange", "ring"),
        ("yellow", "square"),
        ("green", "heart"),
        ("blue", "cross"),
        ("purple", "triangle"),
        ("white", "star"),
        ("black", "circle"),
    }
)
SCENES = {"train": 1200, "val": 200, "test": 400}
CAPTIONS = 5
# Streams of the random numbers: PRETRAIN is the towers' own, so no downstream scene was seen in pretraining.
STREAMS = {"pretrain": 0, "train": 1, "val": 2, "test": 3}
_PARTS = 8  # streams a split: 0 scene, 1 pixels, 2 captions, the others for later tasks over the same scenes


def dice(split: str, seed: int, index: int, part: int) -> Dice:
    """Returns the random stream of one part (0 scene, 1 pixels, 2 captions) of scene `index` of a split."""
    return Dice(seed, STREAMS[split] * _PARTS + part, index)


@dataclass(frozen=True, eq=False)
class MiniatureSplit(Split):
    """A split that also knows its scenes exactly, `scenes[image id]`, and holds all its images as `pixels`, uint8."""

    scenes: Mapping[str, Scene] = field(default_factory=dict)
    pixels: UInt8[np.ndarray, "scenes 32 32 3"] | None = None
    task: str = field(default="scenes", kw_only=True)


def load(split: str = "train", seed: int = 0, scenes: int | None = None) -> MiniatureSplit:
    """Draws a split of the captioning task: `scenes` pictures with five captions each (empty instruction).

    Scene i is a function of (split, seed, i) alone, the same on every machine, so a smaller split is the start of a
    larger one. "train" never holds a HELD_OUT pair; of "val" and "test" every second scene (odd i) does, the others
    never.
    Default sizes: SCENES.

    Raises:
      ValueError: an unknown split, or fewer than one scene.
    """
    if split not in SCENES:
        raise ValueError(f"the miniature world has no split {split!r}: choose one of {', '.join(SCENES)}")
    count = SCENES[split] if scenes is None else scenes
    if count < 1:
        raise ValueError(f"a split needs at least one scene, not {count}")
    ids, structure, texts = [], {}, {}
    pixels = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        name = f"{split}-{seed}-{i}"
        hidden = split != "train" and i % 2 == 1
        scene = random_scene(
            dice(split, seed, i, 0),
            exclude=frozenset() if hidden else HELD_OUT,
            require=HELD_OUT if hidden else frozenset(),
        )
        pixels[i] = draw(scene, dice(split, seed, i, 1))
        ids.append(name)
        structure[name] = scene
        texts[name] = captions(scene, dice(split, seed, i, 2), CAPTIONS)
    samples = tuple(
        Sample(id=f"{name}-{k}", image=i, instruction="", response=text)
        for i, name in enumerate(ids)
        for k, text in enumerate(texts[name])
    )
    digests = [hashlib.sha256(image).hexdigest()[:16] for image in pixels]
    images = DrawnImages(ids, lambda row: Image.fromarray(pixels[row]), digests)
    return MiniatureSplit(split, samples, images, texts, structure, pixels)


def has_held_out(scene: Scene) -> bool:
    """Whether the scene holds a (colour, shape) pair that downstream training never shows."""
    return bool(scene.pairs & HELD_OUT)


def attribute_counts(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> dict[str, dict[str, np.ndarray]]:
    """Returns what each caption {image id: text} names: {image id: {kind: (rightly named, named, there)}}.

    Kinds: shape_colour, shape, colour, and shape_colour again as "held_out" or "seen" by the scene's pairs.

    Raises:
      ValueError: a caption is of an image that is not in `scenes`.
    """
    unknown = [name for name in captions if name not in scenes]
    if unknown:
        raise ValueError(f"captions of images that are not among the scenes: {', '.join(map(str, unknown[:5]))}")

    def count(said: frozenset, true: frozenset) -> np.ndarray:
        return np.array([len(said & true), len(said), len(true)])

    found = {}
    for name, text in captions.items():
        scene, mentions = scenes[name], parse(text)
        pairs = count(mentions.pairs, scene.pairs)
        found[name] = {
            "shape_colour": pairs,
            "held_out" if has_held_out(scene) else "seen": pairs,
            "colour": count(mentions.colours, frozenset(colour for colour, _ in scene.pairs)),
            "shape": count(mentions.shapes, frozenset(shape for _, shape in scene.pairs)),
        }
    return found


def attribute_f1(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> dict[str, float]:
    """Scores what captions {image id: text} name against the exact scenes, as micro-averaged precision, recall and F1.

    A (colour, shape) pair, a colour or a shape counts once a picture. Keys: shape_colour_{precision,recall,f1},
    shape_f1, colour_f1, and shape_colour_f1_{seen,held_out} over the scenes without and with a held-out pair (absent if
    there are none). Captions may leave things out, so true ones score a little below 1 (the references: 0.98).

    Raises:
      ValueError: a caption is of an image that is not in `scenes`.
    """
    counts: dict[str, np.ndarray] = {}
    for of_one in attribute_counts(captions, scenes).values():
        for key, count in of_one.items():
            counts[key] = counts.get(key, np.zeros(3)) + count

    def f1(key: str) -> float:
        hit, said, true = counts[key]
        return float(2 * hit / max(said + true, 1))

    if not counts:
        return {}
    hit, said, true = counts["shape_colour"]
    scores = {
        "shape_colour_f1": f1("shape_colour"),
        "shape_colour_precision": float(hit / max(said, 1)),
        "shape_colour_recall": float(hit / max(true, 1)),
        "shape_f1": f1("shape"),
        "colour_f1": f1("colour"),
    }
    return scores | {f"shape_colour_f1_{part}": f1(part) for part in ("seen", "held_out") if part in counts}

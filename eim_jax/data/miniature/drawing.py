"""Scenes of the miniature world and how they are drawn: exact structure in, a 32x32 RGB picture out.

The same seed gives the same bytes on every machine and with every library version: randomness is the raw output of the
Philox bit generator (NumPy promises to keep it; it does not promise that for `Generator` methods), and shapes are
inequalities over + - * / alone (Pillow's polygon filling changes between releases).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

SIZE = 32  # pixels; a 2x2 grid of cells of 16 pixels, each cell 2x2 patches of 8
CELL = 16
OVER = 4  # samples a pixel and axis: anti-aliasing

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (215, 30, 35),
    "orange": (248, 135, 20),
    "yellow": (250, 225, 45),
    "green": (25, 140, 50),
    "blue": (35, 70, 210),
    "purple": (135, 40, 165),
    "white": (248, 248, 246),
    "black": (18, 18, 22),
}
RADII = {"small": (4.3, 4.7, 5.1), "big": (6.6, 7.0, 7.4)}
TEXTURES = ("solid", "striped", "dotted")
ROOMY = ("circle", "square", "triangle", "diamond", "heart")  # only these, when big, have room for stripes or dots
# Of middle lightness and weak saturation, so that every colour stands out. The last three appear in pretraining alone.
BACKGROUNDS = {
    "wall": (150, 150, 153),
    "sand": (205, 183, 140),
    "sky": (160, 192, 218),
    "grass": (132, 150, 100),
    "water": (95, 140, 150),
    "wood": (158, 122, 92),
    "bricks": (170, 120, 108),
}
DOWNSTREAM_BACKGROUNDS = ("wall", "sand", "sky", "grass")

T = TypeVar("T")


class Dice:
    """A random stream that is a pure function of (seed, stream, index)."""

    def __init__(self, seed: int, stream: int, index: int):
        self._bits = np.random.Philox(key=np.array([seed, (stream << 40) + index], np.uint64))

    def below(self, n: int) -> int:
        """Returns a whole number in 0..n-1."""
        return int(self._bits.random_raw() % n)

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return (self._bits.random_raw() >> 11) * 2.0**-53 < p

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of `options`, all equally likely."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[tuple[T, int]]) -> T:
        """Returns one of the first members of `options` (value, whole-number weight)."""
        roll = self.below(sum(weight for _, weight in options))
        for value, weight in options:
            roll -= weight
            if roll < 0:
                return value
        raise AssertionError("unreachable: the roll is below the sum of the weights")

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Returns `options` in random order (Fisher-Yates)."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def grain(self, *shape: int) -> np.ndarray:
        """Returns independent uniform noise in [-1, 1) of `shape`, f64 (8 bits of randomness each)."""
        count = int(np.prod(shape))
        raw = np.asarray(self._bits.random_raw(-(-count // 8)), dtype="<u8").view(np.uint8)[:count]
        return raw.reshape(shape) / 128.0 - 1.0


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is and the cell (row, column) of the 2x2 grid it stands in."""

    shape: str
    colour: str
    size: str = "big"
    texture: str = "solid"
    row: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's exact structure: up to four things, in reading order, and the background."""

    things: tuple[Thing, ...]
    background: str = "wall"

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """The (colour, shape) pairs in the picture."""
        return frozenset((thing.colour, thing.shape) for thing in self.things)


def _pair(dice: Dice, exclude: frozenset[tuple[str, str]]) -> tuple[str, str]:
    while True:
        pair = (dice.pick(tuple(COLOURS)), dice.pick(SHAPES))
        if pair not in exclude:
            return pair


def random_scene(
    dice: Dice,
    backgrounds: Sequence[str] = DOWNSTREAM_BACKGROUNDS,
    exclude: frozenset[tuple[str, str]] = frozenset(),
    require: frozenset[tuple[str, str]] = frozenset(),
    counts: Sequence[tuple[int, int]] = ((1, 2), (2, 8), (3, 7), (4, 3)),
) -> Scene:
    """Draws a scene's structure.

    (colour, shape) pairs in `exclude` never occur, one of `require` (if not empty) does; `counts`: (things, weight).
    """
    number = dice.weighted(counts)
    kinds = [_pair(dice, exclude) for _ in range(number)]
    if number >= 2 and dice.chance(0.3):  # "two red circles"
        kinds[1] = kinds[0]
        if number >= 3 and dice.chance(0.3):
            kinds[2] = kinds[0]
    if require and not require & set(kinds):
        kinds[-1] = dice.pick(sorted(require))
    cells = sorted(dice.shuffled(((0, 0), (0, 1), (1, 0), (1, 1)))[:number])
    things = []
    for (colour, shape), (row, column) in zip(dice.shuffled(kinds), cells, strict=True):
        size = "small" if dice.chance(0.4) else "big"
        textured = size == "big" and shape in ROOMY and dice.chance(0.4)
        things.append(Thing(shape, colour, size, dice.pick(TEXTURES[1:]) if textured else "solid", row, column))
    return Scene(tuple(things), dice.pick(tuple(backgrounds)))


# Outer radius 1.05, inner 0.45, as numbers: sine and cosine may differ in the last bit between machines.
_STAR = (
    (0.0, -1.05), (0.2645, -0.3641), (0.9986, -0.3245), (0.4280, 0.1391), (0.6172, 0.8495),
    (0.0, 0.45), (-0.6172, 0.8495), (-0.4280, 0.1391), (-0.9986, -0.3245), (-0.2645, -0.3641),
)  # fmt: skip


def _inside_polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """Even-odd rule."""
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return inside


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the points (x right, y down; unit radius) lie inside the shape."""
    if shape == "circle":
        return x * x + y * y <= 0.90
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.84
    if shape == "triangle":
        return _inside_polygon(x, y, ((0.0, -1.0), (0.98, 0.82), (-0.98, 0.82)))
    if shape == "diamond":
        return 1.35 * abs(x) + abs(y) <= 1.04
    if shape == "star":
        return _inside_polygon(x, y, _STAR)
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) <= np.where(np.maximum(abs(x), abs(y)) <= 0.96, 0.28, -1.0)
    if shape == "ring":
        squared = x * x + y * y
        return (squared <= 1.0) & (squared >= 0.30)
    if shape == "heart":
        u, v = 1.18 * x, 0.12 - 1.18 * y
        body = u * u + v * v - 1.0
        return body * body * body <= u * u * v * v * v
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@cache
def _coverage(shape: str, radius: float, texture: str, dx: int, dy: int, phase: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shares of each pixel of a cell that are the thing [16 16 1], and its second tone [16 16 1]."""
    ticks = (np.arange(CELL * OVER) + 0.5) / OVER - CELL / 2
    px, py = ticks[None, :] - dx / 2, ticks[:, None] - dy / 2  # pixels from the centre, jitter in half pixels
    body = _inside(shape, px / radius, py / radius)
    if texture == "striped":
        tone = np.floor((px + py + phase) / 2.0) % 2 == 0
    elif texture == "dotted":
        u, v = (px + phase) % 4.0 - 2.0, (py + phase) % 4.0 - 2.0
        tone = u * u + v * v <= 1.2
    else:
        tone = np.zeros_like(body)

    def pool(mask: np.ndarray) -> np.ndarray:
        return mask.reshape(CELL, OVER, CELL, OVER).mean((1, 3))[:, :, None]

    return pool(body & ~tone), pool(body & tone)


def _background(name: str, dice: Dice) -> np.ndarray:
    """Returns f64 [32 32 3] grey levels."""
    canvas = np.broadcast_to(np.array(BACKGROUNDS[name], float), (SIZE, SIZE, 3)).copy()
    rows = np.arange(SIZE)
    shift = dice.below(8)
    if name == "sand":
        canvas += 11.0 * dice.grain(SIZE, SIZE, 1)
    elif name == "sky":
        canvas += (rows[:, None, None] - SIZE / 2) * 1.1
    elif name == "grass":  # blades: columns of four pixels
        canvas += 16.0 * np.repeat(dice.grain(SIZE // 4, SIZE, 1), 4, axis=0)
    elif name == "water":
        canvas += np.where((rows + shift) % 8 < 2, 16.0, 0.0)[:, None, None]
    elif name == "wood":
        canvas += 14.0 * dice.grain(1, SIZE, 1)
    elif name == "bricks":
        across = (rows + shift) % 8 == 0
        along = (rows[None, :] + 4 * ((rows[:, None] + shift) // 8 % 2)) % 8 == 0
        canvas += np.where(across[:, None] | along, 28.0, 0.0)[:, :, None]
    return canvas


def draw(scene: Scene, dice: Dice) -> UInt8[np.ndarray, "32 32 3"]:
    """Draws a scene: anti-aliased shapes with jittered place, radius and colour, uneven light and grain."""
    canvas = _background(scene.background, dice)
    for thing in scene.things:
        radius = dice.pick(RADII[thing.size])
        base, second = _coverage(
            thing.shape, radius, thing.texture, dice.below(5) - 2, dice.below(5) - 2, dice.below(4)
        )
        colour = np.array(COLOURS[thing.colour], float) + 14.0 * dice.grain(3)
        light = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 150.0
        tone = 0.5 * colour if light else 0.45 * colour + 140.0
        top, left = thing.row * CELL, thing.column * CELL
        cell = canvas[top : top + CELL, left : left + CELL]
        cell[:] = cell * (1.0 - base - second) + colour * base + tone * second
    canvas *= 0.97 + 0.09 * float(dice.grain(1)[0])
    canvas += 9.0 * dice.grain(SIZE, SIZE, 3)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)

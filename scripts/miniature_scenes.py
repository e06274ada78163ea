"""Scenes for the miniature CLIP's pretraining: groups of the same colours and shapes, bound together differently.

Colour alone tells unrelated pictures apart, so a contrastive loss over them never learns which shape has which colour.
Here every scene sits in a batch beside near copies of itself, in which one thing's shape or colour changed, or two
things swapped colours.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eim_jax.data.miniature.captioning import dice
from eim_jax.data.miniature.drawing import BACKGROUNDS, COLOURS, ROOMY, SHAPES, Dice, Scene, Thing, draw, random_scene
from eim_jax.data.miniature.language import caption

GROUP = 4


def _solid_where_tight(thing: Thing) -> Thing:
    return thing if thing.shape in ROOMY else replace(thing, texture="solid")


def near_copy(scene: Scene, dice: Dice) -> Scene:
    """Returns the scene with one thing's shape or colour changed, or with two things' colours swapped."""
    things = list(scene.things)
    i = dice.below(len(things))
    others = [
        j for j, thing in enumerate(things) if thing.colour != things[i].colour and thing.shape != things[i].shape
    ]
    if others and dice.chance(0.5):
        j = dice.pick(others)
        things[i], things[j] = (
            replace(things[i], colour=things[j].colour),
            replace(things[j], colour=things[i].colour),
        )
    elif dice.chance(0.7):  # shapes are harder than colours
        things[i] = replace(things[i], shape=dice.pick([s for s in SHAPES if s != things[i].shape]))
    else:
        things[i] = replace(things[i], colour=dice.pick([c for c in COLOURS if c != things[i].colour]))
    return Scene(tuple(map(_solid_where_tight, things)), scene.background)


def scenes(count: int, counts: Sequence[tuple[int, int]], seed: int, first: int = 0) -> list[Scene]:
    """Returns `count` (a multiple of GROUP) scenes, each group the near copies of its first scene."""
    found = []
    for index in range(first, first + count // GROUP):
        rng = dice("pretrain", seed, index, 0)
        scene = random_scene(rng, tuple(BACKGROUNDS), counts=counts)
        found += [scene, *(near_copy(scene, rng) for _ in range(GROUP - 1))]
    return found


def pictures(found: Sequence[Scene], seed: int, first: int = 0) -> np.ndarray:
    """Draws the scenes: uint8 [scenes 32 32 3]."""
    return np.stack([draw(scene, dice("pretrain", seed, first + i, 1)) for i, scene in enumerate(found)])


def descriptions(found: Sequence[Scene], seed: int, each: int, first: int = 0) -> list[list[str]]:
    """Returns `each` detailed captions a scene that name every thing."""
    streams = (dice("pretrain", seed, first + i, 2) for i in range(len(found)))
    return [
        [caption(scene, rng, detail=0.5, partial=0.0) for _ in range(each)]
        for scene, rng in zip(found, streams, strict=True)
    ]

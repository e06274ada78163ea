"""The language of the miniature world: a grammar that says true things of a scene, and the way back to its objects."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from eim_jax.data.miniature.drawing import COLOURS, Dice, Scene, Thing

# First the common word, then the rarer ones (a quarter of the time).
NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
}
PLURALS = {"box": "boxes", "cross": "crosses"}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {"purple": ("purple", "violet")}
SIZE_WORDS = {"big": ("big", "large"), "small": ("small", "little")}
TEXTURE_WORDS = {"striped": ("striped",), "dotted": ("dotted", "spotted")}
TEXTURE_PHRASES = {"striped": ("with stripes",), "dotted": ("with dots", "with spots")}
NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = {
    "left": ("to the left of", "left of", "next to", "beside"),
    "right": ("to the right of", "right of", "next to", "beside"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
GROUNDS = {
    "wall": ("on a grey wall", "against a grey wall", "on a grey background"),
    "sand": ("on the sand", "on sand", "on a sandy beach"),
    "sky": ("in the sky", "against the sky", "in a pale sky"),
    "grass": ("on the grass", "on grass", "in a field of grass"),
    "water": ("on the water", "in the water", "in a lake"),
    "wood": ("on a wooden table", "on wood", "on a wooden floor"),
    "bricks": ("on a brick wall", "against a brick wall", "in front of bricks"),
}


class Group(NamedTuple):
    """Things of one colour and shape, named together: "two red circles"."""

    things: tuple[Thing, ...]

    @property
    def first(self) -> Thing:
        """The member that comes first in reading order."""
        return self.things[0]


def groups(scene: Scene) -> list[Group]:
    """Returns the scene's things by (colour, shape), in reading order of the first member."""
    found: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.things:
        found.setdefault((thing.colour, thing.shape), []).append(thing)
    return [Group(tuple(things)) for things in found.values()]


def relation(a: Group, b: Group) -> str | None:
    """Returns how `a` stands to `b`: "left", "right", "above", "below", or None.

    Every thing of `a` stands so to every thing of `b` in a shared row (column); diagonal neighbours have no relation.
    """
    rows, columns = ([{getattr(t, axis) for t in g.things} for g in (a, b)] for axis in ("row", "column"))
    if rows[0] & rows[1]:
        if max(columns[0]) < min(columns[1]):
            return "left"
        if min(columns[0]) > max(columns[1]):
            return "right"
    if columns[0] & columns[1]:
        if max(rows[0]) < min(rows[1]):
            return "above"
        if min(rows[0]) > max(rows[1]):
            return "below"
    return None


def _mostly_first(words: Sequence[str], dice: Dice) -> str:
    return words[0] if len(words) == 1 or not dice.chance(0.25) else dice.pick(words[1:])


def plural(noun: str) -> str:
    """Returns the noun's plural."""
    return PLURALS.get(noun, noun + "s")


def noun_phrase(group: Group, dice: Dice, detail: float = 0.4) -> str:
    """Names a group: article or number, perhaps size and texture, colour, noun.

    Size is said with probability `detail`, texture more often, and only if all the group's things share it.
    """
    first, count = group.first, len(group.things)
    words, tail = [], ""
    if len({t.size for t in group.things}) == 1 and dice.chance(detail):
        words.append(_mostly_first(SIZE_WORDS[first.size], dice))
    if first.texture != "solid" and len({t.texture for t in group.things}) == 1 and dice.chance(1.5 * detail):
        if dice.chance(0.7):
            words.append(_mostly_first(TEXTURE_WORDS[first.texture], dice))
        else:
            tail = " " + _mostly_first(TEXTURE_PHRASES[first.texture], dice)
    words.append(_mostly_first(COLOUR_WORDS[first.colour], dice))
    noun = _mostly_first(NOUNS[first.shape], dice)
    words.append(noun if count == 1 else plural(noun))
    start = NUMBERS[count] if count > 1 else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([start, *words]) + tail


def corner(thing: Thing, dice: Dice) -> str:
    """Returns the words for a thing's place: "in the top left corner"."""
    vertical = dice.pick(("top", "upper")) if thing.row == 0 else dice.pick(("bottom", "lower"))
    return f"in the {vertical} {('left', 'right')[thing.column]} corner"


def _listing(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _opened(body: str, plural_first: bool, ground: str, dice: Dice) -> str:
    """Puts a noun phrase into a sentence, with the background in front, behind or not at all."""
    verb = "are" if plural_first else "is"
    opening = dice.weighted((("", 6), (f"there {verb} ", 3), ("a picture of ", 1), ("we see ", 1)))
    if ground and opening.startswith("there") and dice.chance(0.3):
        return f"{ground} there {verb} {body}"
    return f"{opening}{body} {ground}".rstrip()


def _side_by_side(a: Group, b: Group, dice: Dice, detail: float) -> str:
    """Two groups, with the relation between them more often than not where there is one."""
    place = relation(a, b)
    if place is None or dice.chance(0.3):
        first = noun_phrase(a, dice, detail)
        joint = dice.weighted((("and", 6), ("with", 2), ("near", 1)))
        return f"{first} {joint} {noun_phrase(b, dice, detail)}"
    first = noun_phrase(a, dice, detail)
    return f"{first} {_mostly_first(RELATIONS[place], dice)} {noun_phrase(b, dice, detail)}"


def caption(scene: Scene, dice: Dice, detail: float = 0.4, partial: float = 0.12) -> str:
    """Returns one true English sentence about the scene, lower case, ending in ".".

    It names every group of things, unless (probability `partial`, from three groups on) some are only "other shapes".
    """
    found = groups(scene)
    if dice.chance(0.3):
        found = dice.shuffled(found)
    ground = dice.pick(GROUNDS[scene.background]) if dice.chance(0.45) else ""

    name = functools.partial(noun_phrase, dice=dice, detail=detail)
    pair = functools.partial(_side_by_side, dice=dice, detail=detail)
    several = len(found[0].things) > 1
    if len(found) == 1:
        (group,) = found
        place = ""
        if not several and dice.chance(0.4):
            place = " " + corner(group.first, dice)
        elif several and dice.chance(0.4):
            same_row = len({t.row for t in group.things}) == 1
            same_column = len({t.column for t in group.things}) == 1
            place = " side by side" if same_row else " one above the other" if same_column else ""
        text = _opened(name(group) + place, several, ground, dice)
    elif len(found) == 2:
        a, b = found
        place = relation(a, b)
        if place is not None and dice.chance(0.3):
            text = f"{name(a)} {'are' if several else 'is'} {_mostly_first(RELATIONS[place], dice)} {name(b)} {ground}"
        else:
            text = _opened(pair(a, b), several, ground, dice)
    elif dice.chance(partial):
        if dice.chance(0.5):
            other = "another shape" if sum(len(g.things) for g in found[2:]) == 1 else "other shapes"
            text = _opened(f"{name(found[0])}, {name(found[1])} and {other}", several, ground, dice)
        else:
            total = f"{NUMBERS[len(scene.things)]} shapes {ground}".rstrip()
            text = f"{total}, with {name(found[0])} among them" if several else f"{total}, one of them {name(found[0])}"
    elif len(found) == 3:
        a, b, c = found
        body = dice.pick((f"{pair(a, b)}, and {name(c)}", _listing([name(g) for g in found])))
        text = _opened(body, several, ground, dice)
    else:
        a, b, c, d = found
        body = dice.pick((f"{pair(a, b)}, and {pair(c, d)}", _listing([name(g) for g in found])))
        text = _opened(body, several, ground, dice)
    return " ".join(text.split()) + "."


def captions(scene: Scene, dice: Dice, count: int = 5) -> list[str]:
    """Returns `count` differing captions of the scene."""
    found: list[str] = []
    while len(found) < count:
        text = caption(scene, dice)
        if text not in found:
            found.append(text)
    return found


_SHAPE_OF = {word: shape for shape, nouns in NOUNS.items() for noun in nouns for word in (noun, plural(noun))}
_COLOUR_OF = {word: colour for colour, words in COLOUR_WORDS.items() for word in words}
_WORDS = re.compile(rf"\b(?:{'|'.join(sorted((*_SHAPE_OF, *_COLOUR_OF), key=len, reverse=True))})\b")


class Mentions(NamedTuple):
    """What a sentence names: (colour, shape) pairs, and the colours and shapes on their own."""

    pairs: frozenset[tuple[str, str]]
    colours: frozenset[str]
    shapes: frozenset[str]


def parse(text: str) -> Mentions:
    """Reads the objects out of a sentence: a shape word takes the last colour word since the shape before it."""
    pairs, colours, shapes = set(), set(), set()
    colour = None
    for word in _WORDS.findall(text.lower()):
        if word in _COLOUR_OF:
            colour = _COLOUR_OF[word]
            colours.add(colour)
        else:
            shape = _SHAPE_OF[word]
            shapes.add(shape)
            if colour is not None:
                pairs.add((colour, shape))
            colour = None
    return Mentions(frozenset(pairs), frozenset(colours), frozenset(shapes))

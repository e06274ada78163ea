"""Questions about miniature scenes, and the table of all families: each with its answer, wrong answers, and why.

A question's `description` says in words what settles it, so that the same question can be asked with a picture or
without one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from eim_jax.data.miniature.drawing import COLOURS, DOWNSTREAM_BACKGROUNDS, SHAPES, Dice, Scene, Thing
from eim_jax.data.miniature.language import (
    COLOUR_WORDS,
    GROUNDS,
    NOUNS,
    RELATIONS,
    Group,
    caption,
    groups,
    noun_phrase,
    plural,
    relation,
)
from eim_jax.data.miniature.word_questions import COUNTS, FACTS, Asked, a

Pairs = frozenset[tuple[str, str]]
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


class Family(NamedTuple):
    """What ScienceQA says of a question besides the question: `grade` is that of its easiest form."""

    subject: str
    topic: str
    skill: str
    grade: int
    lecture: str
    options: int  # at most


FAMILIES = {
    "colour": Family("natural science", "colours", "name a colour", 2, "Look inside a shape for its colour.", 4),
    "shape": Family("natural science", "shapes", "name a shape", 3, "Look along its edge to tell a shape.", 4),
    "count": Family("natural science", "numbers", "count shapes", 4, "To count, look at each shape in turn.", 4),
    "exists": Family("natural science", "shapes", "find a shape", 1, "Look for the colour and the shape.", 2),
    "relation": Family(
        "social science", "places", "say where shapes are", 6, "Find one shape, then look beside it.", 4
    ),
    "corner": Family("social science", "places", "read a map of corners", 5, "A picture has four corners.", 3),
    "background": Family("social science", "places", "name a background", 1, "The background is behind the shapes.", 4),
    "word": Family("language science", "reading", "find a word", 2, "Read each word of the text.", 4),
    "kind": Family("language science", "words", "sort words", 3, "Words name colours, shapes, numbers or places.", 4),
    "synonym": Family("language science", "words", "know synonyms", 6, "Two words can mean the same.", 4),
    "opposite": Family("language science", "words", "know opposites", 5, "Some words mean opposite things.", 4),
    "sides": Family("natural science", "shapes", "know sides", 7, "A side is a straight line.", 3),
    "mixture": Family("natural science", "colours", "mix colours", 7, "Two colours can make a third.", 4),
    "more": Family("natural science", "numbers", "compare numbers", 4, "Numbers grow when we count.", 3),
}
SEEN = ("colour", "shape", "count", "exists", "relation", "corner", "background")  # a picture can settle these
KNOWN = ("kind", "synonym", "opposite", "sides", "mixture", "more")  # neither picture nor text is needed


def kind(thing: Thing) -> str:
    """Names a thing by colour and shape: "red circle"."""
    return f"{thing.colour} {NOUNS[thing.shape][0]}"


def place(thing: Thing) -> str:
    """Names the corner a thing stands in: "top left corner"."""
    return f"{('top', 'bottom')[thing.row]} {('left', 'right')[thing.column]} corner"


def _phrase(thing: Thing, dice: Dice) -> str:
    return noun_phrase(Group((thing,)), dice, 0.1)


def _described(scene: Scene, dice: Dice) -> str:
    return caption(scene, dice, detail=0.1, partial=0.0)


def near(pair: tuple[str, str], scene: Scene, avoid: Pairs, dice: Dice) -> list[tuple[str, str]]:
    """Returns (colour, shape) pairs that are not in the scene nor in `avoid`, those that share a part with it first."""
    colours = dice.shuffled(sorted({c for c, _ in scene.pairs} - {pair[0]}) or tuple(COLOURS))
    shapes = dice.shuffled(sorted({s for _, s in scene.pairs} - {pair[1]}) or SHAPES)
    likely = [(c, pair[1]) for c in colours] + [(pair[0], s) for s in shapes]
    likely = dice.shuffled(likely) + [(c, pair[1]) for c in dice.shuffled(tuple(COLOURS))]
    likely += [(pair[0], s) for s in dice.shuffled(SHAPES)]
    return [p for p in dict.fromkeys(likely) if p not in scene.pairs and p not in avoid]


def _colour(scene: Scene, dice: Dice, avoid: Pairs) -> Asked | None:
    shapes = [thing.shape for thing in scene.things]
    single = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not single:
        return None
    thing = dice.pick(single)
    noun = NOUNS[thing.shape][0]
    present = {t.colour for t in scene.things} - {thing.colour}
    wrong = _present_first(present, tuple(COLOURS), thing.colour, dice)
    wrong = [colour for colour in wrong if (colour, thing.shape) not in avoid]
    short = f"The {noun} is {thing.colour}."
    return Asked(f"What colour is the {noun}?", thing.colour, tuple(wrong), short, _described(scene, dice))


def _shape(scene: Scene, dice: Dice, avoid: Pairs) -> Asked | None:
    colours = [thing.colour for thing in scene.things]
    single = [thing for thing in scene.things if colours.count(thing.colour) == 1]
    if not single:
        return None
    thing = dice.pick(single)
    present = {t.shape for t in scene.things} - {thing.shape}
    wrong = _present_first(present, SHAPES, thing.shape, dice)
    wrong = [NOUNS[shape][0] for shape in wrong if (thing.colour, shape) not in avoid]
    noun = NOUNS[thing.shape][0]
    short = f"The {thing.colour} shape is {a(noun)}."
    return Asked(f"Which shape is {thing.colour}?", noun, tuple(wrong), short, _described(scene, dice))


def _present_first(present: set[str], every: Sequence[str], answer: str, dice: Dice) -> list[str]:
    """Wrong options: mostly the picture's own first, as they cannot be told apart without relating the parts."""
    near = dice.shuffled(sorted(present)) if dice.chance(0.7) else []
    return list(dict.fromkeys([*near, *(x for x in dice.shuffled(tuple(every)) if x != answer)]))


def _count(scene: Scene, dice: Dice, avoid: Pairs) -> Asked:
    form = dice.below(3)
    if form == 0:
        number, thing, things = len(scene.things), "shape", "shapes"
    elif form == 1:
        shape = dice.pick(SHAPES) if dice.chance(0.3) else dice.pick(scene.things).shape
        number = sum(t.shape == shape for t in scene.things)
        thing, things = NOUNS[shape][0], plural(NOUNS[shape][0])
    else:
        colour = dice.pick(tuple(COLOURS)) if dice.chance(0.3) else dice.pick(scene.things).colour
        number = sum(t.colour == colour for t in scene.things)
        thing, things = f"{colour} shape", f"{colour} shapes"
    wrong = dice.shuffled([word for word in COUNTS if word != COUNTS[number]])
    says = f"There is one {thing}." if number == 1 else f"There are {'no' if not number else COUNTS[number]} {things}."
    return Asked(f"How many {things} are there?", COUNTS[number], tuple(wrong), says, _described(scene, dice))


def _exists(scene: Scene, dice: Dice, avoid: Pairs) -> Asked:
    pair = dice.pick(sorted(scene.pairs))
    there = dice.chance(0.5)
    if not there:
        pair = near(pair, scene, avoid, dice)[0]
    words = f"{pair[0]} {NOUNS[pair[1]][0]}"
    short = f"There is {a(words) if there else f'no {words}'}."
    answer, wrong = ("yes", "no") if there else ("no", "yes")
    return Asked(f"Is there {a(words)}?", answer, (wrong,), short, _described(scene, dice))


def neighbours(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Returns (b, place, a): b stands at that place of a, in a's row or column, and the words name a alone."""
    kinds = [kind(thing) for thing in scene.things]
    found = []
    for anchor in scene.things:
        for other in scene.things:
            where = relation(Group((other,)), Group((anchor,)))
            if where is not None and kinds.count(kind(anchor)) == 1:
                found.append((other, where, anchor))
    return found


def _relation(scene: Scene, dice: Dice, avoid: Pairs) -> Asked | None:
    found = neighbours(scene)
    if not found:
        return None
    other, where, anchor = dice.pick(found)
    shapes = [thing.shape for thing in scene.things]
    name = NOUNS[anchor.shape][0] if shapes.count(anchor.shape) == 1 else kind(anchor)
    noun, words = NOUNS[other.shape][0], RELATIONS[where][0]
    present = {NOUNS[shape][0] for shape in shapes} - {noun}
    wrong = _present_first(present, [NOUNS[shape][0] for shape in SHAPES], noun, dice)
    first, second, said = (other, anchor, where) if dice.chance(0.5) else (anchor, other, INVERSE[where])
    text = f"{_phrase(first, dice)} is {RELATIONS[said][0]} {_phrase(second, dice)}"
    rest = [thing for thing in scene.things if thing not in (other, anchor)]
    if rest:
        text += f" and there is {_phrase(dice.pick(rest), dice)}"
    short = f"{a(kind(other)).capitalize()} is {words} the {name}."
    return Asked(f"Which shape is {words} the {name}?", noun, tuple(wrong), short, text + ".")


def _corner(scene: Scene, dice: Dice, avoid: Pairs) -> Asked:
    cells = {(thing.row, thing.column): thing for thing in scene.things}
    empty = [Thing("", "", row=r, column=c) for r in (0, 1) for c in (0, 1) if (r, c) not in cells]
    thing = dice.pick(empty) if empty and dice.chance(0.25) else dice.pick(scene.things)
    others = [other for other in scene.things if other != thing]
    where = place(thing)
    if not thing.shape:
        answer, short, text = "nothing", f"The {where} is empty.", f"the {where} is empty"
        wrong = dice.shuffled(sorted({a(kind(other)) for other in others}))
    else:
        answer = a(kind(thing))
        short, text = f"{answer.capitalize()} is in the {where}.", f"{_phrase(thing, dice)} is in the {where}"
        pair = (thing.colour, thing.shape)
        wrong = dice.shuffled(sorted({a(kind(other)) for other in others} - {answer} | {"nothing"}))
        wrong += [a(f"{c} {NOUNS[s][0]}") for c, s in near(pair, scene, avoid, dice)[:2]]
    if others:
        other = dice.pick(others)
        both = [text, f"{_phrase(other, dice)} is in the {place(other)}"]
        text = " and ".join(dice.shuffled(both))
    return Asked(f"What is in the {where}?", answer, tuple(wrong), short, text + ".")


def _background(scene: Scene, dice: Dice, avoid: Pairs) -> Asked:
    name = scene.background
    # Bricks are a wall too.
    wrong = dice.shuffled([g for g in DOWNSTREAM_BACKGROUNDS if g != name and (name, g) != ("bricks", "wall")])
    text = f"{noun_phrase(dice.pick(groups(scene)), dice, 0.1)} {dice.pick(GROUNDS[name])}."
    return Asked("What is the background?", name, tuple(wrong), f"The background is {name}.", text)


def _word(scene: Scene, dice: Dice, avoid: Pairs) -> Asked:
    text = _described(scene, dice)
    said = set(text.rstrip(".").replace(",", "").split())
    words = [NOUNS[shape][0] for shape in SHAPES] + [word for colour in COLOURS for word in COLOUR_WORDS[colour]]
    inside = [word for word in words if word in said]
    answer = dice.pick(inside)
    wrong = dice.shuffled([word for word in words if word not in said and plural(word) not in said])
    return Asked("Which word is in the text?", answer, tuple(wrong), f"The text says {answer}.", text)


_SCENE: dict[str, Callable[[Scene, Dice, Pairs], Asked | None]] = {
    "colour": _colour, "shape": _shape, "count": _count, "exists": _exists, "relation": _relation, "corner": _corner,
    "background": _background, "word": _word,
}  # fmt: skip


def ask(family: str, scene: Scene, dice: Dice, avoid: Pairs = frozenset()) -> Asked | None:
    """Returns a question of the family about the scene, or None where the scene gives none.

    Families of KNOWN do not look at the scene. No wrong answer pairs a colour and a shape of `avoid`.

    Raises:
      ValueError: an unknown family.
    """
    if family in FACTS:
        return FACTS[family](dice)
    if family not in _SCENE:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    return _SCENE[family](scene, dice, avoid)

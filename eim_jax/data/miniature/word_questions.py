"""Questions that need a fact and no picture: kinds of words, synonyms, opposites, sides, mixtures, numbers."""

from collections.abc import Callable
from typing import NamedTuple

from eim_jax.data.miniature.drawing import COLOURS, SHAPES, Dice

COUNTS = ("none", "one", "two", "three", "four")
SIDES = {"triangle": "three", "square": "four", "diamond": "four"}
MIXTURES = (("red", "yellow", "orange"), ("red", "blue", "purple"), ("blue", "yellow", "green"))
SYNONYMS = (
    ("disc", "circle"), ("box", "square"), ("hoop", "ring"), ("violet", "purple"), ("little", "small"),
    ("large", "big"), ("spotted", "dotted"),
)  # fmt: skip
OPPOSITES = (
    ("left", "right"),
    ("above", "below"),
    ("big", "small"),
    ("black", "white"),
    ("yes", "no"),
    ("top", "bottom"),
)
KINDS = {
    "colour": tuple(COLOURS), "shape": SHAPES, "number": COUNTS[1:], "place": ("left", "right", "above", "below"),
}  # fmt: skip


class Asked(NamedTuple):
    """A question: any of `wrong` may stand beside `answer`; `short` answers it in one true sentence."""

    question: str
    answer: str
    wrong: tuple[str, ...]
    short: str
    description: str = ""


def a(words: str) -> str:
    """Returns the words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _kind(dice: Dice) -> Asked:
    name = dice.pick(tuple(KINDS))
    answer = dice.pick(KINDS[name])
    wrong = dice.shuffled([word for other, words in KINDS.items() if other != name for word in words])
    return Asked(f"Which word is a {name}?", answer, tuple(wrong), f"{answer.capitalize()} is a {name}.")


def _synonym(dice: Dice) -> Asked:
    pair = dice.shuffled(dice.pick(SYNONYMS))
    wrong = dice.shuffled([word for other in SYNONYMS if set(other) != set(pair) for word in other])
    short = f"{pair[1].capitalize()} means {pair[0]}."
    return Asked(f"Which word means {pair[0]}?", pair[1], tuple(wrong), short)


def _opposite(dice: Dice) -> Asked:
    pair = dice.shuffled(dice.pick(OPPOSITES))
    wrong = dice.shuffled([word for other in OPPOSITES if set(other) != set(pair) for word in other])
    short = f"{pair[1].capitalize()} is the opposite of {pair[0]}."
    return Asked(f"Which word is the opposite of {pair[0]}?", pair[1], tuple(wrong), short)


def _sides(dice: Dice) -> Asked:
    shape = dice.pick(tuple(SIDES))
    wrong = dice.shuffled([n for n in COUNTS[2:] if n != SIDES[shape]])
    return Asked(
        f"How many sides has {a(shape)}?",
        SIDES[shape],
        tuple(wrong),
        f"{a(shape).capitalize()} has {SIDES[shape]} sides.",
    )


def _mixture(dice: Dice) -> Asked:
    first, second, made = dice.pick(MIXTURES)
    wrong = dice.shuffled([colour for colour in COLOURS if colour not in (first, second, made)])
    first, second = dice.shuffled((first, second))
    return Asked(
        f"Which colour do {first} and {second} make?",
        made,
        tuple(wrong),
        f"{first.capitalize()} and {second} make {made}.",
    )


def _more(dice: Dice) -> Asked:
    numbers, than = COUNTS[1:], dice.pick(("more", "less"))
    at = dice.below(3) if than == "more" else 1 + dice.below(3)
    right = numbers[at + 1 :] if than == "more" else numbers[:at]
    answer = dice.pick(right)
    wrong = dice.shuffled([n for n in numbers if n not in right])
    short = f"{answer.capitalize()} is {than} than {numbers[at]}."
    return Asked(f"Which number is {than} than {numbers[at]}?", answer, tuple(wrong), short)


# Each family of questions that need a fact, by name.
FACTS: dict[str, Callable[[Dice], Asked]] = {
    "kind": _kind, "synonym": _synonym, "opposite": _opposite, "sides": _sides, "mixture": _mixture, "more": _more,
}  # fmt: skip

"""Text for the miniature language models that is not a caption of a downstream scene: what a web corpus is to GPT-2.

Everyday sentences, facts about shapes and numbers, and questions with options about a described scene, all from small
grammars of this file. The small LLaMA also reads what was written since GPT-2: questions and instructions in the very
layout of the later tasks, over scenes of its own that are put into words. It never sees a picture.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from eim_jax.data.datasets import scienceqa
from eim_jax.data.datasets.instruct_prompt import prompt
from eim_jax.data.miniature.chat import exchange
from eim_jax.data.miniature.drawing import BACKGROUNDS, COLOURS, SHAPES, Dice, Scene, random_scene
from eim_jax.data.miniature.language import NOUNS, NUMBERS, caption, groups, noun_phrase, plural, relation
from eim_jax.data.miniature.qa import problem
from eim_jax.data.miniature.questions import ask

PEOPLE = ("man", "woman", "boy", "girl", "child", "person")
ANIMALS = ("dog", "cat", "horse", "bird", "cow", "sheep")
ACTIONS = (
    "riding a bicycle", "riding a horse", "holding a cup", "holding an umbrella", "eating a pizza", "eating an apple",
    "reading a book", "playing with a ball", "throwing a ball", "flying a kite", "walking with a dog",
    "sitting on a bench", "sitting on a chair", "standing near a car", "looking at a boat", "drawing a picture",
)  # fmt: skip
MOVES = ("is running", "is sleeping", "is standing", "is sitting", "is eating", "is walking", "is looking at a ball")
PLACES = (
    "in the park", "on the street", "on a sandy beach", "in a kitchen", "near a window", "on the grass", "under a tree",
    "in a field of grass", "in front of a house", "next to a table", "at night", "in the rain", "beside a lake",
)  # fmt: skip
MANY = ("men", "women", "boys", "girls", "children", "people", "dogs", "cats", "horses", "birds")
THINGS = ("car", "boat", "house", "ball", "cup", "chair", "kite", "bicycle")
CLOTHES = ("shirt", "hat", "coat", "dress")
SIDES = {"triangle": 3, "square": 4, "diamond": 4}
FACTS = (
    "a circle is round.", "a ring is round and has a hole.", "a disc is a circle.", "a box is a square.",
    "a hoop is a ring.", "a plus sign is a cross.", "a star has five points.", "a heart is a sign of love.",
    "the sky is blue and the grass is green.", "red and yellow make orange.", "red and blue make purple.",
    "blue and yellow make green.", "violet is another word for purple.", "snow is white and the night is black.",
    "little means small and large means big.", "spots are dots.", "a lake is full of water.",
    "a table is made of wood.",
)  # fmt: skip
WORDS = tuple(COLOURS) + SHAPES + NUMBERS[1:] + ("left", "right", "above", "below", "big", "small", "yes", "no")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def everyday(dice: Dice) -> str:
    """Returns a sentence about people, animals and things."""
    kind = dice.below(4)
    if kind == 0:
        who = _a(dice.pick(PEOPLE))
        if dice.chance(0.5):
            who += f" in {_a(dice.pick(tuple(COLOURS)))} {dice.pick(CLOTHES)}"
        return f"{who} {dice.pick(('', 'is '))}{dice.pick(ACTIONS)} {dice.pick(PLACES)}."
    if kind == 1:
        size = dice.pick(("", "big ", "small ", "little "))
        animal = f"{dice.pick(('black', 'white', 'brown'))} {dice.pick(ANIMALS)}"
        return f"{_a(size + animal)} {dice.pick(MOVES)} {dice.pick(PLACES)}."
    if kind == 2:
        return f"there are {dice.pick(NUMBERS[2:])} {dice.pick(MANY)} {dice.pick(PLACES)}."
    thing = _a(f"{dice.pick(tuple(COLOURS))} {dice.pick(THINGS)}")
    return f"{dice.pick(('', 'there is ', 'a picture of '))}{thing} {dice.pick(PLACES)}."


def fact(dice: Dice) -> str:
    """Returns a true sentence about shapes, colours or numbers."""
    kind = dice.below(3)
    if kind == 0:
        return dice.pick(FACTS)
    if kind == 1:
        shape = dice.pick(tuple(SIDES))
        return f"{_a(shape)} has {NUMBERS[SIDES[shape]]} sides."
    low, high = sorted((dice.below(5), dice.below(5)))
    if low == high:
        return f"{NUMBERS[low]} is as many as {NUMBERS[high]}."
    return dice.pick((f"{NUMBERS[high]} is more than {NUMBERS[low]}.", f"{NUMBERS[low]} is less than {NUMBERS[high]}."))


def question(scene: Scene, dice: Dice) -> tuple[str, str, list[str]]:
    """Returns a question about the scene, its answer, and wrong answers."""
    found = groups(scene)
    group = dice.pick(found)
    shapes = [thing.shape for thing in scene.things]
    kind = dice.below(4)
    if kind == 0 and shapes.count(group.first.shape) == 1:
        wrong = [colour for colour in COLOURS if colour != group.first.colour]
        return f"what colour is the {NOUNS[group.first.shape][0]}?", group.first.colour, wrong
    if kind == 1:
        shape = dice.pick(SHAPES) if dice.chance(0.5) else group.first.shape
        number = shapes.count(shape)
        noun = plural(NOUNS[shape][0])
        return f"how many {noun} are there?", NUMBERS[number], [n for n in NUMBERS if n != NUMBERS[number]]
    if kind == 2 and len(found) == 2 and relation(*found) is not None:
        a, b = (noun_phrase(g, dice, 0.0) for g in found)
        said = dice.pick(("left", "right", "above", "below"))
        words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}[said]
        answer, wrong = ("yes", "no") if said == relation(*found) else ("no", "yes")
        return f"{'are' if len(found[0].things) > 1 else 'is'} {a} {words} {b}?", answer, [wrong]
    colour = dice.pick(tuple(COLOURS)) if dice.chance(0.5) else group.first.colour
    shape = group.first.shape
    answer, wrong = ("yes", "no") if (colour, shape) in scene.pairs else ("no", "yes")
    return f"is there {_a(colour)} {NOUNS[shape][0]}?", answer, [wrong]


def exercise(dice: Dice) -> str:
    """Returns a described scene, a question about it and the answer, in the layout of a question with options."""
    scene = random_scene(dice, tuple(BACKGROUNDS))
    asked, answer, wrong = question(scene, dice)
    context = caption(scene, dice, detail=0.2, partial=0.0)
    if dice.chance(0.3):
        return f"{context} {asked} {answer}."
    options = dice.shuffled([answer, *dice.shuffled(wrong)[: 1 + dice.below(3)]])
    context = f"Context: {context}\n" if dice.chance(0.8) else ""
    letter = "ABCDE"[options.index(answer)]
    return f"Question: {asked}\n{context}Options: {lettered(options)}\nResponse: The answer is {letter}."


def text(dice: Dice) -> str:
    """Returns one document: a caption (half of them), an everyday sentence, a fact or an exercise."""
    kind = dice.weighted((("caption", 10), ("everyday", 5), ("fact", 1), ("exercise", 4)))
    if kind == "caption":
        counts = ((1, 3), (2, 4), (3, 3), (4, 2))
        return caption(random_scene(dice, tuple(BACKGROUNDS), counts=counts), dice, detail=0.3 + 0.1 * dice.below(4))
    return {"everyday": everyday, "fact": fact, "exercise": exercise}[kind](dice)


class Lesson(NamedTuple):
    """A question or an instruction with its response; `lead` are the texts before it. Tokenised one by one."""

    lead: tuple[str, ...]
    instruction: str
    response: str


def drill(dice: Dice) -> Lesson:
    """Returns a short exercise or a document.

    Exercises: which letter an option has, words to repeat, true sentences on a described scene.
    """
    form = dice.weighted((("letters", 5), ("repeat", 2), ("reading", 2), ("document", 2)))
    if form == "document":
        return Lesson((), "", text(dice))
    scene = random_scene(dice, tuple(BACKGROUNDS))
    if form == "letters":
        options = dice.shuffled(WORDS)[: 2 + dice.below(4)]
        if dice.chance(0.3):
            options = problem("", "", scene, dice, place=dice.pick(("text", "memory"))).choices
        # With replacement: whoever has read one answer cannot guess the next.
        order = [dice.below(len(options)) for _ in range(4)]
        said = "".join(f" {options[k]} is {'ABCDE'[k]}." for k in order)
        return Lesson((), f"Options: {lettered(options)}\nResponse:", said)
    if form == "repeat":
        words = " ".join(dice.shuffled(WORDS)[: 4 + dice.below(7)])
        return Lesson((), prompt(f"Repeat these words. {words}"), words)
    asked = (ask(dice.pick(("colour", "shape", "count", "exists")), scene, dice) for _ in range(4))
    true = list(dict.fromkeys(found.short for found in asked if found))
    return Lesson((), f"{caption(scene, dice, detail=0.1, partial=0.0)} ", " ".join(true))


def lettered(options: Sequence[str]) -> str:
    """Returns the options as a question shows them: "(A) red (B) blue"."""
    return " ".join(f"({letter}) {option}" for letter, option in zip("ABCDE", options, strict=False))


def lesson(dice: Dice) -> Lesson:
    """Returns a question with options (most), an instruction, a drill or a document.

    A scene's description stands in the context, or in front behind "Image: ", as the alternative text of a web page
    does. A third of the questions are explained before they are answered.
    """
    form = dice.weighted((("question", 13), ("instruction", 4), ("drill", 3)))
    if form == "drill":
        return drill(dice)
    scene, shown = random_scene(dice, tuple(BACKGROUNDS)), ""
    if form == "question":
        asked = problem("", "", scene, dice, place="memory" if dice.chance(0.15) else "text")
        if asked.category != "word" and dice.chance(0.35):
            shown, asked = asked.hint, dataclasses.replace(asked, hint="")
        instruction, response = scienceqa.prompt(asked)
        if dice.chance(0.33):
            response = f"{asked.solution} The answer is {'ABCDE'[asked.answer]}."
    else:
        said = exchange(scene, dice)
        instruction, response, shown = prompt(said.instruction), said.response, said.description
    if shown:
        return Lesson(("Image: ", shown), instruction, response)
    return Lesson(("Image: N/A",) if dice.chance(0.2) else (), instruction, response)

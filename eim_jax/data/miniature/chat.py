"""The miniature chatbot: instructions with and without a picture, and yes/no questions that stand in for MME."""

import itertools
from collections import Counter
from typing import NamedTuple

from eim_jax.data.datasets.instruct_prompt import prompt
from eim_jax.data.datasets.mme import Question, YesNoSplit, yes_no_split
from eim_jax.data.miniature import captioning
from eim_jax.data.miniature.captioning import HELD_OUT, dice
from eim_jax.data.miniature.drawing import SHAPES, Dice, Scene
from eim_jax.data.miniature.language import COLOUR_WORDS, NOUNS, NUMBERS, RELATIONS, caption, parse, plural
from eim_jax.data.miniature.qa import PER_SCENE
from eim_jax.data.miniature.questions import (
    FAMILIES,
    INVERSE,
    KNOWN,
    SEEN,
    Pairs,
    ask,
    kind,
    near,
    neighbours,
)
from eim_jax.data.miniature.word_questions import MIXTURES, SIDES, a
from eim_jax.data.samples import Sample, SelectedImages, Split

SAMPLES = {"train": 2400, "val": 200, "test": 400}
TASKS = ("existence", "count", "position", "color")  # MME's names of its coarse tasks
# MME's names of what needs the picture and a fact that the LM was pretrained on. No training sample asks so.
REASONING = ("commonsense_reasoning", "numerical_calculation")
SCORED = (*TASKS, *REASONING)
DESCRIBE = ("Describe the picture.", "What is in the picture?", "Say what you see.")
YES_NO = "Please answer yes or no."  # MME's closing words
_KINDS = (("describe", 25), ("yes or no", 30), ("question", 15), ("words", 30))
_PART, _MME_PART = 4, 5  # of the dice


class Exchange(NamedTuple):
    """An instruction and its response; `description` says in words what the picture shows ("" if it needs none)."""

    instruction: str
    response: str
    description: str = ""


def yes_no(task: str, scene: Scene, yes: bool, rng: Dice, avoid: Pairs = frozenset()) -> Exchange | None:
    """Returns a question of one of TASKS or REASONING whose answer is `yes`, or None where the scene gives none."""
    shown = caption(scene, rng, detail=0.1, partial=0.0)
    shapes = [thing.shape for thing in scene.things]
    if task == "existence":
        pair = rng.pick(sorted(scene.pairs))
        pair = pair if yes else near(pair, scene, avoid, rng)[0]
        text = f"Is there {a(f'{pair[0]} {NOUNS[pair[1]][0]}')} in this picture?"
    elif task == "count":
        shape = rng.pick((None, *sorted(set(shapes))))
        number = len(shapes) if shape is None else shapes.count(shape)
        said = number if yes else rng.pick([n for n in (1, 2, 3, 4) if n != number])
        noun = "shape" if shape is None else NOUNS[shape][0]
        words = f"Is there one {noun}" if said == 1 else f"Are there {NUMBERS[said]} {plural(noun)}"
        text = f"{words} in this picture?"
    elif task == "position":
        kinds = [kind(thing) for thing in scene.things]
        found = [(b, where, c) for b, where, c in neighbours(scene) if kinds.count(kind(b)) == 1]
        if not found:
            return None
        first, where, second = rng.pick(found)
        shown = f"{a(kind(first))} is {RELATIONS[where][0]} {a(kind(second))}."
        said = where if yes else INVERSE[where]
        text = f"Is the {kind(first)} {RELATIONS[said][0]} the {kind(second)}?"
    elif task == "color":
        single = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
        if not single:
            return None
        thing = rng.pick(single)
        wrong = [c for c in COLOUR_WORDS if c != thing.colour and (c, thing.shape) not in avoid]
        others = sorted({t.colour for t in scene.things} & set(wrong))
        colour = thing.colour if yes else rng.pick(others if others and rng.chance(0.5) else wrong)
        text = f"Is the {NOUNS[thing.shape][0]} {colour}?"
    elif task in REASONING:
        texts = {"commonsense_reasoning": _with_a_fact, "numerical_calculation": _with_numbers}[task](scene, yes)
        if not texts:
            return None
        text = rng.pick(texts)
    else:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(SCORED)}")
    return Exchange(f"{text} {YES_NO}", "Yes" if yes else "No", shown)


def _with_a_fact(scene: Scene, yes: bool) -> list[str]:
    """Questions whose answer is `yes` for who knows the sides of shapes and the mixtures of colours."""
    shapes = [thing.shape for thing in scene.things]
    sides = {SIDES[shape] for shape in shapes if shape in SIDES}
    texts = [
        f"Is there a shape with {number} sides in this picture?"
        for number in sorted(set(SIDES.values()))
        if (number in sides) == yes
    ]
    mixed = {made for _, _, made in MIXTURES}
    return texts + [
        f"Do {first} and {second} make the colour of the {NOUNS[thing.shape][0]}?"
        for thing in scene.things
        if thing.colour in mixed and shapes.count(thing.shape) == 1
        for first, second, made in MIXTURES
        if (made == thing.colour) == yes
    ]


def _with_numbers(scene: Scene, yes: bool) -> list[str]:
    """Questions whose answer is `yes` for who counts two kinds and compares."""
    shapes = Counter(plural(NOUNS[thing.shape][0]) for thing in scene.things)
    colours = Counter(f"{thing.colour} shapes" for thing in scene.things)
    # Of two unequal kinds each is asked for as more and as less: the words alone do not tell.
    return [
        f"Are there {word} {first} than {second} in this picture?"
        for counts in (shapes, colours)
        for first, second in itertools.permutations(counts, 2)
        for word, sign in (("more", 1), ("less", -1))
        if counts[first] != counts[second] and (sign * (counts[first] - counts[second]) > 0) == yes
    ]


def _words(scene: Scene, rng: Dice, avoid: Pairs) -> Exchange:
    """An instruction that needs no picture."""
    form = rng.below(6)
    if form == 0:
        words = ""
        while not words or parse(words).pairs & avoid:
            words = " ".join(rng.shuffled([*COLOUR_WORDS, *(NOUNS[shape][0] for shape in SHAPES)])[: 2 + rng.below(3)])
        return Exchange(f"Repeat these words. {words}", words)
    if form <= 2:
        things = rng.shuffled(scene.things)
        text = " and ".join(a(kind(thing)) for thing in things)
        parts = [thing.colour if form == 1 else NOUNS[thing.shape][0] for thing in things]
        return Exchange(f"Say the {('colours', 'shapes')[form - 1]} in the text. {text}", " and ".join(parts))
    asked = ask(rng.pick(KNOWN), scene, rng, avoid)
    return Exchange(asked.question, asked.short)


def exchange(scene: Scene, rng: Dice, avoid: Pairs = frozenset()) -> Exchange:
    """Returns an instruction over the scene: describe it, yes or no, a question, or a task on words alone.

    No sentence pairs a colour and a shape of `avoid` unless the scene does.
    """
    name, found = rng.weighted([(name, weight) for name, weight in _KINDS]), None
    while found is None:
        if name == "describe":
            shown = caption(scene, rng, detail=0.2, partial=0.0)
            found = Exchange(rng.pick(DESCRIBE), caption(scene, rng, detail=0.2, partial=0.0), shown)
        elif name == "yes or no":
            found = yes_no(rng.pick(TASKS), scene, rng.chance(0.5), rng, avoid)
        elif name == "question":
            asked = ask(rng.pick([family for family in SEEN if FAMILIES[family].options > 2]), scene, rng, avoid)
            found = asked and Exchange(asked.question, asked.short, asked.description)
        else:
            found = _words(scene, rng, avoid)
    return found


def load_chat(split: str = "train", seed: int = 0, samples: int | None = None) -> Split:
    """Returns `samples` instructions over a split's scenes (default: SAMPLES), about 70 % of them with a picture.

    Sample i is a function of (split, seed, i) alone and over scene i // 2 of miniature.load(split, seed). "train" names
    a HELD_OUT pair nowhere.

    Raises:
      ValueError: an unknown split, or fewer than one sample.
    """
    if split not in SAMPLES:
        raise ValueError(f"the miniature world has no split {split!r}: choose one of {', '.join(SAMPLES)}")
    count = SAMPLES[split] if samples is None else samples
    if count < 1:
        raise ValueError(f"a split needs at least one sample, not {count}")
    drawn = captioning.load(split, seed, -(-count // PER_SCENE))
    names, rows, found = list(drawn.scenes), {}, []
    for i in range(count):
        row, rng = i // PER_SCENE, dice(split, seed, i, _PART)
        said = exchange(drawn.scenes[names[row]], rng, HELD_OUT if split == "train" else frozenset())
        image = rows.setdefault(row, len(rows)) if said.description else None
        words = caption(drawn.scenes[names[row]], rng) if said.description else ""
        found.append(Sample(f"chat-{split}-{seed}-{i}", image, prompt(said.instruction), said.response, words))
    return Split(split, tuple(found), SelectedImages(drawn.images, list(rows)))


def load_yes_no(seed: int = 0, images: int = 50) -> YesNoSplit:
    """Returns the stand-in for MME: each of TASKS and REASONING over the first `images` test scenes that allow it.

    Two questions an image, one answered Yes and one No, in random order. Image ids are "task/captioning id", as those
    of MME are "task/file", and one scene may serve several tasks.

    Raises:
      ValueError: fewer than one image.
    """
    if images < 1:
        raise ValueError(f"each task needs at least one image, not {images}")
    count = 2 * images + 20
    while (found := _asked(drawn := captioning.load("test", seed, count), seed, images)) is None:
        count *= 2  # a scene is the same however many are drawn
    ids, rows, questions = found
    return yes_no_split("test", questions, SelectedImages(drawn.images, rows, ids))


def _asked(drawn, seed: int, images: int) -> tuple[list[str], list[int], list[Question]] | None:
    """The image ids, scenes and questions of every task; None where too few of the scenes allow one."""
    ids, rows, questions = [], [], []
    for number, task in enumerate(SCORED):
        used = 0
        for i, (name, scene) in enumerate(drawn.scenes.items()):
            rng = dice("test", seed, i * len(SCORED) + number, _MME_PART)
            pair = [yes_no(task, scene, yes, rng) for yes in rng.shuffled((True, False))]
            if None not in pair and used < images:
                used += 1
                ids.append(f"{task}/{name}")
                rows.append(i)
                questions += [Question(task, name, said.instruction, said.response) for said in pair]
        if used < images:
            return None
    return ids, rows, questions

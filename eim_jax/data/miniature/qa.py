"""The miniature ScienceQA: questions with options over the scenes of the miniature world, with or without a picture.

Every second question or so shows a scene of the captioning task's split of the same name; the others describe one in
the hint, or ask for knowledge. Explanations are true sentences on the scene, so a model that looks can give them.
"""

from eim_jax.data.datasets.scienceqa import Problem, QASplit, qa_split
from eim_jax.data.miniature import captioning
from eim_jax.data.miniature.captioning import HELD_OUT, dice
from eim_jax.data.miniature.drawing import Dice, Scene
from eim_jax.data.miniature.language import caption, groups, noun_phrase
from eim_jax.data.miniature.questions import FAMILIES, KNOWN, SEEN, ask
from eim_jax.data.samples import SelectedImages

PROBLEMS = {"train": 2400, "val": 200, "test": 600}
PER_SCENE = 2  # consecutive questions over one scene
# Where the answer is to be found: in the picture, in the picture beside a hint, in the hint, nowhere but in memory.
PLACES = (("image", 42), ("both", 8), ("text", 36), ("memory", 14))
_WEIGHTS = {"colour": 5, "shape": 5, "count": 3, "exists": 2, "relation": 4, "corner": 3, "background": 2, "word": 5}
_PART = 3  # of the dice


def load(
    split: str = "train", seed: int = 0, problems: int | None = None, form: str = "QCM-ALE", use_caption: bool = False
) -> QASplit:
    """Asks `problems` questions about a split's scenes (default: PROBLEMS) as ScienceQA's prompts.

    Problem i is a function of (split, seed, i) alone and is over scene i // 2 of miniature.load(split, seed), so a
    smaller split is the start of a larger one. Only the scenes that some problem shows are among the images, under
    their captioning ids. "train" names a HELD_OUT pair nowhere.

    Raises:
      ValueError: an unknown split or form, or fewer than one problem.
    """
    if split not in PROBLEMS:
        raise ValueError(f"the miniature world has no split {split!r}: choose one of {', '.join(PROBLEMS)}")
    count = PROBLEMS[split] if problems is None else problems
    if count < 1:
        raise ValueError(f"a split needs at least one problem, not {count}")
    drawn = captioning.load(split, seed, -(-count // PER_SCENE))
    names, found = list(drawn.scenes), []
    for i in range(count):
        name = names[i // PER_SCENE]
        avoid = HELD_OUT if split == "train" else frozenset()
        found.append(problem(f"qa-{split}-{seed}-{i}", name, drawn.scenes[name], dice(split, seed, i, _PART), avoid))
    shown = {asked.image for asked in found}
    images = SelectedImages(drawn.images, [row for row, name in enumerate(names) if name in shown])
    return qa_split(split, found, images, form, use_caption=use_caption)


def problem(
    name: str, image: str, scene: Scene, rng: Dice, avoid: frozenset[tuple[str, str]] = frozenset(), place: str = ""
) -> Problem:
    """Returns one problem over the scene, which `image` names; `place` (default: by PLACES) says where its answer is.

    No sentence pairs a colour and a shape of `avoid` unless the scene does.
    """
    place = place or rng.weighted(PLACES)
    families = {"text": (*SEEN, "word"), "memory": KNOWN}.get(place, SEEN)
    asked = None
    while asked is None:
        family = rng.weighted([(family, _WEIGHTS.get(family, 1)) for family in families])
        asked = ask(family, scene, rng, avoid)
    about = FAMILIES[family]
    number = min(2 + rng.below(about.options - 1), 1 + len(asked.wrong))
    options = rng.shuffled([asked.answer, *asked.wrong[: number - 1]])
    shown = image if place in ("image", "both") else None
    hint = {"text": asked.description, "both": f"{noun_phrase(rng.pick(groups(scene)), rng, 0.2)}."}.get(place, "")
    things = 0 if place == "memory" else len(scene.things) - 1
    return Problem(
        id=name,
        question=asked.question,
        choices=tuple(options),
        answer=options.index(asked.answer),
        hint=hint,
        image=shown,
        subject=about.subject,
        grade=f"grade{min(about.grade + things + number - 2, 12)}",
        topic=about.topic,
        category=family,
        skill=about.skill,
        lecture=about.lecture,
        solution=asked.short,
        caption=caption(scene, rng) if shown else "",
    )

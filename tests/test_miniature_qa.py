"""The miniature questions: each has one right option by a reading of the scene that shares no code with the asking."""

import hashlib
import re
from collections import Counter

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from eim_jax.data.datasets.scienceqa import prompt
from eim_jax.data.miniature import captioning
from eim_jax.data.miniature.captioning import HELD_OUT
from eim_jax.data.miniature.chat import SCORED, YES_NO, load_chat, load_yes_no
from eim_jax.data.miniature.language import parse
from eim_jax.data.miniature.qa import PROBLEMS, load
from eim_jax.models.language.llama import Llama
from eim_jax.pretrained import load_lm, resolve

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
SHAPES = ["circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart"]
NUMBERS = {"no": 0, "none": 0, "one": 1, "two": 2, "three": 3, "four": 4}
SAME = {"disc": "circle", "box": "square", "boxes": "squares", "hoop": "ring", "violet": "purple"}
STEPS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
WHERE = "|".join(STEPS)
MEANS = {("disc", "circle"), ("box", "square"), ("hoop", "ring"), ("violet", "purple"), ("little", "small")}
MEANS |= {("large", "big"), ("spotted", "dotted")}
OPPOSITES = {
    ("left", "right"),
    ("above", "below"),
    ("big", "small"),
    ("black", "white"),
    ("yes", "no"),
    ("top", "bottom"),
}
KINDS = {"colour": COLOURS, "shape": SHAPES, "number": ["one", "two", "three", "four"]}
KINDS["place"] = ["left", "right", "above", "below"]
MIX = {frozenset(["red", "yellow"]): "orange", frozenset(["red", "blue"]): "purple"}
MIX[frozenset(["blue", "yellow"])] = "green"
ORDER = ["one", "two", "three", "four"]
SIDES = {"triangle": "three", "square": "four", "diamond": "four"}


def one(word: str) -> str:
    """The singular of a plural."""
    return {"crosses": "cross", "boxes": "box"}.get(word, word.removesuffix("s") if word != "cross" else word)


class World:
    """A grid of (colour, shape) by cell, as read off the scene's things."""

    def __init__(self, scene):
        self.at = {(t.row, t.column): (t.colour, t.shape) for t in scene.things}
        self.background = scene.background
        assert len(self.at) == len(scene.things)

    def kinds(self) -> list:
        return list(self.at.values())

    def number(self, words: str) -> int:
        """How many things "red circles", "circles", "red shapes" or "shapes" names."""
        named = set(one(word) for word in words.split())
        colours, shapes = named & set(COLOURS), named & set(SHAPES)
        assert named <= {*COLOURS, *SHAPES, "shape"}
        return sum((not colours or c in colours) and (not shapes or s in shapes) for c, s in self.kinds())

    def beside(self, where: str, name: str) -> list:
        """What stands next to the one thing of that name."""
        cells = [cell for cell, kind in self.at.items() if set(name.split()) <= set(kind)]
        assert len(cells) == 1, name
        (row, column), (down, right) = cells[0], STEPS[where]
        found = self.at.get((row + down, column + right))
        return [] if found is None else [found]

    def corner(self, where: str) -> str:
        vertical, horizontal = where.split()
        found = self.at.get((int(vertical == "bottom"), int(horizontal == "right")))
        return "nothing" if found is None else " ".join(found)


def bare(words: str) -> str:
    return re.sub(r"^an? ", "", words)


def is_right(question: str, option: str, world: World, hint: str) -> bool:
    """Whether the option answers the question, by the scene (or by common knowledge)."""
    said = question.removesuffix("?")
    if found := re.fullmatch(r"What colour is the (\w+)", said):
        assert world.number(found[1]) == 1  # "the"
        return (option, found[1]) in world.kinds()
    if found := re.fullmatch(rf"Which shape is ({WHERE}) the ([\w ]+)", said):
        return [shape for _, shape in world.beside(found[1], found[2])] == [option]
    if found := re.fullmatch(r"Which shape is (\w+)", said):
        return {shape for colour, shape in world.kinds() if colour == found[1]} == {option}
    if found := re.fullmatch(r"How many ([\w ]+) are there", said):
        return world.number(found[1]) == NUMBERS[option]
    if found := re.fullmatch(r"Is there an? (\w+ \w+)", said):
        return ("yes" if world.number(found[1]) else "no") == option
    if found := re.fullmatch(r"What is in the (\w+ \w+) corner", said):
        return world.corner(found[1]) == bare(option)
    if said == "What is the background":
        return world.background == option
    if said == "Which word is in the text":
        return re.search(rf"\b{option}\b", hint) is not None
    if found := re.fullmatch(r"Which word is a (\w+)", said):
        return option in KINDS[found[1]]
    if found := re.fullmatch(r"Which word means (\w+)", said):
        return bool({(option, found[1]), (found[1], option)} & MEANS)
    if found := re.fullmatch(r"Which word is the opposite of (\w+)", said):
        return bool({(option, found[1]), (found[1], option)} & OPPOSITES)
    if found := re.fullmatch(r"How many sides has an? (\w+)", said):
        return SIDES[found[1]] == option
    if found := re.fullmatch(r"Which colour do (\w+) and (\w+) make", said):
        return MIX[frozenset(found.groups())] == option
    if found := re.fullmatch(r"Which number is (more|less) than (\w+)", said):
        distance = ORDER.index(option) - ORDER.index(found[2])
        return distance > 0 if found[1] == "more" else distance < 0
    raise AssertionError(f"no reading of {question!r}")


def is_true(sentence: str, world: World, hint: str = "") -> bool:
    """Whether the sentence is true of the scene (or by common knowledge)."""
    said = sentence.removesuffix(".")
    said = said[0].lower() + said[1:]
    for pattern, question in (
        (r"the (?P<q>\w+) is (?P<a>\w+)", "What colour is the {q}?"),
        (r"the (?P<q>\w+) shape is an? (?P<a>\w+)", "Which shape is {q}?"),
        (r"(?P<a>\w+) is a (?P<q>\w+)", "Which word is a {q}?"),
        (r"(?P<a>\w+) means (?P<q>\w+)", "Which word means {q}?"),
        (r"(?P<a>\w+) is the opposite of (?P<q>\w+)", "Which word is the opposite of {q}?"),
        (r"an? (?P<q>\w+) has (?P<a>\w+) sides", "How many sides has a {q}?"),
        (r"(?P<q>\w+ and \w+) make (?P<a>\w+)", "Which colour do {q} make?"),
        (r"(?P<a>\w+) is (?P<q>(more|less) than \w+)", "Which number is {q}?"),
        (r"the text says (?P<a>\w+)", "Which word is in the text?"),
    ):
        found = re.fullmatch(pattern, said)
        if found and not said.startswith("the background"):
            asked = question.format(q=found.groupdict().get("q"))
            return is_right(asked, found["a"], world, hint)
    if found := re.fullmatch(r"the background is (\w+)", said):
        return world.background == found[1]
    if found := re.fullmatch(r"there (?:is|are) (one|no|two|three|four) ([\w ]+)", said):
        return world.number(found[2]) == NUMBERS[found[1]]
    if found := re.fullmatch(r"there is an? (\w+ \w+)", said):
        return world.number(found[1]) > 0
    if found := re.fullmatch(rf"an? (\w+) (\w+) is ({WHERE}) the ([\w ]+)", said):
        return world.beside(found[3], found[4]) == [(found[1], found[2])]
    if found := re.fullmatch(r"an? (\w+ \w+) is in the (\w+ \w+) corner", said):
        return world.corner(found[2]) == found[1]
    if found := re.fullmatch(r"the (\w+ \w+) corner is empty", said):
        return world.corner(found[1]) == "nothing"
    raise AssertionError(f"no reading of {sentence!r}")


def read(hint: str) -> list[tuple[str, str]]:
    """The (colour, shape) of every thing that a description names, with its number."""
    found, number, colour = [], 1, ""
    text = hint.replace("plus sign", "cross").replace("crosss", "crosses")
    for word in re.findall(r"\w+", text):
        word = SAME.get(word, SAME.get(one(word), word))
        if word in ("a", "an", "two", "three", "four"):
            number = NUMBERS.get(word, 1)
        elif word in COLOURS:
            colour = word
        elif one(word) in SHAPES:
            found += [(colour, one(word))] * number
    return found


@pytest.fixture(scope="module", params=["train", "val", "test"])
def split(request):
    problems = load(request.param, problems=240)
    return request.param, problems, captioning.load(request.param, scenes=120)


def scene_of(problem_id: str, drawn):
    name, seed, i = problem_id.rsplit("-", 3)[1:]
    return drawn.scenes[f"{name}-{seed}-{int(i) // 2}"]


def test_exactly_one_option_is_right_and_it_is_the_answer(split):
    _, problems, drawn = split
    for problem in problems.problems.values():
        world = World(scene_of(problem.id, drawn))
        right = [is_right(problem.question, option, world, problem.hint) for option in problem.choices]
        assert right.count(True) == 1 and right[problem.answer], problem
        assert len(set(problem.choices)) == len(problem.choices) >= 2


def test_solutions_are_true_and_name_the_answer(split):
    _, problems, drawn = split
    for problem in problems.problems.values():
        assert is_true(problem.solution, World(scene_of(problem.id, drawn)), problem.hint), problem
        answer = problem.choices[problem.answer]
        said = {"nothing": "empty", "none": " no ", "yes": "There is a", "no": "There is no"}
        key = said.get(answer, answer) if problem.category in ("corner", "count", "exists") else answer
        assert key.lower() in problem.solution.lower(), problem
        assert problem.lecture.endswith(".")


def test_text_questions_are_settled_by_their_hint(split):
    _, problems, drawn = split
    seen = Counter()
    for problem in problems.problems.values():
        if problem.image is not None or not problem.hint:
            continue
        scene, answer, hint = scene_of(problem.id, drawn), problem.choices[problem.answer], problem.hint
        named = read(hint)
        kinds = [(t.colour, t.shape) for t in scene.things]
        assert not Counter(named) - Counter(kinds), problem  # true
        seen[problem.category] += 1
        if problem.category in ("colour", "shape", "count", "exists"):
            assert sorted(named) == sorted(kinds), problem  # complete, so the reading above answers from it
        elif problem.category == "relation":
            found = re.match(rf"(.*) is ({WHERE}) (.*?)(?: and there is .*)?\.$", hint)
            first, second = read(found[1])[0], read(found[3])[0]
            where = re.match(rf"Which shape is ({WHERE}) the ", problem.question)[1]
            other = first if found[2] == where else second
            assert other[1] == answer and (found[2] == where or where in (OPPOSITE.get(found[2]), *(
                a for a, b in OPPOSITE.items() if b == found[2]))), problem  # fmt: skip
        elif problem.category == "corner":
            where = problem.question.removeprefix("What is in ").removesuffix("?")
            (part,) = [part for part in hint.rstrip(".").split(" and ") if where in part]
            assert read(part) == [tuple(bare(answer).split())] if "empty" not in part else answer == "nothing", problem
        elif problem.category == "background":
            word = {"wall": "grey", "sand": "sand", "sky": "sky", "grass": "grass"}[answer]
            assert word in hint
    assert min(seen[name] for name in ("colour", "shape", "count", "exists", "relation", "corner", "background")) >= 2


def test_same_place_same_problem_and_a_small_split_starts_a_larger_one():
    few, many = load("val", problems=21), load("val", problems=60)
    assert list(few.problems.values()) == list(many.problems.values())[:21]
    assert few.samples == many.samples[:21]
    assert load("val", seed=1, problems=21).fingerprint() != few.fingerprint() == load("val", problems=21).fingerprint()
    texts = "\n".join(s.instruction + s.response + s.caption for s in load("test", seed=3, problems=40).samples)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "0a1f43152be1f4c2"  # on every machine


def test_shares_of_places_letters_subjects_and_grades():
    assert PROBLEMS == {"train": 2400, "val": 200, "test": 600}
    problems = list(load("train", problems=600).problems.values())
    assert len({p.id for p in problems}) == 600
    shares = Counter((p.image is not None, bool(p.hint)) for p in problems)
    for key, share in {(True, False): 0.42, (True, True): 0.08, (False, True): 0.36, (False, False): 0.14}.items():
        assert abs(shares[key] / len(problems) - share) < 0.06
    for options in (2, 3, 4):
        letters = Counter(p.answer for p in problems if len(p.choices) == options)
        expected = sum(letters.values()) / options
        assert sorted(letters) == list(range(options))
        assert sum((n - expected) ** 2 / expected for n in letters.values()) < 16.3  # chi-square, p = 0.001 at 3
    subjects = Counter(p.subject for p in problems)
    assert min(subjects.values()) > 0.1 * len(problems) and len(subjects) == 3
    assert not any(p.image for p in problems if p.subject == "language science")  # as in ScienceQA
    upper = sum(int(p.grade.removeprefix("grade")) > 6 for p in problems) / len(problems)
    assert 0.2 < upper < 0.5 and {p.grade for p in problems} <= {f"grade{n}" for n in range(1, 13)}


def test_images_are_the_captioning_scenes_and_carry_machine_captions():
    problems, drawn = load("val", problems=60), captioning.load("val", scenes=30)
    for sample in problems.samples:
        problem = problems.problems[sample.id]
        assert (sample.image is None) == (problem.image is None)
        if sample.image is not None:
            name = problems.images.ids[sample.image]
            assert name == problem.image
            row = drawn.images.ids.index(name)
            np.testing.assert_array_equal(np.asarray(problems.images[sample.image]), drawn.pixels[row])
            assert sample.caption == problem.caption and parse(problem.caption).pairs <= drawn.scenes[name].pairs
    assert sorted({s.image for s in problems.samples} - {None}) == list(range(len(problems.images)))  # none idle


def test_training_names_no_held_out_pair():
    problems, chat = load("train", problems=240), load_chat("train", samples=240)
    scenes = captioning.load("train", scenes=120).scenes
    assert not any(scenes[name].pairs & HELD_OUT for split in (problems, chat) for name in split.images.ids)
    for problem in problems.problems.values():
        texts = (problem.question, problem.hint, problem.solution, problem.caption, *problem.choices)
        assert not any(parse(text).pairs & HELD_OUT for text in texts)
        for option in problem.choices:  # "Which shape is red? (A) diamond"
            pairs = {(c, s) for c in re.findall(r"\w+", problem.question) for s in [option]}
            pairs |= {(option, s) for s in re.findall(r"\w+", problem.question)}
            assert problem.category not in ("colour", "shape") or not pairs & HELD_OUT
    for sample in chat.samples:
        sentences = re.split(r"[.?]", f"{sample.instruction}.{sample.response}.{sample.caption}")
        assert not any(parse(sentence).pairs & HELD_OUT for sentence in sentences)
        if found := re.search(r"Is the (\w+) (\w+)\?", sample.instruction):
            assert (found[2], found[1]) not in HELD_OUT
    shown = [name for split in (load("test", problems=80), load_chat("test", samples=80)) for name in split.images.ids]
    held = captioning.load("test", scenes=40).scenes
    assert 0.3 < np.mean([bool(held[name].pairs & HELD_OUT) for name in shown]) < 0.7


def answers_yes(question: str, world: World) -> bool:
    """The truth about one of the yes/no questions."""
    said = question.removesuffix(YES_NO).strip().removesuffix("?").removesuffix(" in this picture")
    if found := re.fullmatch(r"(?:Is|Are) there (one|two|three|four) ([\w ]+)", said):
        return world.number(found[2]) == NUMBERS[found[1]]
    if found := re.fullmatch(r"Is there an? (\w+ \w+)", said):
        return world.number(found[1]) > 0
    if found := re.fullmatch(rf"Is the (\w+ \w+) ({WHERE}) the (\w+ \w+)", said):
        assert world.number(found[1]) == world.number(found[3]) == 1
        return world.beside(found[2], found[3]) == [tuple(found[1].split())]
    if found := re.fullmatch(r"Is there a shape with (three|four) sides", said):
        return any(world.number(shape) for shape in {"three": ["triangle"], "four": ["square", "diamond"]}[found[1]])
    if found := re.fullmatch(r"Do (\w+) and (\w+) make the colour of the (\w+)", said):
        assert world.number(found[3]) == 1
        made = {"red and yellow": "orange", "red and blue": "purple", "blue and yellow": "green"}
        return (made[f"{found[1]} and {found[2]}"], found[3]) in world.kinds()
    if found := re.fullmatch(r"Are there (more|less) ([\w ]+) than ([\w ]+)", said):
        first, second = world.number(found[2]), world.number(found[3])
        assert first and second and first != second
        return (first > second) == (found[1] == "more")
    found = re.fullmatch(r"Is the (\w+) (\w+)", said)
    assert world.number(found[1]) == 1
    return (found[2], found[1]) in world.kinds()


def test_more_images_a_task_are_found_among_more_scenes_and_the_first_ones_stay():
    few, many = ({task: [] for task in SCORED} for _ in range(2))
    for found, images in ((few, 10), (many, 80)):
        for question in load_yes_no(images=images).questions.values():
            found[question.task].append(question)
    for task in SCORED:
        assert len(many[task]) == 160 and many[task][:20] == few[task]


def test_yes_no_questions_are_right_with_one_yes_and_one_no_an_image():
    split = load_yes_no(images=40)
    scenes = captioning.load("test", scenes=100).scenes
    assert Counter(q.task for q in split.questions.values()) == dict.fromkeys(SCORED, 80)
    given = {}
    for sample in split.samples:
        question = split.questions[sample.id]
        assert sample.instruction == f"Instruction: {question.question}\nResponse:" and YES_NO in question.question
        assert answers_yes(question.question, World(scenes[question.image])) == (question.answer == "Yes")
        assert (
            sample.response == question.answer and split.images.ids[sample.image] == f"{question.task}/{question.image}"
        )
        given.setdefault((question.task, question.image), []).append(question.answer)
    assert all(sorted(pair) == ["No", "Yes"] for pair in given.values())
    first = Counter(pair[0] for pair in given.values())
    assert 0.4 < first["Yes"] / first.total() < 0.6  # the order tells nothing


def test_chat_answers_are_true():
    chat, scenes, kinds = load_chat("val", samples=240), captioning.load("val", scenes=120).scenes, Counter()
    for sample in chat.samples:
        instruction = sample.instruction.removeprefix("Instruction: ").removesuffix("\nResponse:")
        scene = scenes["val-0-" + str(int(sample.id.rsplit("-", 1)[1]) // 2)]
        world = World(scene)
        text, _, words = instruction.partition(". ")
        if YES_NO in instruction:
            kinds["yes or no"] += 1
            kinds[sample.response] += 1
            assert answers_yes(instruction, world) == (sample.response == "Yes")
        elif instruction in ("Describe the picture.", "What is in the picture?", "Say what you see."):
            kinds["describe"] += 1
            assert sorted(read(sample.response)) == sorted(world.kinds())
        elif text == "Repeat these words":
            assert sample.response == words
        elif text.startswith("Say the "):
            kinds["say"] += 1
            place = ("Say the colours in the text", "Say the shapes in the text").index(text)
            assert [pair[place] for pair in read(words)] == sample.response.split(" and ")
        else:
            kinds["question"] += 1
            assert is_true(sample.response, world)
            continue
        assert (sample.image is None) == (text.split()[0] in ("Repeat", "Say") and "see" not in text)
    assert min(kinds[name] for name in ("yes or no", "describe", "say", "question")) > 10
    assert 0.4 < kinds["Yes"] / kinds["yes or no"] < 0.6
    assert 0.6 < np.mean([s.image is not None for s in chat.samples]) < 0.8


@pytest.mark.parametrize("make", [lambda: load("dev"), lambda: load("val", problems=0), lambda: load_chat("dev"),
                                  lambda: load_chat("val", samples=0), lambda: load_yes_no(images=0)])  # fmt: skip
def test_bad_requests_are_explained(make):
    with pytest.raises(ValueError, match=r"choose one of train, val, test|at least one"):
        make()


def test_shipped_llama_answers_questions_in_words_and_has_seen_no_picture():
    lm, tok = load_lm("miniature/llama"), AutoTokenizer.from_pretrained(resolve("miniature/llama"))
    assert (tok.unk_token_id, tok.bos_token_id, tok.eos_token_id) == (0, 1, 2)
    assert tok("a circle")["input_ids"][0] == 1 and tok.decode(tok("a circle")["input_ids"][1:]) == "a circle"
    asked = [p for p in load("val", problems=200).problems.values() if p.image is None]
    letters = [tok(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"]
    assert all(len(ids) == 1 for ids in letters)
    rows = [
        [1, *(token for text in (prompt(problem)[0], "The answer is") for token in tok(text)["input_ids"][1:])]
        for problem in asked
    ]
    tokens = np.array([row + [0] * (96 - len(row)) for row in rows], np.int32)
    logits = np.asarray(jax.jit(Llama(lm.config).apply)({"params": lm.params}, tokens))
    at = logits[np.arange(len(rows)), [len(row) - 1 for row in rows]][:, np.ravel(letters)]
    right = [scores[: len(p.choices)].argmax() == p.answer for scores, p in zip(at, asked, strict=True)]
    assert np.mean(right) > 0.55  # guessing: 0.38

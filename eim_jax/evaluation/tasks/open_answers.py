"""The tasks of one's own questions: "answers" (exact match), "vqa", "choices", and "descriptions" (caption scores)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eim_jax.data.datasets.instruct_choices import LETTERS
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import vqa
from eim_jax.evaluation.metrics.open_answers import choice_rows, same
from eim_jax.evaluation.tasks.captions import compared
from eim_jax.evaluation.tasks.choosing import Choosing
from eim_jax.evaluation.tasks.questions import Questions
from eim_jax.evaluation.tasks.task import Asked, Item, Option, Predicted, Predictions, Reading, Scored
from eim_jax.training.setup import Inputs


class Answers(Questions):
    """Open answers, right where they equal an accepted one but for case and outer white space ("exact_match")."""

    name = "answers"
    intervals = True

    def settings(self, inputs: Inputs) -> str:
        """Returns what the answers are scored as: one file may be scored by several tasks."""
        return f", scored as {self.name}"


class Vqa(Answers):
    """Open answers by the rule of the VQA challenge ("vqa_accuracy"): ten people's answers to each question."""

    name = "vqa"

    def right(self, answer: str, references: Sequence[str]) -> bool:
        """Says whether the page marks an answer as right: worth a half at least."""
        return vqa.accuracy(answer, references) >= 0.5


class Choices(Choosing, Answers):
    """One of several choices ("choice_accuracy", and "unparsed", the share of answers that name none).

    With config.decode.answers="likelihood" the choice is the one whose text is the most probable after the question.
    """

    name = "choices"
    unread = "names no choice"

    def settings(self, inputs: Inputs) -> str:
        """Returns how a choice is made."""
        return f"{super().settings(inputs)}, answers {inputs.config.decode.answers}"

    def responses(self, split: Split) -> Mapping[str, Sequence[str]]:
        """Returns the choices themselves."""
        return _choices(split)

    def named(self, split: Split, key: str, text: str) -> int | None:
        """Returns the choice that an answer names by its text or its letter."""
        return read_choice(text, _choices(split)[key])

    def record(
        self, inputs: Inputs, asked: Asked, predicted: Predicted, outputs: Mapping[str, str], method: str
    ) -> dict[str, Any]:
        """Returns {"prompt", "decoding", "results" (the choice's place, -1: none was named), "outputs"}."""
        record = super().record(inputs, asked, predicted, outputs, method)
        chosen = self.chosen(asked, predicted, outputs)
        return {**record, "results": {key: -1 if place is None else place for key, place in chosen.items()}}

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Scores the choices."""
        found = score_choices(asked, self.chosen(asked, predicted, outputs))
        return Scored({**found.scores, **predicted.scores}, {**found.rows, **predicted.rows})

    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns the questions with their choices, the right one marked."""
        choices, truth = _choices(split), _truth(split)
        found = []
        for item in super().items(split, limit) or ():
            named = zip(LETTERS, choices[item.id], strict=False)
            shown = tuple(Option(f"({name})", text, i == truth[item.id]) for i, (name, text) in enumerate(named))
            found.append(replace(item, options=shown, truth=""))
        return found

    def read(self, item: Item, predictions: Predictions) -> Reading:
        """Returns the chosen one."""
        place = (predictions.results or {}).get(item.id, -1)
        if type(place) is not int or not -1 <= place < len(item.options):
            raise ValueError(f"question {item.id}: the prediction is choice {place!a:.20} of {len(item.options)}")
        return Reading(None, False) if place < 0 else Reading(item.options[place].name, item.options[place].right)


class Descriptions(Answers):
    """Texts about pictures, compared with people's as captions are: BLEU, METEOR, ROUGE-L, CIDEr, SPICE."""

    name = "descriptions"
    texts = "descriptions"
    told = "Descriptions written for {:,} test pictures."

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Compares the texts with the references, by the reference scorers."""
        return compared(inputs, predicted, outputs, self.references(asked), method)


def read_choice(text: str, choices: Sequence[str]) -> int | None:
    """Returns the place of the choice that an answer names: by its text, or by its letter; None where it names none.

    >>> read_choice("Red.", ("blue", "red")), read_choice("(A) blue", ("blue", "red")), read_choice("I", ("a", "b"))
    (1, 0, None)
    """
    said = text.strip().rstrip(".")
    for place, choice in enumerate(choices):
        if same(said, (choice, choice.rstrip("."))):
            return place
    letter = re.match(r"\(?([A-Z])(?:[).:]|$)", said)
    place = LETTERS.index(letter[1]) if letter else len(choices)
    return place if place < len(choices) else None


def score_choices(asked: Asked, chosen: Mapping[str, int | None]) -> Scored:
    """Returns the accuracy and the share of answers that name no choice.

    Args:
      asked: the questions.
      chosen: the place of the choice that each answer names, None where it names none.
    """
    truth = _truth(asked.split)
    rows = choice_rows([chosen[key] == truth[key] for key in asked.ids])
    unread = sum(place is None for place in chosen.values()) / len(chosen)
    accuracy = sum(right for right, _ in rows["choice_accuracy"]) / len(chosen)
    return Scored({"choice_accuracy": accuracy, "unparsed": unread}, rows)


def _choices(split: Split) -> Mapping[str, tuple[str, ...]]:
    """The choices of each sample, from the split's field `choices`."""
    found = getattr(split, "choices", None)
    missing = [sample.id for sample in split.samples if not (found or {}).get(sample.id)]
    if missing:
        raise ValueError(f"split {split.name!r}: the task 'choices' needs choices, and sample {missing[0]} has none")
    return found or {}


def _truth(split: Split) -> dict[str, int]:
    choices = _choices(split)
    return {sample.id: choices[sample.id].index(sample.response) for sample in split.samples}


OPEN_ANSWERS = (Answers(), Vqa(), Choices(), Descriptions())

"""The task "options": questions with options to choose from, in ScienceQA's form."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eim_jax.data.datasets.scienceqa import QASplit
from eim_jax.data.datasets.scienceqa_prompt import answer_sentence
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import scienceqa
from eim_jax.evaluation.metrics.accuracy import option_rows
from eim_jax.evaluation.tasks.choosing import Choosing
from eim_jax.evaluation.tasks.questions import picture_of
from eim_jax.evaluation.tasks.task import Asked, Item, Option, Predicted, Predictions, Reading, Scored
from eim_jax.training.setup import Inputs


class Options(Choosing):
    """Choices among a `QASplit`'s options.

    Yields "accuracy/<category>" (fractions) and "unparsed" (share of answers that name no option). With
    config.decode.answers="likelihood" the option is not read from the text: it is the one whose answer sentence is the
    most probable.
    """

    name = "options"
    unread = "names no option"
    ended = False

    def settings(self, inputs: Inputs) -> str:
        """Returns how an option is chosen, and what an answer without one counts as."""
        return f", answers {inputs.config.decode.answers}, unparsed {inputs.config.decode.unparsed}"

    def responses(self, split: QASplit) -> dict[str, list[str]]:
        """Returns "The answer is X." for every option."""
        return {
            sample.id: [answer_sentence(k) for k in range(len(split.problems[sample.id].choices))]
            for sample in split.samples
        }

    def named(self, split: QASplit, key: str, text: str) -> int | None:
        """Returns the option that an answer names by the benchmark's rule."""
        return scienceqa.read_answer(text, len(split.problems[key].choices))

    def record(
        self, inputs: Inputs, asked: Asked, predicted: Predicted, outputs: Mapping[str, str], method: str
    ) -> dict[str, Any]:
        """Returns {"prompt", "decoding", "results" (option's index, -1: none was named), "outputs"}."""
        record = super().record(inputs, asked, predicted, outputs, method)
        prompt = {**record["prompt"], "form": asked.split.form}
        chosen = self.chosen(asked, predicted, outputs)
        results = {key: -1 if option is None else option for key, option in chosen.items()}
        return {"prompt": prompt, "decoding": record["decoding"], "results": results, "outputs": record["outputs"]}

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Scores the chosen options."""
        problems, chosen = _problems(asked), self.chosen(asked, predicted, outputs)
        found = scienceqa.score(chosen, problems, unparsed=inputs.config.decode.unparsed, seed=inputs.config.seed)
        scores = {**scienceqa.as_fractions(found), **predicted.scores}
        return Scored(scores, {**option_rows(chosen, problems), **predicted.rows})

    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns the questions with their options."""
        asked = self.ask(split, limit)
        return [
            question(
                sample.id, picture_of(split, sample), problem.question, problem.hint, problem.choices, problem.answer
            )
            for sample in asked.split.samples
            for problem in [split.problems[sample.id]]
        ]

    def read_predictions(self, path: Path, found: Any) -> Predictions:
        """Reads the file, and says of a choice by likelihood that it is one."""
        read = super().read_predictions(path, found)
        if read.results is None:
            raise ValueError(f'{path}: holds no "results" (the chosen option by question id)')
        for name, index in read.results.items():
            if type(index) is not int:
                raise ValueError(f"{path}: results.{name!a:.60} is not the index of an option, but {index!a:.60}")
        decoding = found.get("decoding")
        if isinstance(decoding, Mapping) and decoding.get("answers") == "likelihood":
            said = {"choice": "the most likely option, whatever the text says"}
            return replace(read, settings={**read.settings, **said})
        return read

    def read(self, item: Item, predictions: Predictions) -> Reading:
        """Returns the chosen option."""
        index = predictions.results[item.id]
        if not -1 <= index < len(item.options):
            raise ValueError(f"question {item.id}: the prediction is option {index} of {len(item.options)}")
        if index == -1:
            return Reading("neither yes nor no" if item.truth else None, False)
        return Reading(item.options[index].name, item.options[index].right)


def question(id: str, image, words: str, context: str, options: tuple[str, ...], answer: int) -> Item:
    """Returns a question with options as the page shows it; where they are yes and no, by its truth alone.

    Args:
      id: of the sample.
      image: as `Item.image`.
      words: the question.
      context: what belongs to it, "" for nothing.
      options: to choose from.
      answer: the index of the right one.

    Raises:
      ValueError: `answer` is the index of none of them.
    """
    if not 0 <= answer < len(options):
        raise ValueError(f"question {id}: the answer {answer!r} is none of its options {options}")
    yes_no = [option.lower() for option in options] == ["yes", "no"]
    names = options if yes_no else [f"({chr(ord('A') + i)})" for i in range(len(options))]
    shown = (Option(name, text, i == answer) for i, (name, text) in enumerate(zip(names, options, strict=True)))
    return Item(id, image, words, context, tuple(shown), truth=options[answer] if yes_no else "")


def _problems(asked: Asked) -> dict[str, Any]:
    return {sample.id: asked.split.problems[sample.id] for sample in asked.split.samples}


OPTIONS = Options()

"""The task "yes_no": two yes/no questions a picture, in MME's form."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from eim_jax.data.samples import Sample, Split
from eim_jax.evaluation.metrics import mme
from eim_jax.evaluation.metrics.mme_scores import yes_no_rows
from eim_jax.evaluation.tasks.questions import Questions, picture_of
from eim_jax.evaluation.tasks.task import Asked, Item, Predicted, Predictions, Reading, Scored
from eim_jax.training.setup import Inputs


class YesNo(Questions):
    """Yes or no to a `YesNoSplit`'s questions.

    Yields "mme/<task>", "mme/perception", "mme/cognition", "mme/total" (null where tasks are missing: then "mme/sum" of
    those that are there) and "mme/other" (share of answers that are neither).
    """

    name = "yes_no"
    unread = "neither yes nor no"

    def ask(self, split: Split, limit: int = 0) -> Asked:
        """Returns the questions up to the limit, always both of an image."""
        asked = super().ask(split, limit + limit % 2)
        questions = {key: split.questions[key] for key in asked.ids}
        return replace(asked, split=replace(asked.split, questions=questions))

    def item_of(self, split: Split, sample: Sample) -> str:
        """Returns the id of the picture in its task: both questions count together."""
        question = split.questions[sample.id]
        return f"{question.task}/{question.image}"

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Scores the raw responses as read from the official result files, which this writes into mme_<method>/."""
        folder, split = directory / f"mme_{method}", asked.split
        folder.mkdir(parents=True, exist_ok=True)
        mme.write_results(folder, split, outputs)
        found = mme.score(mme.read(folder))
        scores = {f"mme/{name}": found[name] for name in ("perception", "cognition", "total")}
        scores |= {f"mme/{task}": of["score"] for task, of in found["tasks"].items()}
        if found["missing"]:
            scores["mme/sum"] = found["partial"]["total"]  # of the subtasks that are there
        scores |= {"mme/other": found["other"] / found["questions"], "notes": found["notes"], **predicted.scores}
        right = {key: mme.read_answer(outputs[key]) == q.answer.lower() for key, q in split.questions.items()}
        return Scored(scores, {**yes_no_rows(split.questions, right), **predicted.rows})

    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns the questions with their right answers."""
        return [
            Item(sample.id, picture_of(split, sample), question.question, truth=question.answer)
            for sample in self.ask(split, limit).split.samples
            for question in [split.questions[sample.id]]
        ]

    def read(self, item: Item, predictions: Predictions) -> Reading:
        """Reads the response as MME's own tool does."""
        said = mme.read_answer(predictions.outputs[item.id])
        if said == "other":
            return Reading(None, False)
        return Reading(said.capitalize(), said == item.truth.lower())


YES_NO = YesNo()

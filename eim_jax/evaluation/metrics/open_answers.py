"""Scores of answers to one's own questions: equal to an accepted one, VQA accuracy, the right choice."""

from collections.abc import Mapping, Sequence

from eim_jax.evaluation.metrics import vqa
from eim_jax.evaluation.metrics.metric import Metric, Rows


def same(answer: str, accepted: Sequence[str]) -> bool:
    """Returns whether an answer is one of those accepted, but for case and outer white space."""
    return answer.strip().lower() in {text.strip().lower() for text in accepted}


def _exact(outputs: Mapping[str, str], accepted: Mapping[str, Sequence[str]]) -> Rows:
    return [[int(same(text, accepted[key])), 1] for key, text in outputs.items()]


def _vqa(outputs: Mapping[str, str], people: Mapping[str, Sequence[str]]) -> Rows:
    return [[round(vqa.accuracy(text, people[key]), 6), 1] for key, text in outputs.items()]


def choice_rows(right: Sequence[bool]) -> dict[str, Rows]:
    """Returns the rows of the accuracy over questions with choices.

    Args:
      right: whether each question's right choice was taken.
    """
    return {"choice_accuracy": [[int(one), 1] for one in right]}


_SHOWN = {"factor": 100, "decimals": 1, "sense": 1, "unit": "points"}

METRICS = (
    Metric("exact_match", "exact match", **_SHOWN, tasks=("answers",), measure=_exact),
    Metric("vqa_accuracy", "VQA accuracy", **_SHOWN, tasks=("vqa",), measure=_vqa),
    Metric("choice_accuracy", "accuracy", **_SHOWN, long="accuracy over questions with choices"),
)

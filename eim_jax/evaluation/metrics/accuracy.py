"""Accuracy of chosen options, in ScienceQA's categories of questions."""

from collections.abc import Mapping
from typing import Any

from eim_jax.evaluation.metrics.metric import Family, Metric, Panel, Rows

CATEGORIES = {  # in the order of ScienceQA's table: what each holds
    "Avg": "all questions",
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
    "TXT": "with a text hint",
    "IMG": "with a picture",
    "NO": "neither hint nor picture",
    "G1-6": "grades 1 to 6",
    "G7-12": "grades 7 to 12",
}
_OVER_SEEDS = {
    "Avg": "accuracy",
    "TXT": "accuracy, with a hint",
    "IMG": "accuracy, with a picture",
    "NO": "accuracy, neither",
}
_PANEL = Panel(
    "accuracy by category",
    "By category",
    "Categories overlap: a question counts in each that it belongs to.",
    100,
)


def option_rows(chosen: Mapping[str, int | None], problems: Mapping[str, Any]) -> dict[str, Rows]:
    """Returns the rows of the accuracy over all questions, and over those with a picture.

    Args:
      chosen: each question's option, None where none could be read; the rows stand in this order.
      problems: the right `answer` and the `image` (None: text only) of each question.
    """
    right = {key: int(option == problems[key].answer) for key, option in chosen.items()}
    pictured = {key: int(problems[key].image is not None) for key in chosen}
    return {
        "accuracy/Avg": [[right[key], 1] for key in chosen],
        "accuracy/IMG": [[right[key] * pictured[key], pictured[key]] for key in chosen],
    }


def _of(category: str) -> Metric:
    words = CATEGORIES.get(category, category)
    return Metric(
        f"accuracy/{category}",
        category,
        factor=100,
        decimals=1,
        sense=1,
        unit="points",
        long=f"accuracy, {words}",
        seeds=_OVER_SEEDS.get(category),
        panel=_PANEL,
        bar=f"{category} · {words}",
        summed_up_by=() if category == "Avg" else (frozenset({"accuracy/Avg"}),),
    )


ACCURACY = Family("accuracy/", _of, tuple(CATEGORIES))
UNPARSED = Metric(
    "unparsed",
    "unparsed",
    factor=100,
    decimals=1,
    sense=-1,
    unit="points",
    long="answers that name no option",
    seeds="no option named, % of answers",
)

"""ScienceQA's accuracies of chosen options, by the official rules: NAT SOC LAN TXT IMG NO G1-6 G7-12 Avg.

`python -m eim_jax.evaluation.metrics.scienceqa --predictions predictions.json --data DIR --split test` prints one JSON
object.
"""

import argparse
import json
import os
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from eim_jax.data.datasets.scienceqa_files import read_object, read_problems
from eim_jax.data.datasets.scienceqa_prompt import LETTERS, Problem

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
GRADES = {"G1-6": range(1, 7), "G7-12": range(7, 13)}
RESAMPLES = 10_000
_SHOWN = 5  # ids that a message names

# The official code's pattern, whose last dot is any character but a line break: "The answer is B, ..." counts, and a
# text that was cut right after the letter does not. Published scores were read so.
_ANSWER = re.compile(r"The answer is ([A-Z]).")


def read_answer(text: str, n_choices: int) -> int | None:
    """Returns the option that a generated text names: the first "The answer is X." with a letter among the options'.

    The letter of the first match decides, as in LaVIN's evaluation; None if there is no match, or if that letter is not
    among the first `n_choices`.

    >>> read_answer("The answer is B. BECAUSE: ...", 2)
    1
    """
    match = _ANSWER.search(text)
    index = -1 if match is None else LETTERS.index(match[1])
    return index if 0 <= index < n_choices else None


def score(
    predictions: Mapping[Hashable, Any],
    problems: Mapping[str, Problem],
    *,
    unparsed: str = "wrong",
    seed: int = 0,
) -> dict[str, Any]:
    """Returns ScienceQA's accuracies in percent: NAT SOC LAN (subject) TXT IMG NO (context) G1-6 G7-12 (grade) Avg.

    TXT has a hint and IMG an image, so they overlap; NO has neither (the official tool).

    Args:
      predictions: {id: index of the chosen option, None where the answer could not be read} of all problems.
      problems: {id: problem} of the split.
      unparsed: "wrong", or "random": an option drawn by the seed and the id (as the authors' code does, unseeded).
      seed: of these draws.

    Returns:
      A number for each of COLUMNS, None where a problem lacks the field that it needs, or where it is empty;
      "intervals" {column: [low, high]}, bootstrap 95 % (percentiles of 10,000 resamples of its problems); "counts"
      {column: problems}; "unparsed" (problems); "notes" {column: why it is None, or who is in no column}.

    Raises:
      ValueError: no problems; ids missing or unknown; a prediction that is no index of an option.
    """
    if unparsed not in ("wrong", "random"):
        raise ValueError(f"unparsed is {unparsed!r}: give 'wrong' or 'random'")
    _check(predictions, problems)
    right: dict[str, bool] = {}
    for name, problem in problems.items():
        chosen = predictions[name]
        if chosen is None and unparsed == "random":
            chosen = random.Random(f"{seed}:{name}").randrange(len(problem.choices))  # no other problem changes it
        right[name] = bool(chosen == problem.answer)  # an index may be NumPy's
    members, notes = _columns(problems)
    scores: dict[str, Any] = dict.fromkeys(COLUMNS)
    intervals: dict[str, Any] = dict.fromkeys(COLUMNS)
    for column, ids in members.items():
        if ids:
            correct = sum(right[name] for name in ids)
            scores[column] = 100 * correct / len(ids)
            intervals[column] = _interval(correct, len(ids))
    return {
        **scores,
        "intervals": intervals,
        "counts": {column: len(members[column]) if column in members else None for column in COLUMNS},
        "unparsed": sum(predictions[name] is None for name in problems),
        "unparsed_as": unparsed,
        "notes": notes,
    }


def as_fractions(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `score` returns in the form of scores_test.json: fractions under "accuracy/<column>" (0 to 1).

    With "accuracy/<column>_low" and "_high" (the interval), the share "unparsed", and the notes by the same keys.
    """
    found: dict[str, Any] = {}
    for column in COLUMNS:
        key, bounds = f"accuracy/{column}", scores["intervals"][column]
        found[key] = None if scores[column] is None else scores[column] / 100
        if bounds is not None:
            found |= {f"{key}_low": bounds[0] / 100, f"{key}_high": bounds[1] / 100}
    found["unparsed"] = scores["unparsed"] / scores["counts"]["Avg"]
    return {**found, "notes": {f"accuracy/{column}": why for column, why in scores["notes"].items()}}


def load_predictions(path: str | os.PathLike[str]) -> dict[str, int | None]:
    """Reads {id: option index} or the official {"results": {id: option index}, ...}; -1 and null mean unparsed.

    Raises:
      ValueError: another form, an id twice, or a value that is no whole number, with its id.
    """
    content = read_object(path, 'the option index of each problem id, or {"results": {id: index}}')
    results = content.get("results", content)
    if not isinstance(results, dict):
        raise ValueError(f'{path}: "results" needs an object of option indices by problem id')
    for name, value in results.items():
        if value is not None and not _is_index(value):
            raise ValueError(
                f"{path}: the prediction of problem {name} is {value!r}: give the option's index, 0 for (A), or null"
            )
    return {name: None if value == -1 else value for name, value in results.items()}


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _some(names: Sequence[Hashable]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _check(predictions: Mapping[Hashable, Any], problems: Mapping[str, Problem]) -> None:
    if not problems:
        raise ValueError("no problems to score")
    missing = [name for name in problems if name not in predictions]
    unknown = [name for name in predictions if name not in problems]
    wrongs = []
    if missing:
        wrongs.append(f"{len(missing)} of {len(problems)} problems have no prediction: {_some(missing)}")
    if unknown:
        wrongs.append(f"{len(unknown)} predictions are of no problem of this split: {_some(unknown)}")
    if wrongs:
        hint = (
            f"ids are texts such as {next(iter(problems))!r}; every problem needs one, None where it was not readable"
        )
        raise ValueError(f"{'; '.join(wrongs)} ({hint})")
    for name, problem in problems.items():
        chosen, last = predictions[name], len(problem.choices) - 1
        if chosen is not None and not (_is_index(chosen) and 0 <= chosen <= last):
            raise ValueError(f"the prediction of problem {name} is {chosen!r}: needs 0 to {last}, or None")


def _columns(problems: Mapping[str, Problem]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns the ids in each column that can be had, and notes on the others."""

    def those(belongs: Callable[[Problem], bool]) -> list[str]:
        return [name for name, problem in problems.items() if belongs(problem)]

    members: dict[str, list[str]] = {}
    notes: dict[str, str] = {}
    for field, groups in (("subject", SUBJECTS), ("grade", GRADES)):
        value_of = {name: getattr(problem, field) for name, problem in problems.items()}
        missing = [name for name, value in value_of.items() if value is None]
        if missing:
            why = f"{len(missing)} of {len(problems)} problems have no {field}: {_some(missing)}"
            notes |= dict.fromkeys(groups, why)
            continue
        for column, group in groups.items():
            values = {group} if isinstance(group, str) else {f"grade{number}" for number in group}
            members[column] = [name for name, value in value_of.items() if value in values]
        inside = {name for column in groups for name in members[column]}
        others = [name for name in problems if name not in inside]
        if others:
            why = f"{len(others)} of {len(problems)} problems have another {field}, in no column: {_some(others)}"
            notes |= dict.fromkeys(groups, why)
    members["TXT"] = those(lambda problem: bool(problem.hint))
    members["IMG"] = those(lambda problem: problem.image is not None)
    members["NO"] = those(lambda problem: not problem.hint and problem.image is None)
    members["Avg"] = list(problems)
    for column, ids in members.items():
        if not ids:
            notes[column] = "the split has no such problem"
    return members, notes


def _interval(correct: int, count: int) -> list[float]:
    # The number of right answers in a resample of `count` problems is binomial, so it is drawn as one number.
    drawn = np.random.default_rng(0).binomial(count, correct / count, RESAMPLES)
    return [float(bound) for bound in np.percentile(100 * drawn / count, (2.5, 97.5))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Scores a predictions file of a split of ScienceQA and prints one JSON object."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--predictions", required=True, help='JSON {id: option index} or {"results": {...}}; -1: unread'
    )
    parser.add_argument("--data", required=True, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--split", default="test", help="a split of pid_splits.json (default: test)")
    parser.add_argument("--unparsed", default="wrong", choices=("wrong", "random"), help="what unread answers count as")
    parser.add_argument("--seed", type=int, default=0, help="of --unparsed random")
    options = parser.parse_args(arguments)
    try:
        problems = read_problems(options.data, options.split)
        predictions = load_predictions(options.predictions)
        try:
            scores = score(predictions, problems, unparsed=options.unparsed, seed=options.seed)
        except ValueError as error:
            raise ValueError(f"{options.predictions}: {error}") from error
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()

"""MME scores by the official rules, and result files that the official tool (eval_tool/calculation.py) reads too.

`python -m eim_jax.evaluation.metrics.mme --results DIR` prints one JSON object for a folder of {subtask}.txt.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eim_jax.data.datasets.mme import COGNITION, PERCEPTION, TASKS, YesNoSplit
from eim_jax.data.text_files import read_text
from eim_jax.utils.files import user_path

# One space for each character, so that a response reads the same from the file as before it was written.
_ONE_LINE = str.maketrans("\t\n\r", "   ")


class Result(NamedTuple):
    """One line of a result file: `answer` is "yes" or "no", `response` what the model said."""

    image: str
    question: str
    answer: str
    response: str


def read_answer(response: str) -> str:
    """Returns "yes", "no" or "other" (which counts as wrong), as the official tool reads a response.

    Lower-cased, the first four characters decide: "yes" inside them, else "no" inside them. Nothing is stripped.

    >>> [read_answer(text) for text in ("Yes.", "not sure", "the answer is yes", "  no", "   no")]
    ['yes', 'no', 'other', 'no', 'other']
    """
    start = response.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def write_results(folder: str | os.PathLike[str], split: YesNoSplit, answers: Mapping[str, Any]) -> None:
    """Writes {subtask}.txt for every subtask of the split: image, question, Yes|No and response, tab-separated.

    The two questions of an image follow one another. Tabs and line ends of a response become spaces, one each. Files of
    other subtasks in the folder stay as they are.

    Args:
      folder: made if it is not there.
      split: the questions.
      answers: the response, as generated, of every sample id of the split.

    Raises:
      ValueError: a sample without a response, a response without a sample, or one that is no string.
    """
    missing = [identifier for identifier in split.questions if identifier not in answers]
    if missing:
        raise ValueError(f"no response for {len(missing)} of {len(split.questions)} questions: {missing[:5]}")
    unknown = [identifier for identifier in answers if identifier not in split.questions]
    if unknown:
        raise ValueError(f"{len(unknown)} responses to questions that are not in split {split.name!r}: {unknown[:5]}")
    wrong = [identifier for identifier, response in answers.items() if not isinstance(response, str)]
    if wrong:
        raise ValueError(f"the response is not a string for {len(wrong)} questions: {wrong[:5]}")
    lines: dict[str, dict[str, list[str]]] = {}
    for identifier, question in split.questions.items():
        fields = question.image, question.question, question.answer, answers[identifier]
        line = "\t".join(field.translate(_ONE_LINE) for field in fields)
        lines.setdefault(question.task, {}).setdefault(question.image, []).append(line)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for task, images in lines.items():
        text = "".join(f"{line}\n" for pair in images.values() for line in pair)
        (folder / f"{task}.txt").write_text(text, encoding="utf-8", newline="\n")


def read(folder: str | os.PathLike[str]) -> dict[str, list[Result]]:
    """Returns the lines of every {subtask}.txt in a folder, in the official order of the subtasks.

    Raises:
      ValueError: no result file, a .txt that is no subtask's, or a malformed line, by file and line number: other than
        four fields, an answer other than Yes or No, two lines that are not about one image, an image met again.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no result folder {folder}")
    found = sorted(file.name for file in folder.glob("*.txt"))
    unknown = [name for name in found if pathlib.Path(name).stem not in TASKS]
    if unknown:
        raise ValueError(f"{folder / unknown[0]} is no subtask of MME ({', '.join(TASKS)}): rename or remove it")
    if not found:
        raise ValueError(f"{folder} has no result file: it needs existence.txt, count.txt, ...")
    return {task: _read_file(folder / f"{task}.txt") for task in TASKS if f"{task}.txt" in found}


def _read_file(file: pathlib.Path) -> list[Result]:
    lines = read_text(file).split("\n")  # \r and \r\n end a line too, as in the official tool
    if lines[-1] == "":
        lines.pop()
    results: list[Result] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        where, fields = f"{file} line {number}", line.split("\t")
        if len(fields) != 4:
            raise ValueError(
                f"{where}: {len(fields)} tab-separated fields, not 4 (image, question, Yes|No, response); "
                "a response must not hold tabs or line ends"
            )
        result = Result(fields[0], fields[1], fields[2].lower(), fields[3])
        if result.answer not in ("yes", "no"):
            raise ValueError(f"{where}: the third field is {fields[2]!r}, not Yes or No")
        if number % 2 == 0 and result.image != results[-1].image:
            raise ValueError(
                f"{where}: image {result.image!r} after {results[-1].image!r}; the two questions of an image must "
                "follow one another"
            )
        if number % 2 == 1 and result.image in seen:
            raise ValueError(f"{where}: image {result.image!r} stands in the file before; it has two questions only")
        seen.add(result.image)
        results.append(result)
    if len(results) % 2 or not results:
        raise ValueError(f"{file} line {len(lines)}: the file ends after {len(results)} lines, needs two an image")
    return results


def score(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Returns the MME scores of what `read` returns.

    Args:
      results: lines of each subtask; the two about an image follow one another.

    Returns:
      "perception" (at most 2000), "cognition" (800), "total" (2800): sums over all subtasks, None if one is "missing";
      "partial": the same sums over the subtasks that are there; "tasks": of each subtask "acc" (share of questions),
      "acc_plus" (share of images with both right), "score" = 100 acc + 100 acc_plus, "images", "questions" and "other"
      (responses that read as neither yes nor no); "notes": where a subtask is not the release's.

    Raises:
      ValueError: an unknown subtask, none, or an odd number of lines.
    """
    unknown = [task for task in results if task not in TASKS]
    if unknown or not results:
        raise ValueError(f"{unknown[0]!r} is no subtask of MME" if unknown else "no results to score")
    tasks = {task: _score_task(task, results[task]) for task in TASKS if task in results}
    missing = [task for task in TASKS if task not in tasks]
    notes = {
        task: f"{found['images']} images, the release has {TASKS[task]}"
        for task, found in tasks.items()
        if found["images"] != TASKS[task]
    }
    partial = {
        name: sum(tasks[task]["score"] for task in group if task in tasks)
        for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    partial["total"] = partial["perception"] + partial["cognition"]
    groups = {"perception": PERCEPTION, "cognition": COGNITION, "total": TASKS}
    whole = {name: partial[name] if all(task in tasks for task in groups[name]) else None for name in groups}
    if missing:
        notes["missing"] = f"sums over these subtasks are null: {', '.join(missing)} are missing"
    counts = {name: sum(found[name] for found in tasks.values()) for name in ("images", "questions", "other")}
    return {**whole, "tasks": tasks, "missing": missing, "partial": partial, **counts, "notes": notes}


def _score_task(task: str, lines: Sequence[Result]) -> dict[str, Any]:
    if len(lines) % 2 or not lines:
        raise ValueError(f"{task}: {len(lines)} lines, but every image has two")
    said = [read_answer(line.response) for line in lines]
    right = [answer == line.answer.lower() for answer, line in zip(said, lines, strict=True)]
    acc = sum(right) / len(right)
    acc_plus = sum(a and b for a, b in zip(right[::2], right[1::2], strict=True)) / (len(right) // 2)
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": acc * 100 + acc_plus * 100,
        "images": len(lines) // 2,
        "questions": len(lines),
        "other": said.count("other"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Scores a folder of MME result files and prints one JSON object."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", required=True, help="folder of {subtask}.txt: image, question, Yes|No, response")
    options = parser.parse_args(arguments)
    try:
        scores = score(read(options.results))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()

"""A run that answers questions on the page: accuracy by category, and test questions with every arm's answer."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from eim_jax.data.datasets.mme import COGNITION, PERCEPTION
from eim_jax.evaluation.metrics.mme import read_answer
from eim_jax.reporting.charts import Bars, bars
from eim_jax.reporting.gallery import embed
from eim_jax.reporting.scores import ACCURACIES, BASELINE, METHODS, MME_SUMS, columns, flatten, interval

SHOWN = 24  # cards: a question, or a picture with its yes/no questions
NAMED = 5  # ids named where many are missing


@dataclass(frozen=True)
class Item:
    """One test question: `image` is its picture, a function that gives it, or None (text only); `answer` is the right
    option's index, or its text.

    Items whose ids agree up to their last "/" are about one picture and share a card.
    """

    id: str
    image: Image.Image | Callable[[], Image.Image | None] | None
    question: str
    context: str
    options: tuple[str, ...]
    answer: int | str

    @property
    def right(self) -> int:
        """The right option's index; ValueError if there is none."""
        if isinstance(self.answer, str) and self.answer in self.options:
            return self.options.index(self.answer)
        if isinstance(self.answer, int) and 0 <= self.answer < len(self.options):
            return self.answer
        raise ValueError(f"question {self.id}: the answer {self.answer!r} is none of its options {self.options}")


@dataclass(frozen=True)
class Answers:
    """One arm's predictions_test.json: raw texts, options read from them (None: yes or no, read here), settings."""

    outputs: dict[str, str]
    results: dict[str, int] | None
    settings: dict[str, str]

    def chosen(self, item: Item) -> int | None:
        """The option's index, None if the text names none; ValueError for an index that is no option."""
        if self.results is None:
            said = read_answer(self.outputs[item.id])
            return next((i for i, option in enumerate(item.options) if option.lower() == said), None)
        index = self.results[item.id]
        if not -1 <= index < len(item.options):
            raise ValueError(f"question {item.id}: the prediction is option {index} of {len(item.options)}")
        return None if index == -1 else index


def read_answers(path: Path, found: Mapping) -> Answers:
    """Reads the content of a predictions_test.json of questions; ValueError names the file and what it lacks."""
    if not isinstance(found.get("outputs"), Mapping):
        raise ValueError(f'{path}: holds no "outputs" (raw text by question id)')
    outputs, results = found["outputs"], found.get("results")
    if results is not None and results.keys() != outputs.keys():
        raise ValueError(f'{path}: {_named(results.keys() ^ outputs.keys())} in only one of "results" and "outputs"')
    said = {name: _words(found[name]) for name in ("prompt", "decoding") if found.get(name)}
    decoding = found.get("decoding")
    if isinstance(decoding, Mapping) and decoding.get("answers") == "likelihood":
        said["choice"] = "the most likely option, whatever the text says"
    return Answers(dict(outputs), None if results is None else dict(results), said)


def by_category(arms: Mapping[str, Mapping[str, Mapping[str, object]]]) -> dict | None:
    """Bars of ScienceQA's accuracy by category and of MME's tasks, at the main decoding (the first in a scores file):
    {"title", "words", "charts": [{"title", "range", "svg"}]}; None if no arm has such scores."""
    method = next((name for scores in arms.values() for name in scores), None)
    have = {arm: scores[method] for arm, scores in arms.items() if method in scores}
    shown = [column.key for column in columns([{"": scores} for scores in have.values()])]
    accuracy = [key for key in shown if key.startswith("accuracy/")]
    tasks = [
        key for key in shown if key.startswith("mme/") and key.removeprefix("mme/") not in (*MME_SUMS, "sum", "other")
    ]
    official = {"perception tasks": PERCEPTION, "cognition tasks": COGNITION}
    panels = [("accuracy by category", accuracy, 100, "points")] if accuracy else []
    for title, names in official.items():
        panels.append((title, [key for key in tasks if key.removeprefix("mme/") in names], 1, "of 200"))
    panels.append(("other tasks", [k for k in tasks if k[4:] not in (*PERCEPTION, *COGNITION)], 1, "of 200"))
    charts = []
    for title, keys, factor, unit in panels:
        keys = [key for key in keys if any(flatten(scores).get(key) is not None for scores in have.values())]
        if not keys:
            continue
        series = []
        for arm, scores in have.items():
            values = [flatten(scores).get(key) for key in keys]
            values = [None if value is None else value * factor for value in values]
            spans = [interval(scores, key) for key in keys]
            spans = [span and (span[0] * factor, span[1] * factor) for span in spans]
            series.append(Bars(arm, values, spans, 4 if arm == BASELINE else list(arms).index(arm)))
        svg = bars(series, [_label(key) for key in keys], unit=unit, name=title, most=100 if factor == 100 else 200)
        charts.append({"title": title, "range": "", "svg": svg})
    if not charts:
        return None
    words = f"Decoded with {METHODS.get(method, method)}."
    if accuracy:
        whiskers = any(interval(scores, key) for scores in have.values() for key in accuracy)
        words += " Categories overlap: a question counts in each that it belongs to."
        words += " Whisker: 95 % bootstrap interval over the test questions." if whiskers else ""
    else:
        words += " A task's score: 100 × accuracy over its questions + 100 × share of pictures with both answers right."
    return {"title": "By category" if accuracy else "By task", "words": words, "charts": charts}


def questions(arms: Mapping[str, Answers | None], items: Sequence[Item]) -> dict:
    """Test questions with their options and every arm's answer, in cards; half of them where the arms differ.

    Returns {"cards": [{"id", "picture", "small", "state", "same", "questions"}], "rule": how the cards were chosen,
    "missing": [what is not answered, ...], "settings": [prompt and decoding, ...], "compared": two arms or more}.
    """
    answered = {arm: answers for arm, answers in arms.items() if answers is not None and answers.outputs}
    groups: dict[str, list[Item]] = {}
    for item in items:
        if any(item.id in answers.outputs for answers in answered.values()):
            groups.setdefault(item.id.rpartition("/")[0] or item.id, []).append(item)
    apart = [key for key, group in groups.items() if any(_differ(answered, item) for item in group)]
    alike = [key for key in groups if key not in set(apart)]
    # Where one kind is rare, the other fills its places.
    first = min(len(apart), max(SHOWN // 2, SHOWN - len(alike)))
    others = min(len(alike), SHOWN - first)
    shown = [(key, False) for key in _spaced(apart, first)] + [(key, True) for key in _spaced(alike, others)]
    noun = "questions" if len(groups) == sum(map(len, groups.values())) else "pictures with their questions"
    return {
        "cards": [_card(key, groups[key], answered, same) for key, same in shown],
        "rule": _rule(noun, (len(apart), first), (len(alike), others), len(answered) > 1),
        "missing": _missing(arms, items),
        "settings": _settings(answered),
        "compared": len(answered) > 1,
    }


def _differ(answered: Mapping[str, Answers], item: Item) -> bool:
    return len({answers.chosen(item) for answers in answered.values() if item.id in answers.outputs}) > 1


def _spaced(keys: Sequence[str], count: int) -> list[str]:
    return [keys[i * len(keys) // count] for i in range(count)]


def _card(key: str, group: Sequence[Item], answered: Mapping[str, Answers], same: bool) -> dict:
    image = group[0].image
    picture, small = embed(image() if callable(image) else image)
    state = "" if picture else "text only" if image is None else "picture not available"
    shown = [_question(item, answered) for item in group]
    return {"id": key, "picture": picture, "small": small, "state": state, "same": same, "questions": shown}


def _question(item: Item, answered: Mapping[str, Answers]) -> dict:
    yes_no = [option.lower() for option in item.options] == ["yes", "no"]
    names = [option if yes_no else f"({chr(ord('A') + i)})" for i, option in enumerate(item.options)]
    lines = []
    for arm, answers in answered.items():
        if item.id not in answers.outputs:
            lines.append({"arm": arm, "mark": "missing", "choice": "no prediction", "raw": None})
            continue
        index = answers.chosen(item)
        none = "neither yes nor no" if yes_no else "names no option"
        mark = "right" if index == item.right else "wrong"
        choice = none if index is None else names[index]
        lines.append({"arm": arm, "mark": mark, "choice": choice, "raw": answers.outputs[item.id]})
    options = [
        {"name": name, "text": text, "right": i == item.right}
        for i, (name, text) in enumerate(zip(names, item.options, strict=True))
    ]
    found = {"text": item.question, "context": item.context, "options": options, "answers": lines}
    return found | {"truth": item.options[item.right] if yes_no else ""}


def _rule(noun: str, apart: tuple[int, int], alike: tuple[int, int], compared: bool) -> str:
    """How cards were chosen; `apart`, `alike`: where the arms differ or agree, how many cards and how many shown."""
    (differ, first), (agree, others) = apart, alike
    total, shown = differ + agree, first + others
    of = f"All {total:,} test {noun}" if shown == total else f"{shown} of {total:,} test {noun}"
    if not compared:
        return of + ("." if shown == total else ", evenly spaced in the test split's order: not picked by hand.")
    if shown == total:
        return f"{of}: first the {differ} where the arms differ, then the {agree} others."
    how = "each evenly spaced in the test split's order: not picked by hand"
    return f"{of}: first {first} of the {differ:,} where the arms differ, then {others} of the {agree:,} others, {how}."


def _missing(arms: Mapping[str, Answers | None], items: Sequence[Item]) -> list[str]:
    ids, lines = [item.id for item in items], []
    for arm, answers in arms.items():
        if answers is None:
            lines.append(f"{arm}: no predictions_test.json.")
            continue
        absent = [key for key in ids if key not in answers.outputs]
        unknown = answers.outputs.keys() - set(ids)
        if absent:
            lines.append(f"{arm}: no prediction for {len(absent):,} of {len(ids):,} test questions ({_named(absent)}).")
        if unknown:
            lines.append(
                f"{arm}: predictions for questions that the test split lacks: {len(unknown):,} ({_named(unknown)})."
            )
    return lines


def _settings(answered: Mapping[str, Answers]) -> list[str]:
    """Prompt and decoding, with the arms' names where they were not the same for all."""
    found: dict[tuple[str, str], list[str]] = {}
    for arm, answers in answered.items():
        for name, value in answers.settings.items():
            found.setdefault((name, value), []).append(arm)
    return [
        f"{name}: {value}" + ("" if len(names) == len(answered) else f" ({', '.join(names)})")
        for (name, value), names in found.items()
    ]


def _label(key: str) -> str:
    name = key.partition("/")[2]
    words = ACCURACIES.get(name, "") if key.startswith("accuracy/") else ""
    return f"{name} · {words}" if words else name.replace("_", " ")


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(text)}" for name, text in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text  # a checksum's start tells it apart


def _named(ids) -> str:
    ids = sorted(ids, key=lambda key: (not key.isdigit(), len(key), key))
    return ", ".join(ids[:NAMED]) + (", ..." if len(ids) > NAMED else "")

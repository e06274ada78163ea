"""A run that answers questions on the page: test questions in cards, each with every arm's answer."""

from collections.abc import Mapping, Sequence

from eim_jax.evaluation.tasks.questions import some_of
from eim_jax.evaluation.tasks.task import Item, Predictions, Reading, Task
from eim_jax.reporting.gallery import embed

SHOWN = 24  # cards: a question, or a picture with its yes/no questions


def questions(task: Task, arms: Mapping[str, Predictions | None], items: Sequence[Item]) -> dict:
    """Returns test questions with their options and every arm's answer, in cards; half of them where the arms differ.

    Args:
      task: reads the answers.
      arms: each arm's predictions, None where there are none.
      items: the test questions, in the split's order.

    Returns:
      {"cards": [{"id", "picture", "small", "state", "same", "questions"}], "rule": how the cards were chosen,
      "missing": [what is not answered, ...], "settings": [prompt and decoding, ...], "compared": two arms or more}.
    """
    answered = {arm: answers for arm, answers in arms.items() if answers is not None and answers.outputs}
    readings = {
        item.id: {arm: task.read(item, said) for arm, said in answered.items() if item.id in said.outputs}
        for item in items
    }
    groups: dict[str, list[Item]] = {}
    for item in items:
        if readings[item.id]:
            groups.setdefault(item.id.rpartition("/")[0] or item.id, []).append(item)
    apart = [key for key, group in groups.items() if any(_differ(readings[item.id]) for item in group)]
    alike = [key for key in groups if key not in set(apart)]
    # Where one kind is rare, the other fills its places.
    first = min(len(apart), max(SHOWN // 2, SHOWN - len(alike)))
    others = min(len(alike), SHOWN - first)
    shown = [(key, False) for key in _spaced(apart, first)] + [(key, True) for key in _spaced(alike, others)]
    noun = "questions" if len(groups) == sum(map(len, groups.values())) else "pictures with their questions"
    return {
        "cards": [
            _card(key, same, [_question(item, answered, readings[item.id], task) for item in groups[key]], groups[key])
            for key, same in shown
        ],
        "rule": _rule(noun, (len(apart), first), (len(alike), others), len(answered) > 1),
        "missing": _missing(arms, items),
        "settings": _settings(answered),
        "compared": len(answered) > 1,
    }


def _differ(readings: Mapping[str, Reading]) -> bool:
    return len({reading.choice for reading in readings.values()}) > 1


def _spaced(keys: Sequence[str], count: int) -> list[str]:
    return [keys[i * len(keys) // count] for i in range(count)]


def _card(key: str, same: bool, shown: Sequence[dict], group: Sequence[Item]) -> dict:
    image = group[0].image
    picture, small = embed(image() if callable(image) else image)
    state = "" if picture else "text only" if image is None else "picture not available"
    return {"id": key, "picture": picture, "small": small, "state": state, "same": same, "questions": shown}


def _question(item: Item, answered: Mapping[str, Predictions], readings: Mapping[str, Reading], task: Task) -> dict:
    lines = []
    for arm, answers in answered.items():
        if arm not in readings:
            lines.append({"arm": arm, "mark": "missing", "choice": "no prediction", "raw": None})
            continue
        choice, right = readings[arm]
        mark = "right" if right else "wrong"
        choice = task.unread if choice is None else choice
        lines.append({"arm": arm, "mark": mark, "choice": choice, "raw": answers.outputs[item.id]})
    found = {"text": item.question, "context": item.context, "options": item.options, "answers": lines}
    return found | {"truth": item.truth}


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


def _missing(arms: Mapping[str, Predictions | None], items: Sequence[Item]) -> list[str]:
    ids, lines = [item.id for item in items], []
    for arm, answers in arms.items():
        if answers is None:
            lines.append(f"{arm}: no predictions_test.json.")
            continue
        absent = [key for key in ids if key not in answers.outputs]
        unknown = answers.outputs.keys() - set(ids)
        if absent:
            lines.append(
                f"{arm}: no prediction for {len(absent):,} of {len(ids):,} test questions ({some_of(absent)})."
            )
        if unknown:
            lines.append(
                f"{arm}: predictions for questions that the test split lacks: {len(unknown):,} ({some_of(unknown)})."
            )
    return lines


def _settings(answered: Mapping[str, Predictions]) -> list[str]:
    """Prompt and decoding, with the arms' names where they were not the same for all."""
    found: dict[tuple[str, str], list[str]] = {}
    for arm, answers in answered.items():
        for name, value in answers.settings.items():
            found.setdefault((name, value), []).append(arm)
    return [
        f"{name}: {value}" + ("" if len(names) == len(answered) else f" ({', '.join(names)})")
        for (name, value), names in found.items()
    ]

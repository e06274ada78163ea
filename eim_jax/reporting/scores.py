"""Scores of a run in words and tables: how each is shown, and how an arm compares with the baseline."""

import math
import re
from collections.abc import Mapping, Sequence

from eim_jax.evaluation.metrics import in_order, known_metrics, metric_of
from eim_jax.evaluation.metrics.metric import Metric

BASELINE = "baseline"
METHODS = {"greedy": "greedy search", "beam": "beam search", "nucleus": "nucleus sampling"}
GROUP = "Accuracies and shares"  # what is shown in points, where no metric names its group

Scores = Mapping[str, object]  # of one decoding method, as scores_test.json holds them
Arms = Mapping[str, Mapping[str, Scores]]  # arm -> decoding method -> scores


def flatten(scores: Scores, prefix: str = "") -> dict[str, float | None]:
    """Returns scores as {"a/b": number or None}; notes and other text are left out, nan becomes None.

    >>> flatten({"mme": {"count": 150.0}, "nll": float("nan"), "notes": {"nll": "no text"}})
    {'mme/count': 150.0, 'nll': None}
    """
    flat: dict[str, float | None] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping) and key != "notes":
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is None:
            flat[prefix + key] = None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value) if math.isfinite(value) else None
    return flat


def notes(scores: Scores) -> dict[str, str]:
    """Returns the reasons for scores that are null, from the scorer's "notes" (a dict by score, a list or one text)."""
    found = scores.get("notes") or {}
    if isinstance(found, Mapping):
        return {str(key): str(value) for key, value in found.items()}
    return {
        "": "; ".join(map(str, found)) if isinstance(found, Sequence) and not isinstance(found, str) else str(found)
    }


def interval(scores: Scores, key: str) -> tuple[float, float] | None:
    """Returns a score's bounds, which the scorer gives as KEY_low and KEY_high beside the score or in its notes."""
    said = scores.get("notes")
    known = (flatten(said) if isinstance(said, Mapping) else {}) | flatten(scores)
    low, high = known.get(f"{key}_low"), known.get(f"{key}_high")
    return None if low is None or high is None else (low, high)


def columns(scores: Sequence[Mapping[str, Scores]]) -> list[Metric]:
    """Returns the metrics of any arm and decoding, in METRICS' order; where one of a group is there, all of the group.

    KEY_low and KEY_high are the interval of KEY and no columns.
    """
    seen = {key: None for arm in scores for method in arm.values() for key in flatten(method)}
    seen = [key for key in seen if re.sub(r"_(low|high)$", "", key) not in seen.keys() - {key}]
    groups = {metric_of(key).group for key in seen} - {""}
    return in_order([*(metric.key for metric in known_metrics() if metric.group in groups), *seen])


def table(arms: Arms) -> dict:
    """Returns the score table.

    Args:
      arms: arm -> decoding method -> scores.

    Returns:
      {"columns", "methods": [{"name", "rows": [{"arm", "cells"}]}], "missing": [reason, ...], "notes": [what else the
      scorer said, ...], "points": what is shown in points, in words, "intervals": whether there are such}. A cell has
      text, its interval if known, and beside a baseline its difference and sign.
    """
    shown = columns(list(arms.values()))
    methods, missing, said = [], {}, {}
    for method in dict.fromkeys(name for scores in arms.values() for name in scores):
        base = flatten(arms.get(BASELINE, {}).get(method, {}))
        rows = []
        for arm, scores in arms.items():
            if method not in scores:
                continue
            where = f"{arm}, {METHODS.get(method, method)}"
            for key, text in _other_notes(scores[method], shown).items():
                said.setdefault((key, text), []).append(where)
            cells = [_cell(column, scores[method], {} if arm == BASELINE else base) for column in shown]
            for column, cell in zip(shown, cells, strict=True):
                if "reason" in cell:
                    missing.setdefault((column.label, cell["reason"]), []).append(where)
            rows.append({"arm": arm, "cells": cells})
        methods.append({"name": METHODS.get(method, method), "rows": rows})
    everywhere = sum(len(method["rows"]) for method in methods)
    return {
        "columns": shown,
        "methods": methods,
        "missing": _lines(missing, everywhere),
        "notes": _lines(dict(sorted(said.items())), everywhere),
        "points": next((column.group for column in shown if column.group), GROUP),
        "intervals": any(cell.get("interval") for m in methods for row in m["rows"] for cell in row["cells"]),
    }


def _cell(column: Metric, scores: Scores, base: Mapping[str, float | None]) -> dict:
    """One score as shown, with its difference from the baseline's where `base` holds it; a dash has its reason."""
    values, why = flatten(scores), notes(scores)
    value = values.get(column.key)
    if value is None:
        absent = "null in the scores file" if column.key in values else "not in the scores file"
        return {"text": "–", "reason": why.get(column.key) or why.get("") or why.get(column.reason) or absent}
    cell = {"text": column.text(value), "interval": _bounds(column, interval(scores, column.key))}
    if base.get(column.key) is not None:
        cell["change"], cell["better"] = column.signed(base[column.key], value)
    return cell


def _other_notes(scores: Scores, shown: Sequence[Metric]) -> dict[str, str]:
    """What the scorer noted besides the reasons of scores that are null and the bounds of intervals."""
    values, keys = flatten(scores), {column.key for column in shown}
    reasons = {key for key in keys if values.get(key) is None} | {"", *(column.reason for column in shown)}
    return {
        key: text
        for key, text in notes(scores).items()
        if key not in reasons and re.sub(r"_(low|high)$", "", key) not in keys - {key}
    }


def _lines(found: Mapping[tuple[str, str], Sequence[str]], everywhere: int) -> list[str]:
    """One line for the labels of which the same is said: {(label, text): where} -> "label, label: text (where)"."""
    same: dict[tuple, list[str]] = {}
    for (label, text), where in found.items():
        same.setdefault((text, tuple(where)), []).append(label)
    return [
        f"{', '.join(labels)}: {text}" + ("" if len(where) == everywhere else f" ({'; '.join(where)})")
        for (text, where), labels in same.items()
    ]


def _bounds(column: Metric, found: tuple[float, float] | None) -> str:
    return f"[{column.text(found[0])}, {column.text(found[1])}]" if found else ""


def compare(base: Scores, arm: Scores) -> list[dict]:
    """Returns the scores of the verdict that both have; what another score sums up is left to the table.

    Returns:
      [{"key", "label", "base", "value", "interval", "change", "better", "sense"}].
    """
    left, right = flatten(base), flatten(arm)
    both = {key for key in left if left[key] is not None and right.get(key) is not None}
    rows = []
    for column in columns([{"": base}]):
        if column.key not in both or any(sums <= both for sums in column.summed_up_by):
            continue
        change, better = column.signed(left[column.key], right[column.key])
        label = column.long or column.label
        row = {"key": column.key, "label": label, "sense": column.sense, "change": change, "better": better}
        row["interval"] = _bounds(column, interval(arm, column.key))
        rows.append(row | {"base": column.text(left[column.key]), "value": column.text(right[column.key])})
    return rows


def verdict(arms: Arms) -> list[dict]:
    """Returns each arm against the baseline in words, at its main decoding (the first in the baseline's file)."""
    method = next(iter(arms.get(BASELINE) or {}), None)
    found = []
    for arm, scores in arms.items():
        if arm == BASELINE or method not in scores:
            continue
        rows = compare(arms[BASELINE][method], scores[method])
        judged = [row for row in rows if row["better"] is not None]
        if not judged:
            continue
        named = [[row["label"] for row in judged if row["better"] == sign] for sign in (1, -1, 0)]
        if len(named[0]) == len(judged):
            words = f"{arm} is better than the baseline in all {len(judged)} scores"
        elif len(named[1]) == len(judged):
            words = f"{arm} is worse than the baseline in all {len(judged)} scores"
        else:
            parts = [
                f"{how} in {len(labels)} of {len(judged)} scores ({', '.join(labels)})"
                for how, labels in zip(("better", "worse", "equal"), named, strict=True)
                if labels
            ]
            words = f"{arm} against the baseline: {', '.join(parts)}"
        found.append({"arm": arm, "method": METHODS.get(method, method), "words": words + ".", "rows": rows})
    return found

"""Scores of a run in words and tables: how each is called, shown and compared with the baseline."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASELINE = "baseline"
# key in scores_test.json -> name on the page; fractions there, points (x 100) on the page, as in the paper
POINTS = {f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
    "SPICE": "SPICE",
}
METHODS = {"greedy": "greedy search", "beam": "beam search", "nucleus": "nucleus sampling"}


@dataclass(frozen=True)
class Metric:
    """One column: key, name, factor to the shown unit, decimals; sense +1 higher is better, -1 lower, 0 neither."""

    key: str
    label: str
    factor: int | float
    decimals: int
    sense: int

    def text(self, value: int | float) -> str:
        """The value as shown."""
        return f"{value * self.factor:.{self.decimals}f}"

    def signed(self, base: int | float, value: int | float) -> tuple[str, int | None]:
        """The difference as shown, and +1 better, -1 worse, 0 equal to the shown digit, None: not judged."""
        change = round(value * self.factor, self.decimals) - round(base * self.factor, self.decimals)
        change = round(change, self.decimals)
        better = (int(change > 0) - int(change < 0)) * self.sense if self.sense else None
        return ("±0" if change == 0 else f"{change:+.{self.decimals}f}".replace("-", "−")), better


def metric(key: str) -> Metric:
    """Describes a key: captioning scores and shares (F1, accuracy) in points, NLL in nats; others are not judged."""
    if key in POINTS:
        return Metric(key, POINTS[key], 100, 1, 1)
    label = key.replace("/", " ").replace("_", " ")
    if "nll" in key.lower():
        if "shuffled" in key:  # with a wrong picture neither a high nor a low NLL is good in itself: not judged
            return Metric(key, "test NLL, shuffled pictures", 1, 3, 0)
        return Metric(key, f"test {label}".replace("nll", "NLL"), 1, 3, -1)
    if any(word in key.lower() for word in ("f1", "accuracy", "precision", "recall")):
        return Metric(key, label.replace("f1", "F1"), 100, 1, 1)
    return Metric(key, label, 1, 3, 0)


def flatten(scores: Mapping[str, object], prefix: str = "") -> dict[str, float | None]:
    """Scores as {"a/b": number or None}; notes and other text are left out, nan becomes None."""
    flat: dict[str, float | None] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping) and key != "notes":
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is None:
            flat[prefix + key] = None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value) if math.isfinite(value) else None
    return flat


def notes(scores: Mapping[str, object]) -> dict[str, str]:
    """Reasons for scores that are null, from the scorer's "notes" (a dict by score, a list or one text)."""
    found = scores.get("notes") or {}
    if isinstance(found, Mapping):
        return {str(key): str(value) for key, value in found.items()}
    return {
        "": "; ".join(map(str, found)) if isinstance(found, Sequence) and not isinstance(found, str) else str(found)
    }


def columns(scores: Sequence[Mapping[str, Mapping[str, object]]]) -> list[Metric]:
    """Every score of any arm and decoding, the captioning scores first and always."""
    seen = {key: None for arm in scores for method in arm.values() for key in flatten(method)}
    return [metric(key) for key in POINTS] + [metric(key) for key in seen if key not in POINTS]


def table(arms: Mapping[str, Mapping[str, Mapping[str, object]]]) -> dict:
    """The score table: {"columns", "methods": [{"name", "rows": [{"arm", "cells"}]}], "missing": [reason, ...],
    "notes": [what else the scorer said, ...]}.

    `arms` maps arm -> decoding method -> scores. A cell has text, and beside a baseline its difference and sign.
    """
    shown = columns(list(arms.values()))
    methods, missing, said = [], {}, {}
    for method in dict.fromkeys(name for scores in arms.values() for name in scores):
        base = flatten(arms.get(BASELINE, {}).get(method, {}))
        rows = []
        for arm, scores in arms.items():
            if method not in scores:
                continue
            values, why = flatten(scores[method]), notes(scores[method])
            for key in why.keys() - {key for key in POINTS if values.get(key) is None} - {""}:
                said.setdefault((key, why[key]), []).append(f"{arm}, {METHODS.get(method, method)}")
            cells = []
            for column in shown:
                value = values.get(column.key)
                if value is None:
                    reason = why.get(column.key) or why.get("") or "not in the scores file"
                    missing.setdefault((column.label, reason), []).append(f"{arm}, {METHODS.get(method, method)}")
                    cells.append({"text": "–", "reason": reason})
                    continue
                cell = {"text": column.text(value)}
                if arm != BASELINE and base.get(column.key) is not None:
                    cell["change"], cell["better"] = column.signed(base[column.key], value)
                cells.append(cell)
            rows.append({"arm": arm, "cells": cells})
        methods.append({"name": METHODS.get(method, method), "rows": rows})
    everywhere = sum(len(method["rows"]) for method in methods)

    def lines(found: dict) -> list[str]:
        return [
            f"{label}: {text}" + ("" if len(where) == everywhere else f" ({'; '.join(where)})")
            for (label, text), where in found.items()
        ]

    return {"columns": shown, "methods": methods, "missing": lines(missing), "notes": lines(dict(sorted(said.items())))}


def compare(base: Mapping[str, object], arm: Mapping[str, object]) -> list[dict]:
    """The scores of the verdict that both have: {"key", "label", "base", "value", "change", "better", "sense"}.

    BLEU-1..3, precision and recall are left to the table: BLEU-4 and F1 sum them up.
    """
    left, right = flatten(base), flatten(arm)
    rows = []
    for column in columns([{"": base}]):
        if re.search(r"Bleu_[123]|precision|recall", column.key):
            continue
        if left.get(column.key) is None or right.get(column.key) is None:
            continue
        change, better = column.signed(left[column.key], right[column.key])
        row = {"key": column.key, "label": column.label, "sense": column.sense, "change": change, "better": better}
        rows.append(row | {"base": column.text(left[column.key]), "value": column.text(right[column.key])})
    return rows


def verdict(arms: Mapping[str, Mapping[str, Mapping[str, object]]]) -> list[dict]:
    """Each arm against the baseline in words, at the baseline's main decoding (the first in its scores file)."""
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

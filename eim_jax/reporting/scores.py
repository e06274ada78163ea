"""Scores of a run in words and tables: how each is called, shown and compared with the baseline."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eim_jax.data.datasets.mme import COGNITION, PERCEPTION

BASELINE = "baseline"
# key in scores_test.json -> name on the page; fractions there, points (x 100) on the page, as in the paper
POINTS = {f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
    "SPICE": "SPICE",
}
ACCURACIES = {  # ScienceQA's categories of questions in the order of its table: what each holds
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
# each of MME's tasks counts 0...200: 100 x accuracy over questions + 100 x share of pictures with both answers right
MME_SUMS = {"perception": len(PERCEPTION), "cognition": len(COGNITION), "total": len(PERCEPTION) + len(COGNITION)}
ORDER = [f"accuracy/{name}" for name in ACCURACIES] + ["unparsed"]
ORDER += [f"mme/{name}" for name in (*MME_SUMS, "sum", *PERCEPTION, *COGNITION, "other")]
METHODS = {"greedy": "greedy search", "beam": "beam search", "nucleus": "nucleus sampling"}


@dataclass(frozen=True)
class Metric:
    """One column: key, name, factor to the shown unit, decimals; sense +1 higher is better, -1 lower, 0 neither.

    `unit` stands below the name; `long` is the name away from the table, where it is not `label`.
    """

    key: str
    label: str
    factor: int | float
    decimals: int
    sense: int
    unit: str = ""
    long: str = ""

    @property
    def name(self) -> str:
        """The name that is clear by itself."""
        return self.long or self.label

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
    """Describes a key: captioning scores and shares (F1, accuracy) in points, NLL in nats, MME as it counts itself.

    Others are not judged.
    """
    if key in POINTS:
        return Metric(key, POINTS[key], 100, 1, 1, "points")
    family, _, part = key.partition("/")
    label = key.replace("/", " ").replace("_", " ")
    if family == "accuracy" and part in ACCURACIES:
        return Metric(key, part, 100, 1, 1, "points", f"accuracy, {ACCURACIES[part]}")
    if key == "unparsed":
        return Metric(key, "unparsed", 100, 1, -1, "points", "answers that name no option")
    if key == "mme/other":
        return Metric(key, "other", 100, 1, -1, "points", "answers neither yes nor no")
    if key == "mme/sum":
        return Metric(key, "sum of these tasks", 1, 1, 1, "", "MME, sum of the tasks that are there")
    if family == "mme":
        most = 200 * MME_SUMS.get(part, 1)
        return Metric(key, part.replace("_", " "), 1, 1, 1, f"of {most:,}", f"MME {part.replace('_', ' ')}")
    if "nll" in key.lower():
        if "shuffled" in key:  # with a wrong picture neither a high nor a low NLL is good in itself: not judged
            return Metric(key, "test NLL, shuffled pictures", 1, 3, 0, "nats")
        return Metric(key, f"test {label}".replace("nll", "NLL"), 1, 3, -1, "nats")
    if any(word in key.lower() for word in ("f1", "accuracy", "precision", "recall")):
        return Metric(key, label.replace("f1", "F1"), 100, 1, 1, "points")
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


def interval(scores: Mapping[str, object], key: str) -> tuple[float, float] | None:
    """The bounds that the scorer gives for a score as KEY_low and KEY_high, beside the score or in its notes."""
    said = scores.get("notes")
    known = (flatten(said) if isinstance(said, Mapping) else {}) | flatten(scores)
    low, high = known.get(f"{key}_low"), known.get(f"{key}_high")
    return None if low is None or high is None else (low, high)


def columns(scores: Sequence[Mapping[str, Mapping[str, object]]]) -> list[Metric]:
    """Every score of any arm and decoding: all captioning scores first if there is any, then questions', then others'.

    KEY_low and KEY_high are the interval of KEY and no columns.
    """
    seen = {key: None for arm in scores for method in arm.values() for key in flatten(method)}
    seen = [key for key in seen if re.sub(r"_(low|high)$", "", key) not in seen.keys() - {key}]
    caption = list(POINTS) if any(key in POINTS for key in seen) else []
    rest = [key for key in seen if key not in POINTS and key not in ORDER]
    return [metric(key) for key in caption + [key for key in ORDER if key in seen] + rest]


def table(arms: Mapping[str, Mapping[str, Mapping[str, object]]]) -> dict:
    """The score table: {"columns", "methods": [{"name", "rows": [{"arm", "cells"}]}], "missing": [reason, ...],
    "notes": [what else the scorer said, ...], "captioning", "intervals": whether there are such}.

    `arms` maps arm -> decoding method -> scores. A cell has text, its interval if known, and beside a baseline its
    difference and sign.
    """
    shown = columns(list(arms.values()))
    keys = {column.key for column in shown}
    methods, missing, said = [], {}, {}
    for method in dict.fromkeys(name for scores in arms.values() for name in scores):
        base = flatten(arms.get(BASELINE, {}).get(method, {}))
        rows = []
        for arm, scores in arms.items():
            if method not in scores:
                continue
            values, why = flatten(scores[method]), notes(scores[method])
            for key in why.keys() - {key for key in keys if values.get(key) is None} - {"", "missing"}:
                if re.sub(r"_(low|high)$", "", key) not in keys - {key}:
                    said.setdefault((key, why[key]), []).append(f"{arm}, {METHODS.get(method, method)}")
            cells = []
            for column in shown:
                value = values.get(column.key)
                if value is None:
                    absent = "null in the scores file" if column.key in values else "not in the scores file"
                    tasks = why.get("missing") if column.key.startswith("mme/") else None  # why a sum is null
                    reason = why.get(column.key) or why.get("") or tasks or absent
                    missing.setdefault((column.label, reason), []).append(f"{arm}, {METHODS.get(method, method)}")
                    cells.append({"text": "–", "reason": reason})
                    continue
                cell = {"text": column.text(value), "interval": _bounds(column, interval(scores[method], column.key))}
                if arm != BASELINE and base.get(column.key) is not None:
                    cell["change"], cell["better"] = column.signed(base[column.key], value)
                cells.append(cell)
            rows.append({"arm": arm, "cells": cells})
        methods.append({"name": METHODS.get(method, method), "rows": rows})
    everywhere = sum(len(method["rows"]) for method in methods)

    def lines(found: dict) -> list[str]:
        same: dict[tuple, list[str]] = {}  # one line for the labels of which the same is said
        for (label, text), where in found.items():
            same.setdefault((text, tuple(where)), []).append(label)
        return [
            f"{', '.join(labels)}: {text}" + ("" if len(where) == everywhere else f" ({'; '.join(where)})")
            for (text, where), labels in same.items()
        ]

    return {
        "columns": shown,
        "methods": methods,
        "missing": lines(missing),
        "notes": lines(dict(sorted(said.items()))),
        "captioning": bool(keys & POINTS.keys()),
        "intervals": any(cell.get("interval") for m in methods for row in m["rows"] for cell in row["cells"]),
    }


def _bounds(column: Metric, found: tuple[float, float] | None) -> str:
    return f"[{column.text(found[0])}, {column.text(found[1])}]" if found else ""


def compare(base: Mapping[str, object], arm: Mapping[str, object]) -> list[dict]:
    """The scores of the verdict that both have: {"key", "label", "base", "value", "interval", "change", "better",
    "sense"}.

    What another score sums up is left to the table: BLEU-1..3, precision and recall (BLEU-4, F1), and where both have
    the sum also categories of questions (Avg), MME's tasks and its total (perception, cognition).
    """
    left, right = flatten(base), flatten(arm)
    both = {key for key in left if left[key] is not None and right.get(key) is not None}
    rows = []
    for column in columns([{"": base}]):
        if column.key not in both or re.search(r"Bleu_[123]|precision|recall", column.key):
            continue
        if _summed_up(column.key, both):
            continue
        change, better = column.signed(left[column.key], right[column.key])
        row = {"key": column.key, "label": column.name, "sense": column.sense, "change": change, "better": better}
        row["interval"] = _bounds(column, interval(arm, column.key))
        rows.append(row | {"base": column.text(left[column.key]), "value": column.text(right[column.key])})
    return rows


def _summed_up(key: str, both: set[str]) -> bool:
    family, _, part = key.partition("/")
    if family == "accuracy":
        return part != "Avg" and "accuracy/Avg" in both
    if part == "total":
        return {"mme/perception", "mme/cognition"} <= both
    if family == "mme" and part not in (*MME_SUMS, "sum", "other"):
        kind = "perception" if part in PERCEPTION else "cognition"
        return bool({f"mme/{kind}", "mme/total", "mme/sum"} & both)
    return False


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

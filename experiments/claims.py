"""The paper's claims, written down before any of them was measured here, and the rule that judges them.

A claim says that row `better` scores higher than row `worse`. Both are measured over the same seeds and test items;
the interval is that of intervals.py. The rule:

- supported: the interval of the difference lies above 0;
- not supported: it does not, and the interval lies below half of what the paper's effect would be here, or below 0.
  The paper's effect here is its relative change, times the worse row's mean;
- undecided: neither: the interval holds 0 and also effects as large as the paper's.

Several claims are judged at 95 % each: of a dozen that are wrong, about 0.3 are found supported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.cells import Row
from experiments.intervals import Spread, difference, score
from experiments.rows import (
    ADAPTER,
    ADAPTER_EIM,
    ADAPTER_EIM3,
    BASELINE,
    CHAT,
    CHAT_EIM,
    EIM,
    FEATURES,
    FEATURES_ST,
    FEATURES_ST_LM,
    IE_ALONE,
    IE_FIRST,
    JOINT,
    LARGE,
    LAVIN,
    LAVIN_EIM,
    LM_ALONE,
    LM_FIRST,
    ST_ALONE,
    ST_WITH_LM,
)


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse` in `metric`; `effect` is the paper's relative change, 0: not known."""

    name: str
    table: str
    statement: str
    better: Row
    worse: Row
    metric: str = "Bleu_4"
    effect: float = 0.0


def _captions(name: str, table: str, statement: str, better: Row, worse: Row) -> Claim:
    values = better.paper.get("Bleu_4"), worse.paper.get("Bleu_4")
    return Claim(name, table, statement, better, worse, effect=0.0 if None in values else values[0] / values[1] - 1)


CLAIMS = (
    _captions("eim", "2", "EIM makes ClipCap better", EIM, BASELINE),
    _captions("eim-large", "2", "ClipCap small with EIM beats ClipCap large", EIM, LARGE),
    _captions("st", "3", "loss_ST alone makes ClipCap better", ST_ALONE, BASELINE),
    _captions("lm", "3", "loss_LM alone makes ClipCap better", LM_ALONE, BASELINE),
    _captions("ie", "3", "loss_IE (with prompts) alone makes ClipCap better", IE_ALONE, BASELINE),
    _captions("features", "4", "CLIP's full features make ClipCap better", FEATURES, BASELINE),
    _captions("stage-st", "4", "the ST stage adds to the features", FEATURES_ST, FEATURES),
    _captions("stage-lm", "4", "the LM stage adds to the ST stage", FEATURES_ST_LM, FEATURES_ST),
    _captions("stage-ie", "4", "the IE stage adds to the LM stage", EIM, FEATURES_ST_LM),
    _captions("segmented", "5", "segmented stages beat all losses in one stage", EIM, JOINT),
    _captions("apart", "6", "loss_ST and loss_LM in a stage each beat one stage for both", EIM, ST_WITH_LM),
    _captions("order", "7", "the ST stage before the LM stage beats the other order", EIM, LM_FIRST),
    _captions("ie-last", "8", "the IE stage last beats the IE stage first", EIM, IE_FIRST),
    Claim(
        "adapter3",
        "10",
        "EIM without new parameters makes LLaMA-Adapter better",
        ADAPTER_EIM3,
        ADAPTER,
        "accuracy/Avg",
        87.62 / 85.19 - 1,
    ),
    Claim(
        "adapter",
        "10",
        "EIM makes LLaMA-Adapter better",
        ADAPTER_EIM,
        ADAPTER,
        "accuracy/Avg",
        87.95 / 85.19 - 1,
    ),
    Claim("lavin", "11", "EIM makes LaVIN better", LAVIN_EIM, LAVIN, "accuracy/Avg", 90.0 / 88.35 - 1),
    Claim("chat", "12", "EIM makes LaVIN's chatbot perceive better", CHAT_EIM, CHAT, "mme/sum"),
)


@dataclass(frozen=True)
class Verdict:
    """What is known of a claim: `word` is supported, not supported, undecided, or not measured."""

    claim: Claim
    word: str
    change: Spread | None = None
    expected: float = 0.0  # the paper's effect on this scale; 0: not known


def judge(claim: Claim, results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Verdict:
    """The verdict on a claim from cells {row name: {seed: result}}."""
    left, right = results.get(claim.worse.name, {}), results.get(claim.better.name, {})
    change = difference(left, right, claim.metric)
    if change is None or change.interval is None or change.seeds < 2:
        return Verdict(claim, "not measured", change)
    seeds = {seed: left[seed] for seed in left.keys() & right.keys()}
    expected = claim.effect * score(seeds, claim.metric).mean
    return Verdict(claim, rule(change.interval, expected), change, expected)


def rule(interval: tuple[float, float], expected: float) -> str:
    """The word for an interval of (better - worse), where the paper's effect would be `expected` (0: not known)."""
    low, high = interval
    if low > 0:
        return "supported"
    return "not supported" if high < max(expected / 2, 0) else "undecided"

"""The paper's claims, written down before any was measured here, our controls beside them, and the rule for all.

A claim says that row `better` scores higher than row `worse`. Both are measured over the same seeds and test items;
the interval is that of intervals.py. The rule:

- supported: the interval of the difference lies above 0;
- not supported: it does not, and the interval lies below half of what the paper's effect would be here, or below 0.
  The paper's effect here is its relative change, times the worse row's mean;
- undecided: neither: the interval holds 0 and also effects as large as the paper's.

Several claims are judged at 95 % each: of a dozen that are wrong, about 0.3 are found supported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.cells import Row
from experiments.intervals import Spread, difference, score
from experiments.rows import (
    ADAPTER,
    ADAPTER_EIM,
    ADAPTER_EIM3,
    ADAPTER_FEATURES,
    ADAPTER_IE_ZERO,
    BASELINE,
    CHAT,
    CHAT_EIM,
    EIM,
    FEATURES,
    FEATURES_ST,
    FEATURES_ST_LM,
    IE_ALONE,
    IE_ALONE_ZERO,
    IE_FIRST,
    IE_ZERO,
    JOINT,
    LARGE,
    LAVIN,
    LAVIN_EIM,
    LAVIN_FEATURES,
    LAVIN_IE_ZERO,
    LAVIN_LITE,
    LAVIN_LITE_EIM,
    LM_ALONE,
    LM_BY_BASE,
    LM_CENTRED,
    LM_CENTRED_IMAGE,
    LM_DISTIL,
    LM_DISTIL_CENTRED,
    LM_FIRST,
    LM_LAST,
    LM_OTHERS,
    NO_LM,
    NO_ST,
    NORMS_IE,
    NORMS_ZERO,
    PROMPTS_IE,
    PROMPTS_ZERO,
    ST_ALONE,
    ST_BY_BASE,
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
    ours: bool = False  # the paper does not say it: a control that its claim needs


def _paper(name: str, table: str, statement: str, better: Row, worse: Row, metric: str = "Bleu_4") -> Claim:
    values = better.paper.get(metric), worse.paper.get(metric)
    effect = 0.0 if None in values else values[0] / values[1] - 1
    return Claim(name, table, statement, better, worse, metric, effect)


def _control(name: str, table: str, statement: str, better: Row, worse: Row, metric: str = "Bleu_4") -> Claim:
    return Claim(name, table, statement, better, worse, metric, ours=True)


AVERAGE = "accuracy/Avg"
LITE = _paper("lavin-lite", "11", "EIM makes LaVIN-lite better", LAVIN_LITE_EIM, LAVIN_LITE, AVERAGE)
CLAIMS = (
    _paper("eim", "2", "EIM makes ClipCap better", EIM, BASELINE),
    _paper("eim-large", "2", "ClipCap small with EIM beats ClipCap large", EIM, LARGE),
    _paper("st", "3", "loss_ST alone makes ClipCap better", ST_ALONE, BASELINE),
    _paper("lm", "3", "loss_LM alone makes ClipCap better", LM_ALONE, BASELINE),
    _paper("ie", "3", "loss_IE (with prompts) alone makes ClipCap better", IE_ALONE, BASELINE),
    _paper("features", "4", "CLIP's full features make ClipCap better", FEATURES, BASELINE),
    _paper("stage-st", "4", "the ST stage adds to the features", FEATURES_ST, FEATURES),
    _paper("stage-lm", "4", "the LM stage adds to the ST stage", FEATURES_ST_LM, FEATURES_ST),
    _paper("stage-ie", "4", "the IE stage adds to the LM stage", EIM, FEATURES_ST_LM),
    _paper("segmented", "5", "segmented stages beat all losses in one stage", EIM, JOINT),
    _paper("apart", "6", "loss_ST and loss_LM in a stage each beat one stage for both", EIM, ST_WITH_LM),
    _paper("order", "7", "the ST stage before the LM stage beats the other order", EIM, LM_FIRST),
    _paper("ie-last", "8", "the IE stage last beats the IE stage first", EIM, IE_FIRST),
    _paper(
        "adapter3",
        "10",
        "EIM without new parameters makes LLaMA-Adapter better",
        ADAPTER_EIM3,
        ADAPTER,
        AVERAGE,
    ),
    _paper("adapter", "10", "EIM makes LLaMA-Adapter better", ADAPTER_EIM, ADAPTER, AVERAGE),
    # The paper gives no EIM on LaVIN-7B: the effect is LaVIN-7B-lite's.
    replace(LITE, name="lavin", statement="EIM makes LaVIN better", better=LAVIN_EIM, worse=LAVIN),
    LITE,
    _paper("chat", "12", "EIM makes LaVIN's chatbot better", CHAT_EIM, CHAT, "mme/sum"),
    _control("prompts", "controls", "in EIM, prompts add to the last stage, without loss_IE", IE_ZERO, FEATURES_ST_LM),
    _control(
        "prompts-alone",
        "controls",
        "in one stage, prompts add to the features, without loss_IE",
        PROMPTS_ZERO,
        FEATURES,
    ),
    _control("prompts-cls", "controls", "on [CLS], prompts add, without loss_IE", IE_ALONE_ZERO, BASELINE),
    _control("loss-ie", "controls", "in EIM, loss_IE adds to what its prompts do", EIM, IE_ZERO),
    _control("loss-ie-prompts", "controls", "in one stage, loss_IE adds to prompts", PROMPTS_IE, PROMPTS_ZERO),
    _control("loss-ie-alone", "controls", "on [CLS], loss_IE adds to prompts", IE_ALONE, IE_ALONE_ZERO),
    _control("loss-ie-norms", "controls", "loss_IE adds to training CLIP's LayerNorms", NORMS_IE, NORMS_ZERO),
    _control("loss-st", "controls", "in EIM, loss_ST does more for the ST than loss_base", EIM, ST_BY_BASE),
    _control("loss-lm", "controls", "in EIM, loss_LM does more for the LM than loss_base", EIM, LM_BY_BASE),
    _control("no-lm", "controls", "EIM with its LM stage beats EIM without it", EIM, NO_LM),
    _control("no-st", "controls", "EIM with its ST stage beats EIM without it", EIM, NO_ST),
    _control("lavin-stages", "controls-qa", "LaVIN: EIM adds to its features", LAVIN_EIM, LAVIN_FEATURES, AVERAGE),
    _control("lavin-loss-ie", "controls-qa", "LaVIN: loss_IE adds", LAVIN_EIM, LAVIN_IE_ZERO, AVERAGE),
    _control("adapter-loss-ie", "controls-qa", "LLaMA-Adapter: loss_IE adds", ADAPTER_EIM, ADAPTER_IE_ZERO, AVERAGE),
    _control(
        "adapter-stages",
        "controls-qa",
        "LLaMA-Adapter: EIM adds to its features",
        ADAPTER_EIM,
        ADAPTER_FEATURES,
        AVERAGE,
    ),
    _control("lm-last", "open", "loss_LM beside loss_base helps, without an LM stage", LM_LAST, NO_LM),
    _control("lm-distil", "open", "loss_LM without negatives, beside loss_base, helps", LM_DISTIL, NO_LM),
    _control("negatives", "open", "beside loss_base, loss_LM's negatives help", LM_LAST, LM_DISTIL),
    _control("centred", "cone", "EIM with loss_LM centred beats EIM with it raw", LM_CENTRED, EIM),
    _control("centred-no-lm", "cone", "EIM with loss_LM centred beats EIM without an LM stage", LM_CENTRED, NO_LM),
    _control(
        "centred-image",
        "cone",
        "centred, with the image before the query, it beats no LM stage",
        LM_CENTRED_IMAGE,
        NO_LM,
    ),
    _control("others", "cone", "centred, to the picture's other captions, it beats no LM stage", LM_OTHERS, NO_LM),
    _control(
        "distil-centred", "cone", "centred, without negatives, beside loss_base, it helps", LM_DISTIL_CENTRED, NO_LM
    ),
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

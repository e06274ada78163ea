"""The second design: what is decided, by which rows, seeds, outcomes and margins. docs/results/design.md is its text.

python -m experiments.run --table=confirm           # 280 runs, a seed at a time, finished ones shared
python -m experiments.run --table=negatives
python -m experiments.run --table=rivals
python -m experiments.decide                        # experiments/results/miniature-design.md

Its rows are those of the tables, tested on 2,000 scenes instead of 400. Nothing here may change once a run of it has
been looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments import claims
from experiments.cells import Row
from experiments.layout import ANSWERS, CAPTIONS, Table
from experiments.rows import (
    ADAPTER,
    ADAPTER_EIM,
    ADAPTER_EIM3,
    BASELINE,
    EIM,
    EIM_BATCH,
    FEATURES,
    FEATURES_ST,
    IE_ALONE,
    IE_ALONE_ZERO,
    IE_ZERO,
    LLAVA,
    LM_ALONE,
    NEGATIVES,
    NO_LM,
    NORMS_IE,
    NORMS_ZERO,
    PROMPTS_IE,
    PROMPTS_ZERO,
    ST_ALONE,
    ST_WITH_LM,
)

TESTED = 2000  # scenes; questions are two a scene
QUESTIONS = 4000
BASES = {"clipcap": BASELINE, "llama_adapter": ADAPTER}  # whose training time the others get in budget "time"
POINT = 0.01  # of BLEU-4: what is too small to matter where the paper names no effect
NLL_MARGIN = 0.01  # of the worse row's NLL a token


@dataclass(frozen=True)
class Declared:
    """A claim of this design.

    Args:
      name: for the page.
      statement: what is claimed.
      family: claims that Holm's correction takes together, one correction an outcome.
      pairs: (worse, better) rows; of several the mean difference is judged.
      metric: the primary outcome.
      effect: the paper's relative change; 0: unknown.
      margin: of the primary outcome, in its own unit, where the paper's effect is unknown.
    """

    name: str
    statement: str
    family: str
    pairs: tuple[tuple[Row, Row], ...]
    metric: str = "Bleu_4"
    effect: float = 0.0
    margin: float = POINT

    def bound(self, worse: float) -> float:
        """What difference is large enough to matter: half of the paper's, at the worse rows' mean score."""
        return abs(self.effect * worse) / 2 if self.effect else self.margin


# Seeds of each row. The first seven rows' and the questions' by the noise of the first design's runs (decide --first).
SEEDS: Mapping[str, int] = {
    **dict.fromkeys((row.name for row in (BASELINE, ST_ALONE, LM_ALONE, IE_ALONE)), 25),
    **dict.fromkeys((row.name for row in (EIM, FEATURES, ST_WITH_LM)), 20),
    **dict.fromkeys((row.name for row in (ADAPTER, ADAPTER_EIM3, ADAPTER_EIM)), 40),
    **dict.fromkeys((row.name for row in (IE_ZERO, PROMPTS_IE, PROMPTS_ZERO, IE_ALONE_ZERO, NORMS_IE, NORMS_ZERO)), 5),
}
OTHERS = 10
_tested: dict[str, Row] = {}


def tested(row: Row) -> Row:
    """The row on this design's test set, with its seeds."""
    more = QUESTIONS if row.family in ("llama_adapter", "lavin") else TESTED
    made = replace(
        row,
        name=f"{row.name}-{TESTED}",
        overrides={**row.overrides, "data.test_items": more},
        scales=("miniature",),
        seeds=SEEDS.get(row.name, OTHERS),
        base=f"{BASES[row.family].name}-{TESTED}",
    )
    return _tested.setdefault(made.name, made)


def _claim(name: str, family: str, statement: str, worse: Row, better: Row) -> Declared:
    return Declared(name, statement, family, ((tested(worse), tested(better)),))


def _of_paper(name: str) -> Declared:
    [claim] = [claim for claim in claims.CLAIMS if claim.name == name]
    pair = (tested(claim.worse), tested(claim.better))
    return Declared(name, claim.statement, "confirm", (pair,), claim.metric, claim.effect)


SETTINGS = ((IE_ZERO, EIM), (PROMPTS_ZERO, PROMPTS_IE), (IE_ALONE_ZERO, IE_ALONE), (NORMS_ZERO, NORMS_IE))
POOLED = tuple((tested(worse), tested(better)) for worse, better in SETTINGS)
DECLARED = (
    *map(_of_paper, ("eim", "features", "st", "lm", "ie", "apart", "adapter3", "adapter")),
    Declared("loss-ie-pooled", "loss_IE adds, over its four settings", "loss-ie", POOLED),
    _claim("eim-queue", "negatives", "EIM with its queues beats EIM with in-batch negatives", EIM_BATCH, EIM),
    *(
        _claim(f"queue-{row.name}", "negatives", f"without an LM stage, queues of all data beat {what}", row, NO_LM)
        for row, what in NEGATIVES
    ),
    _claim("llava", "rivals", "the ST stage on loss_ST beats the same stage on loss_base", LLAVA, FEATURES_ST),
)


def rows_of(family: str) -> tuple[Row, ...]:
    """The rows that a family's claims need, each once."""
    rows = [row for claim in DECLARED if claim.family == family for pair in claim.pairs for row in pair]
    return tuple({row.name: row for row in rows}.values())


ABOUT = (
    "The second design, on 2,000 test scenes: what is declared of it, and how it is judged, is docs/results/design.md."
)
TABLES = (
    Table("confirm", "The paper's claims, second design", rows_of("confirm"), (*CAPTIONS, *ANSWERS[:2]), about=ABOUT),
    Table("pool", "loss_IE in four settings, second design", rows_of("loss-ie"), CAPTIONS, about=ABOUT),
    Table("negatives", "What a query is contrasted with", rows_of("negatives"), CAPTIONS, about=ABOUT),
    Table("rivals", "Other recipes", rows_of("rivals"), CAPTIONS, about=ABOUT),
)

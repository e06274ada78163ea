"""The second design: what is decided, by which rows, seeds, outcomes and margins. docs/results/design.md is its text.

python -m experiments.run --table=confirm           # 280 runs, a seed at a time, finished ones shared
python -m experiments.run --table=negatives
python -m experiments.run --table=rivals
python -m experiments.run --table=pilot,pilot-sizes # 20 runs on a small scale
python -m experiments.run --table=related           # 20 more
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
    LM_LAST,
    NEGATIVES,
    NO_LM,
    NORMS_IE,
    NORMS_ZERO,
    PILOT_10,
    PILOT_BATCH,
    PILOT_FEATURES,
    PILOT_QUEUE,
    PILOT_RECENT,
    PILOT_ST,
    PILOT_TESTED,
    PILOT_VIRAL,
    PILOT_WORDS,
    PROMPTS_IE,
    PROMPTS_ZERO,
    ST_ALONE,
    ST_BY_BASE,
    ST_WITH_LM,
    VIRAL,
)

TESTED = 2000  # scenes; questions are two a scene
QUESTIONS = 4000
# By family, the row whose training time the others get in budget "time"
BASES = {"clipcap": BASELINE, "clipcap_viral": BASELINE, "llama_adapter": ADAPTER}
POINT = 0.01  # of BLEU-4: what is too small to matter where the paper names no effect
NLL_MARGIN = 0.01  # of the worse row's NLL a token
TIMED = ("negatives",)  # families that are judged a second time at equal time


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
      scenes: of the test.
      like: rows of the first design whose noise stands in for that of `pairs`, where those have not run (power.py).
    """

    name: str
    statement: str
    family: str
    pairs: tuple[tuple[Row, Row], ...]
    metric: str = "Bleu_4"
    effect: float = 0.0
    margin: float = POINT
    scenes: int = TESTED
    like: tuple[Row, Row] | None = None

    @property
    def seeds(self) -> int:
        """How many its rows share."""
        return min(row.seeds for pair in self.pairs for row in pair)

    @property
    def pilots(self) -> tuple[tuple[Row, Row], ...]:
        """The rows of the first design from whose noise it was planned."""
        if self.like:
            return (self.like,)
        return tuple((untested(worse), untested(better)) for worse, better in self.pairs)

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
# Rows that the first design has not: how long one runs, by the row that it is a variant of.
COSTS_AS = {
    EIM_BATCH.name: EIM,
    **{row.name: NO_LM for row, _ in NEGATIVES},
    LLAVA.name: FEATURES_ST,
    VIRAL.name: FEATURES,
}
_tested: dict[str, Row] = {}
_first: dict[str, Row] = {}  # the name of a row of this design -> the row that it tests on more scenes


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
    _first[made.name] = row
    return _tested.setdefault(made.name, made)


def untested(row: Row) -> Row:
    """The row that one of this design tests on more scenes; itself where it is no such row."""
    return _first.get(row.name, row)


def _claim(name: str, family: str, statement: str, worse: Row, better: Row, like: tuple[Row, Row]) -> Declared:
    return Declared(name, statement, family, ((tested(worse), tested(better)),), like=like)


def _pilot(family: str, what: str, worse: Row, better: Row = PILOT_QUEUE, name: str = "") -> Declared:
    statement = f"pilot, without an LM stage: {what}"
    pair, like = (worse, better), (LM_LAST, NO_LM)
    return Declared(name or worse.name, statement, family, (pair,), scenes=PILOT_TESTED, like=like)


def _of_paper(name: str) -> Declared:
    [claim] = [claim for claim in claims.CLAIMS if claim.name == name]
    pair = (tested(claim.worse), tested(claim.better))
    return Declared(name, claim.statement, "confirm", (pair,), claim.metric, claim.effect)


SETTINGS = ((IE_ZERO, EIM), (PROMPTS_ZERO, PROMPTS_IE), (IE_ALONE_ZERO, IE_ALONE), (NORMS_ZERO, NORMS_IE))
POOLED = tuple((tested(worse), tested(better)) for worse, better in SETTINGS)
DECLARED = (
    *map(_of_paper, ("eim", "features", "st", "lm", "ie", "apart", "adapter3", "adapter")),
    Declared("loss-ie-pooled", "loss_IE adds, over its four settings", "loss-ie", POOLED),
    _claim(
        "eim-queue",
        "negatives",
        "EIM with its queues beats EIM with in-batch negatives",
        EIM_BATCH,
        EIM,
        like=(IE_ZERO, EIM),
    ),
    *(
        _claim(
            f"queue-{row.name}",
            "negatives",
            f"without an LM stage, queues of all data beat {what}",
            row,
            NO_LM,
            like=(LM_LAST, NO_LM),
        )
        for row, what in NEGATIVES
    ),
    _pilot("pilot", "queues of all data beat in-batch negatives", PILOT_BATCH),
    _pilot("pilot-sizes", "queues of all data beat a queue of 10 % of the data", PILOT_10),
    _pilot("pilot-sizes", "queues of all data beat the keys of the 8 batches before", PILOT_RECENT),
    _pilot(
        "related", "loss_VRA (VIRAL) beside loss_base adds to full features", PILOT_FEATURES, PILOT_VIRAL, "pilot-viral"
    ),
    _pilot("related", "the ST stage on loss_W (after SEA) beats that on loss_ST", PILOT_ST, PILOT_WORDS, "pilot-sea"),
    _claim(
        "llava",
        "rivals",
        "the ST stage on loss_ST beats the same stage on loss_base",
        LLAVA,
        FEATURES_ST,
        like=(ST_BY_BASE, EIM),
    ),
    _claim(
        "viral", "rivals", "loss_VRA (VIRAL) beside loss_base adds to full features", FEATURES, VIRAL, (LM_LAST, NO_LM)
    ),
)


def rows_of(family: str) -> tuple[Row, ...]:
    """The rows that a family's claims need, each once."""
    rows = [row for claim in DECLARED if claim.family == family for pair in claim.pairs for row in pair]
    return tuple({row.name: row for row in rows}.values())


ABOUT = (
    "The second design, on 2,000 test scenes: what is declared of it, and how it is judged, is docs/results/design.md."
)
PILOT_ABOUT = "A third of the steps, 600 training scenes, 1,000 test scenes: declared in docs/results/design.md."
TABLES = (
    Table("confirm", "The paper's claims, second design", rows_of("confirm"), (*CAPTIONS, *ANSWERS[:2]), about=ABOUT),
    Table("pool", "loss_IE in four settings, second design", rows_of("loss-ie"), CAPTIONS, about=ABOUT),
    Table("negatives", "What a query is contrasted with", rows_of("negatives"), CAPTIONS, about=ABOUT),
    Table("pilot", "Queue or batch, on a small scale", rows_of("pilot"), CAPTIONS, about=PILOT_ABOUT),
    Table("pilot-sizes", "Smaller queues, on a small scale", rows_of("pilot-sizes"), CAPTIONS, about=PILOT_ABOUT),
    Table("related", "Losses of related work, on a small scale", rows_of("related"), CAPTIONS, about=PILOT_ABOUT),
    Table("rivals", "Other recipes", rows_of("rivals"), CAPTIONS, about=ABOUT),
)

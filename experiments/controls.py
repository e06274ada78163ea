"""Controls: the same training with weight 0 on the loss that is said to help."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import (
    EIM,
    FEATURES,
    FEATURES_ST_LM,
    IE_ZERO,
    NORMS_IE,
    NORMS_ZERO,
    PROMPTS_IE,
    PROMPTS_ZERO,
    ST_BY_BASE,
)

TABLE = Table(
    "controls",
    "Controls",
    (EIM, IE_ZERO, PROMPTS_IE, PROMPTS_ZERO, ST_BY_BASE, NORMS_IE, NORMS_ZERO, FEATURES, FEATURES_ST_LM),
    CAPTIONS,
    about="Compared with EIM. Two rows that differ in loss_IE's weight alone isolate it; the others show what its "
    "prompts, and the steps of the earlier stages, do by themselves.",
)

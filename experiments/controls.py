"""Controls: the same training with weight 0 on the loss that is said to help."""

from experiments.layout import ANSWERS, CAPTIONS, Table
from experiments.rows import (
    ADAPTER,
    ADAPTER_EIM,
    ADAPTER_FEATURES,
    ADAPTER_IE_ZERO,
    BASELINE,
    EIM,
    FEATURES,
    FEATURES_ST_LM,
    IE_ALONE,
    IE_ALONE_ZERO,
    IE_ZERO,
    LAVIN,
    LAVIN_EIM,
    LAVIN_FEATURES,
    LAVIN_IE_ZERO,
    LM_BY_BASE,
    NO_LM,
    NO_ST,
    NORMS_IE,
    NORMS_ZERO,
    PROMPTS_IE,
    PROMPTS_ZERO,
    ST_BY_BASE,
)

TABLE = Table(
    "controls",
    "Controls",
    (
        EIM,
        IE_ZERO,
        PROMPTS_IE,
        PROMPTS_ZERO,
        IE_ALONE,
        IE_ALONE_ZERO,
        NORMS_IE,
        NORMS_ZERO,
        ST_BY_BASE,
        LM_BY_BASE,
        NO_LM,
        NO_ST,
        BASELINE,
        FEATURES,
        FEATURES_ST_LM,
    ),
    CAPTIONS,
    about="Compared with EIM. Two rows that differ in loss_IE's weight alone isolate it; the others show what its "
    "prompts, and the steps of the earlier stages, do by themselves.",
)
QUESTIONS = Table(
    "controls-qa",
    "Controls, questions",
    (LAVIN, LAVIN_FEATURES, LAVIN_IE_ZERO, LAVIN_EIM, ADAPTER, ADAPTER_FEATURES, ADAPTER_IE_ZERO, ADAPTER_EIM),
    ANSWERS,
    about="Compared with LaVIN. The features alone, in one stage, are what EIM's stages and losses have to beat.",
)

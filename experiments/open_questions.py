"""What the paper leaves open: one choice of EIM's changed at a time."""

from experiments.layout import ANSWERS, CAPTIONS, Table
from experiments.rows import (
    DOT,
    DOT_TAU,
    EIM,
    GROUP,
    IE_WEAK,
    LAVIN_EIM,
    LAVIN_FIRST,
    LAVIN_IE_ZERO,
    LM_DISTIL,
    LM_IMAGE,
    MASK,
    PROMPTS_1,
    PROMPTS_16,
    PROMPTS_PLAIN,
    SPLIT_EVEN,
    SPLIT_ST,
)

ABOUT = "Compared with EIM as its config has it: cosine, tau 0.07, own key alone, text alone, 4 prompt tokens a block."
TABLE = Table(
    "open",
    "What the paper leaves open",
    (
        EIM,
        DOT,
        DOT_TAU,
        GROUP,
        MASK,
        LM_IMAGE,
        LM_DISTIL,
        SPLIT_EVEN,
        SPLIT_ST,
        PROMPTS_1,
        PROMPTS_16,
        PROMPTS_PLAIN,
        IE_WEAK,
    ),
    CAPTIONS,
    about=ABOUT,
)
QUESTIONS = Table("open-lavin", "What the paper leaves open, LaVIN", (LAVIN_EIM, LAVIN_FIRST, LAVIN_IE_ZERO), ANSWERS)

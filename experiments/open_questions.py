"""What the paper leaves open: one choice of EIM's changed at a time.

The two rows with loss_LM in the last stage have no LM stage: what they are judged against is EIM without one.
"""

from experiments.layout import ANSWERS, CAPTIONS, Table
from experiments.rows import (
    DOT,
    DOT_TAU,
    EIM,
    GROUP,
    IE_WEAK,
    LAVIN_EIM,
    LAVIN_FIRST,
    LM_DISTIL,
    LM_IMAGE,
    LM_LAST,
    MASK,
    NO_LM,
    PROMPTS_1,
    PROMPTS_16,
    PROMPTS_PLAIN,
    SPLIT_EVEN,
    SPLIT_ST,
    TAU,
)

ABOUT = "Compared with EIM as its config has it: cosine, tau 0.07, own key alone, text alone."
TABLE = Table(
    "open",
    "What the paper leaves open",
    (
        EIM,
        DOT,
        DOT_TAU,
        TAU,
        GROUP,
        MASK,
        LM_IMAGE,
        NO_LM,
        LM_LAST,
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
QUESTIONS = Table("open-lavin", "Which 50 tokens LaVIN keeps", (LAVIN_EIM, LAVIN_FIRST), ANSWERS)

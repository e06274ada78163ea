"""Table 9: which of CLIP's features the ST receives."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import ALL_TOKENS, BASELINE, FEATURES, NO_OUTPUT

TABLE = Table(
    "9",
    "CLIP's features",
    (BASELINE, NO_OUTPUT, ALL_TOKENS, FEATURES),
    CAPTIONS,
    marks=("no output layer", "all tokens"),
    ticks=(("", ""), ("✓", ""), ("", "✓"), ("✓", "✓")),
)

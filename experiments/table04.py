"""Table 4: EIM's measures added one after another."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import BASELINE, EIM, FEATURES, FEATURES_ST, FEATURES_ST_LM

TABLE = Table(
    "4",
    "Measures added one after another",
    (BASELINE, FEATURES, FEATURES_ST, FEATURES_ST_LM, EIM),
    CAPTIONS,
    marks=("CLIP features", "ST stage", "LM stage", "IE stage"),
    ticks=(("", "", "", ""), ("✓", "", "", ""), ("✓", "✓", "", ""), ("✓", "✓", "✓", ""), ("✓", "✓", "✓", "✓")),
)

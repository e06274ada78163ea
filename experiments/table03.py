"""Table 3: each loss alone, added to ClipCap."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import BASELINE, IE_ALONE, LM_ALONE, ST_ALONE

TABLE = Table(
    "3",
    "Each loss alone",
    (BASELINE, ST_ALONE, LM_ALONE, IE_ALONE),
    CAPTIONS,
    marks=("loss_ST", "loss_LM", "loss_IE"),
    ticks=(("", "", ""), ("✓", "", ""), ("", "✓", ""), ("", "", "✓")),
)

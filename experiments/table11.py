"""Table 11, ScienceQA: LaVIN with EIM."""

from experiments.layout import SCIENCEQA, Table
from experiments.rows import LAVIN, LAVIN_13B, LAVIN_13B_LITE, LAVIN_EIM, LAVIN_LITE, LAVIN_LITE_EIM

ROWS = (LAVIN, LAVIN_13B, LAVIN_LITE, LAVIN_13B_LITE, LAVIN_LITE_EIM, LAVIN_EIM)
TABLE = Table("11", "LaVIN with EIM on questions", ROWS, (*SCIENCEQA, "nll", "nll_image_gap"))

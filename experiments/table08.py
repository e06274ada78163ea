"""Table 8: the IE stage first (the paper's numbers are not known to us)."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import EIM, IE_FIRST

TABLE = Table("8", "Place of the IE stage", (IE_FIRST, EIM), CAPTIONS)

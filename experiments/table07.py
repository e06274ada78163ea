"""Table 7: the LM stage before the ST stage (the paper's numbers are not known to us)."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import EIM, LM_FIRST

TABLE = Table("7", "Order of the ST and LM stages", (LM_FIRST, EIM), CAPTIONS)

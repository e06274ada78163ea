"""Table 6: loss_ST and loss_LM in one stage against a stage each."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import EIM, ST_WITH_LM

TABLE = Table("6", "loss_ST and loss_LM in one stage, or one each", (ST_WITH_LM, EIM), CAPTIONS)

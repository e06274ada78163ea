"""Table 5: all losses in one stage against segmented training."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import EIM, JOINT

TABLE = Table("5", "One stage against segmented training", (JOINT, EIM), CAPTIONS)

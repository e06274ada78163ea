"""The rate of the stage with loss_base on the validation split, of the baseline and of EIM."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import TUNING, TUNING_EIM

TABLE = Table("tuning", "The learning rate, validation split", (*TUNING, *TUNING_EIM), CAPTIONS)

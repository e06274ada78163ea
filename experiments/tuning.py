"""The rate of the stages with loss_base on the validation split, of each baseline and of EIM."""

from experiments.layout import ANSWERS, CAPTIONS, Table
from experiments.rows import TUNING, TUNING_EIM, TUNING_QA

TABLE = Table("tuning", "The learning rate, validation split", (*TUNING, *TUNING_EIM), CAPTIONS)
QUESTIONS = Table("tuning-qa", "The learning rate, validation split, questions", TUNING_QA, ANSWERS)

"""The baseline's learning rate on the validation split: what every row's last stage then uses."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import TUNING

TABLE = Table("tuning", "The baseline's learning rate, validation split", TUNING, CAPTIONS)

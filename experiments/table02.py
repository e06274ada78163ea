"""Table 2, COCO captions: EIM on GPT-2 small against ClipCap on GPT-2 small and large."""

from experiments.layout import CAPTIONS, Table
from experiments.rows import BASELINE, EIM, LARGE

TABLE = Table("2", "ClipCap with EIM on captions", (BASELINE, LARGE, EIM), CAPTIONS)

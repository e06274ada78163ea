"""Table 10, ScienceQA: LLaMA-Adapter with EIM."""

from experiments.layout import SCIENCEQA, Table
from experiments.rows import ADAPTER, ADAPTER_EIM, ADAPTER_EIM3

TABLE = Table(
    "10",
    "LLaMA-Adapter with EIM on questions",
    (ADAPTER, ADAPTER_EIM3, ADAPTER_EIM),
    (*SCIENCEQA, "nll", "nll_image_gap"),
)

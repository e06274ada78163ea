"""Table 12: perception of the chatbot, by MME's subtasks."""

from eim_jax.data.datasets.mme import PERCEPTION
from experiments.layout import Table
from experiments.rows import CHAT, CHAT_13B, CHAT_EIM

METRICS = ("mme/sum", "mme/perception", *(f"mme/{task}" for task in PERCEPTION), "nll", "nll_image_gap")
TABLE = Table(
    "12",
    "The chatbot's perception (MME)",
    (CHAT, CHAT_13B, CHAT_EIM),
    METRICS,
    about="Of these the miniature asks about existence, count, position and color; the sum holds Table 13's tasks too.",
)

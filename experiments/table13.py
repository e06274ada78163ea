"""Table 13: cognition of the chatbot, by MME's subtasks."""

from eim_jax.data.datasets.mme import COGNITION
from experiments.layout import Table
from experiments.rows import CHAT, CHAT_13B, CHAT_EIM

METRICS = ("mme/cognition", *(f"mme/{task}" for task in COGNITION))
TABLE = Table(
    "13",
    "The chatbot's cognition (MME)",
    (CHAT, CHAT_13B, CHAT_EIM),
    METRICS,
    about="The miniature has two of these, asked by the test alone: how many sides a shape has and what colour two "
    "others make (commonsense), and of which kind there are more (numerical).",
)

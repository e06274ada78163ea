"""The miniature chatbot as a data set: drawn instructions, and yes/no questions in MME's form as its test."""

from pathlib import Path

from eim_jax.config import Data
from eim_jax.data.bad_items import BadItem
from eim_jax.data.data_set import DataSet
from eim_jax.data.datasets.instruct_prompt import single_turn
from eim_jax.data.datasets.miniature import MiniatureFields, drawn
from eim_jax.data.samples import Split


def _load(data: Data, own: MiniatureFields, name: str, cache: Path) -> tuple[Split, list[BadItem]]:
    from eim_jax.data.miniature import chat  # here, because the miniature's tasks import from this package

    if name == "test":
        return chat.load_yes_no(0, *filter(None, [drawn(own, name)])), []
    return chat.load_chat(name, seed=0, samples=drawn(own, name)), []


MINIATURE_CHAT = DataSet(
    "miniature_chat", MiniatureFields, _load, scored=("test",), free_on_resume=("test_items",), prompt=single_turn
)

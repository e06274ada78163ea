"""The miniature ScienceQA as a data set: drawn questions with options, with or without a picture."""

import dataclasses
from pathlib import Path

from eim_jax.config import Data
from eim_jax.data.bad_items import BadItem
from eim_jax.data.data_set import DataSet
from eim_jax.data.datasets.instruct_prompt import single_turn
from eim_jax.data.datasets.miniature import drawn
from eim_jax.data.samples import Split


@dataclasses.dataclass(frozen=True)
class MiniatureQAFields:
    """The fields of `config.data` that the miniature's questions alone read."""

    scenes: int = 1600  # miniature only: training scenes (five captions each), or questions
    test_items: int = 0  # miniature only: test scenes (0: 400), questions (0: 600), or the chat's images a task (0: 50)
    form: str = "QCM-ALE"  # scienceqa: question, context, multiple choice -> answer, lecture, explanation


def _load(data: Data, own: MiniatureQAFields, name: str, cache: Path) -> tuple[Split, list[BadItem]]:
    from eim_jax.data.miniature import qa  # here, because the miniature's tasks import from this package

    return qa.load(name, seed=0, problems=drawn(own, name), form=own.form), []


MINIATURE_QA = DataSet("miniature_qa", MiniatureQAFields, _load, free_on_resume=("test_items",), prompt=single_turn)

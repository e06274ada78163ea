"""What a split of one's own questions needs for the task that `config.data.eval_task` names."""

from typing import Any

from eim_jax.config import ConfigError
from eim_jax.data.held_out import check_share
from eim_jax.data.samples import Split

TASKS = ("answers", "vqa", "choices", "descriptions")
PEOPLE = 10  # of VQA's rule


def check(own: Any) -> None:
    """Checks the fields of what is scored.

    Args:
      own: the `InstructFields`.

    Raises:
      ConfigError: names the field.
    """
    if own.eval_task not in TASKS:
        raise ConfigError(f"config.data.eval_task is {own.eval_task!r}, none of {', '.join(TASKS)}")
    check_share(own.eval_share)


def check_task(split: Split, task: str) -> None:
    """Checks that each sample has what the task compares its answer with.

    Raises:
      ValueError: names the first sample that lacks it.
    """
    choices = getattr(split, "choices", {})
    for sample in split.samples:
        if task == "vqa" and len(split.references[sample.id]) != PEOPLE:
            raise ValueError(
                f"{sample.id}: has {len(split.references[sample.id])} answers, and config.data.eval_task='vqa' takes "
                f'"answers" of {PEOPLE} people: give them, or set eval_task="answers"'
            )
        if task == "choices" and sample.id not in choices:
            raise ValueError(
                f"{sample.id}: has no \"choices\", which config.data.eval_task='choices' asks for: give them, or set "
                'eval_task="answers"'
            )

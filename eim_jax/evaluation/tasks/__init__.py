"""What a test split asks for: TASKS, the table of tasks that a split names in its field `task`.

A task of your own is one object in this table, from a script or a config file: `TASKS["spelling"] = Spelling()`.
"""

from eim_jax.data.samples import Split
from eim_jax.evaluation.tasks import captions, open_answers, options, scenes, yes_no
from eim_jax.evaluation.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (captions.CAPTIONS, scenes.SCENES, options.OPTIONS, yes_no.YES_NO, *open_answers.OPEN_ANSWERS)
}


def task_of(split: Split) -> Task:
    """Returns the task that a split names.

    Raises:
      ValueError: there is none of this name.
    """
    if split.task not in TASKS:
        known = ", ".join(TASKS)
        raise ValueError(
            f"split {split.name!r} names the task {split.task!r}, which is none of {known}: "
            "put your task into eim_jax.evaluation.tasks.TASKS, or set the split's field `task`"
        )
    return TASKS[split.task]

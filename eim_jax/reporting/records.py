"""What the page asks of a run's records: each field of its type, or an error that names the file and the field."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eim_jax.data.bad_items import name_problem, outside
from eim_jax.training.log import SCORED
from eim_jax.utils.files import Damaged

_LARGEST = 1e300  # a larger number is none that a run writes, and charts and tables cannot hold it


class _Kind(NamedTuple):
    """A type of field in words, and whether a value is of it."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_COUNT = _Kind("a whole number", _is_count)
_NUMBER = _Kind("a number", _is_number)
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_LIST = _Kind("a list of objects", lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value))
_WEIGHTS = _Kind(
    "an object of numbers", lambda value: isinstance(value, dict) and all(_is_number(x) for x in value.values())
)
_MAYBE = _Kind("a number or null", lambda value: value is None or _is_number(value))

_RUN = {"config": _OBJECT, "versions": _OBJECT, "machine": _OBJECT, "seconds": _MAYBE, "plan": _OBJECT}
_PLANNED = {"name": _TEXT, "steps": _COUNT}
_ARM = {"description": _TEXT, "stages": _LIST}
_STAGE = {"name": _TEXT, "losses": _WEIGHTS, "trained_params": _COUNT, "total_params": _COUNT, "steps": _COUNT}
_STAGE |= {"epochs": _NUMBER}
_STAGE_MAY = {"trained": _LIST, "seconds": _NUMBER, "examples_per_second": _NUMBER, "data_wait": _NUMBER}
_STAGE_MAY |= {"peak_memory_bytes": _MAYBE, "kept": _OBJECT}
_KEPT = {"step": _COUNT, "metric": _TEXT, "value": _NUMBER}
_PATTERN = {"pattern": _TEXT, "leaves": _COUNT, "params": _COUNT}
_STEP = {"stage": _TEXT, "stage_index": _COUNT, "step": _COUNT}


def _check(
    file: Path, record: Mapping[str, Any], must: Mapping[str, _Kind], may: Mapping[str, _Kind], where: str = ""
) -> None:
    for field, kind in {**must, **may}.items():
        if field not in record:
            if field in must:
                raise Damaged(file, f"no field {where + field!r}")
        elif not kind.holds(record[field]):
            raise Damaged(file, f"field {where + field!r} is not {kind.words}, but {record[field]!a:.60}")


def arms_of(file: Path, run: Mapping[str, Any]) -> list[str]:
    """Returns the arms that a run.json names.

    Args:
      file: its path, for messages.
      run: its content.

    Raises:
      Damaged: a field is of another type; an arm's name is none that a folder can have.
      ValueError: it names no arm.
    """
    _check(file, run, {}, _RUN)
    arms = run.get("config", {}).get("arms", ())
    if not arms:
        raise ValueError(f"{file}: config names no arms")
    names = [arm.get("name") if isinstance(arm, dict) else arm for arm in arms] if isinstance(arms, list) else [None]
    for name in names:
        if not isinstance(name, str) or not name or name_problem(name) or outside(name) or names.count(name) > 1:
            raise Damaged(file, f"field 'config.arms' is not a list of names of folders, but {arms!a:.60}")
    return names


def plan_of(file: Path, run: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    """Returns an arm's stages as a run.json planned them, [{"name", "steps"}]; [] in the files of earlier versions.

    Args:
      file: its path, for messages.
      run: its content, checked by `arms_of`.
      arm: which.

    Raises:
      Damaged: a field is of another type.
    """
    plan = run.get("plan", {}).get(arm, [])
    if not _LIST.holds(plan):
        raise Damaged(file, f"field 'plan.{arm}' is not {_LIST.words}, but {plan!a:.60}")
    for number, stage in enumerate(plan):
        _check(file, stage, _PLANNED, {}, f"plan.{arm}[{number}].")
    return plan


def check_arm(file: Path, run: Mapping[str, Any]) -> None:
    """Raises Damaged for a field of an arm's run.json that is not of its type."""
    _check(file, run, {}, _ARM)
    for number, stage in enumerate(run.get("stages", ())):
        where = f"stages[{number}]."
        _check(file, stage, _STAGE, _STAGE_MAY, where)
        if stage.get("kept"):
            _check(file, stage["kept"], _KEPT, {}, f"{where}kept.")
        for place, pattern in enumerate(stage.get("trained", ())):
            _check(file, pattern, _PATTERN, {}, f"{where}trained[{place}].")


def check_steps(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a record of metrics.jsonl whose fields are not of their types."""
    for number, record in enumerate(records, start=1):
        may = {key: _MAYBE for key in record if key == "loss" or key.startswith(("loss/", "queue/", *SCORED))}
        try:
            _check(file, record, _STEP, may)
        except Damaged as error:
            reason = error.what.removeprefix(f"{file} is damaged ")
            raise ValueError(f"{file}:{number}: not a record of a step {reason}: delete this line") from error


def check_scores(file: Path, scores: Mapping[str, Any], where: str = "") -> None:
    """Raises Damaged for a score that no chart can show."""
    for key, value in scores.items():
        if isinstance(value, dict):
            check_scores(file, value, f"{where}{key}/")
        elif isinstance(value, int | float) and abs(value) > _LARGEST and abs(value) != float("inf"):
            raise Damaged(file, f"field {where + key!r} is a number above {_LARGEST:g}")


def check_items(file: Path, items: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Damaged for an items_test.json whose likelihoods are not [nats, tokens] of as many items."""
    for method, found in items.items():
        rows = {key: value for key, value in found.items() if key.startswith("nll")}
        for key, value in rows.items():
            fine = isinstance(value, list) and all(
                isinstance(row, list) and len(row) == 2 and all(map(_is_number, row)) for row in value
            )
            if not fine or not value or len(value) != len(next(iter(rows.values()))):
                raise Damaged(file, f"field '{method}.{key}' is not [nats, tokens] of each item")

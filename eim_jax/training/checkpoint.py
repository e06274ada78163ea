"""What a run saves, when, and how it starts again.

Order of precedence at a stage's start: (1) the stage's `result/` (the stage is done: its trained parameters are put
into place), (2) its newest whole `steps/` checkpoint, (3) the parameters as the previous stage left them.
A stage that keeps its best step has that step's trained parameters in `best/STEP/`; which one counts says the record of
the step checkpoint, so that a run that goes on chooses as one that was never stopped.
Only trained leaves, their optimizer state, the data iterator and a small JSON record are saved; frozen leaves come
from the pretrained towers and the results of the stages before. Both kinds appear by an atomic rename: a kill in the
middle of a save leaves the older state. Each holds the sha256 of its files, which are compared before it is read.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from eim_jax.parallel import processes
from eim_jax.training.partition import Flat
from eim_jax.utils.files import Damaged, check_seal, flush, full_disk, room_in, seal

_TIMES = ("_CHECKPOINT_METADATA",)  # Orbax's note of when a save began and ended: written last, and not read here


class StageCheckpoints:
    """The checkpoints of one stage under `directory`; use as a context manager."""

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        self._saving = 0
        self._steps: ocp.CheckpointManager | None = None

    def __enter__(self) -> "StageCheckpoints":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for a save in flight."""
        if self._steps is not None:
            with room_in(self._directory):
                self._steps.close()

    def wait(self) -> None:
        """Returns when a save in flight is whole."""
        if self._steps is not None:
            with room_in(self._directory):
                self._steps.wait_until_finished()

    @property
    def finished(self) -> bool:
        """Whether the stage's result is there."""
        return (self._directory / "result").exists()

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None without one."""
        return self._manager().latest_step() if (self._directory / "steps").exists() else None

    def save(self, step: int, trained: Flat, opt_state: Any, iterator: Any, record: dict) -> None:
        """Saves after `step` steps, in the background; `record` is JSON."""
        state = {"trained": _dotted(trained), "optimizer": _numbered(opt_state)}
        self.wait()  # before `_saving` becomes another one
        self._saving = step
        with room_in(self._directory):
            self._manager().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    record=ocp.args.JsonSave({**record, "data": iterator.get_state()}),
                ),
            )

    def restore(self, trained: Flat, opt_state: Any, iterator: Any) -> tuple[int, Flat, Any, dict]:
        """(step, trained, opt_state, record) of the newest checkpoint, in the shapes and shardings of the arguments.

        The iterator continues where it stood, on any number of processes: its state counts global batches, so one
        process's serves all.

        Raises:
          Damaged: the files are not what was saved, or hold another tree.
        """
        manager = self._manager()
        step = manager.latest_step()
        assert step is not None, "restore() is called where latest_step() gives one"
        like = {"trained": _dotted(trained), "optimizer": _numbered(opt_state)}
        with _whole(self._directory / "steps" / str(step), delete=self._directory / "steps"):
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_abstract(like)),
                    record=ocp.args.JsonRestore(),
                ),
            )
            iterator.set_state(restored["record"].pop("data"))
            state, record = restored["state"], restored["record"]
            leaves = [state["optimizer"][name] for name in like["optimizer"]]
            opt_state = jax.tree.unflatten(jax.tree.structure(opt_state), leaves)
            return step, {path: state["trained"][_dot(path)] for path in trained}, opt_state, record

    def finish(self, trained: Flat, summary: dict) -> None:
        """Saves the stage's result and drops its step checkpoints."""
        self.wait()
        self._write(self._directory / "result", trained, summary)
        self.drop_steps()

    def keep_best(self, step: int, trained: Flat) -> None:
        """Saves the trained leaves of the best step so far; those of the one before stay until `drop_best`."""
        self.wait()
        self._write(self._directory / "best" / str(step), trained, {})

    def best(self, step: int, trained: Flat) -> Flat:
        """The trained leaves that `keep_best` saved at `step`, in the shapes and shardings of the argument."""
        return self._read(self._directory / "best" / str(step), trained, delete=self._directory)[0]

    def drop_best(self, but: int | None) -> None:
        """Removes the best steps before `but`, when the newest checkpoint says that it is the one."""
        self.wait()
        if processes.is_first():
            for folder in (self._directory / "best").glob("*"):
                if folder.name != str(but):
                    shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, trained: Flat, summary: dict) -> None:
        options = ocp.AsyncOptions(post_finalization_callback=lambda: _seal(folder))
        with (
            room_in(self._directory),
            ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler("trained", summary=ocp.JsonCheckpointHandler()), async_options=options
            ) as checkpointer,
        ):
            checkpointer.save(
                folder,
                ocp.args.Composite(trained=ocp.args.StandardSave(_dotted(trained)), summary=ocp.args.JsonSave(summary)),
                force=True,  # a step that is done again after a kill replaces its own
            )
            checkpointer.wait_until_finished()
        if processes.is_first():
            flush(folder.parent)

    def drop_steps(self) -> None:
        """Removes what a finished stage no longer needs."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        if jax.process_index() == 0:
            for name in ("steps", "best"):
                shutil.rmtree(self._directory / name, ignore_errors=True)

    def result(self, trained: Flat) -> tuple[Flat, dict]:
        """(trained, summary) of the finished stage, in the shapes and shardings of the argument."""
        folder = self._directory / "result"
        return self._read(folder, trained, delete=folder)

    def _read(self, folder: Path, trained: Flat, *, delete: Path) -> tuple[Flat, dict]:
        with (
            _whole(folder, delete=delete),
            ocp.Checkpointer(
                ocp.CompositeCheckpointHandler("trained", summary=ocp.JsonCheckpointHandler())
            ) as checkpointer,
        ):
            restored = checkpointer.restore(
                folder,
                ocp.args.Composite(
                    trained=ocp.args.StandardRestore(_abstract(_dotted(trained))), summary=ocp.args.JsonRestore()
                ),
            )
            return {path: restored["trained"][_dot(path)] for path in trained}, dict(restored["summary"])

    def _manager(self) -> ocp.CheckpointManager:
        logging.getLogger("absl").addFilter(_is_news)
        if self._steps is None:
            folder = self._directory / "steps"
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1,
                create=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _seal(folder / str(self._saving))),
            )
            try:
                self._steps = ocp.CheckpointManager(folder, options=options, item_names=("state", "record"))
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # its notes of the steps that are there
                raise Damaged(folder, f"{type(error).__name__}: {str(error)[:300]}", folder) from error
        return self._steps


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record says what no error will: Orbax logs a full disk's traceback in each thread that meets it."""
    return full_disk(record.exc_info[1] if record.exc_info else RuntimeError(record.getMessage())) is None


def _seal(final: Path) -> None:
    """Called when all processes have written a checkpoint and before it gets its final name."""
    if processes.is_first():
        scratch = sorted(final.parent.glob(f"{final.name}.*"), key=lambda place: place.stat().st_mtime)
        seal(scratch[-1] if scratch else final, _TIMES)  # a bucket has no rename: there it is final already


@contextmanager
def _whole(folder: Path, *, delete: Path) -> Iterator[None]:
    """Checks a checkpoint's files before the body reads them, and says of what fails in the body what to delete."""
    if processes.is_first():
        check_seal(folder, delete)
    try:
        yield
    except (Damaged, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # the storage layers below raise many types on damaged files
        raise Damaged(folder, f"{type(error).__name__}: {str(error)[:300]}", delete) from error


def _dot(path: str) -> str:
    """Slashes would be read as folders by the storage layer."""
    return path.replace("/", ".")


def _dotted(flat: Flat) -> Flat:
    return {_dot(path): leaf for path, leaf in flat.items()}


def _numbered(tree: Any) -> dict[str, jax.Array]:
    """An optimizer state's leaves by order and place: optax's containers stay out of the file format."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        f"{i:05d}{re.sub('[^A-Za-z0-9_]+', '.', jax.tree_util.keystr(where))}": leaf
        for i, (where, leaf) in enumerate(leaves)
    }


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

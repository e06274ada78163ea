"""A full disk and exhausted memory are one message that says what to do, and the next attempt succeeds."""

import errno
import resource
from contextlib import contextmanager

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eim_jax.commands import errors
from eim_jax.losses.queues import Queue, manifest
from eim_jax.parallel import signals
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.utils.files import DiskFull, new_folder, new_rows, room_in, write_text

FACTS = {name: "x" for name in ("weights", "data", "tokenizer", "pooling")}


@contextmanager
def full(size=20_000):
    """No file may become longer than this: what a full disk answers, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def text(folder):
    write_text(folder / "a.json", "x" * 100_000)


def rows(folder):
    new_rows(folder / "a.npy", np.dtype(np.float32), (100, 1000))[:] = 1


def queue(folder):
    made = Queue(jnp.ones((1000, 64)), jnp.arange(1000), 1000)
    made.save(folder / "q", manifest("k", **FACTS, similarity="dot", dtype="float32", count=1000))


def export(folder):
    with new_folder(folder / "out") as scratch:
        (scratch / "a").write_bytes(b"x" * 100_000)


def trained():
    return {"st/kernel": jax.random.normal(jax.random.key(0), (400, 400))}


def checkpoint(folder):
    batches = iter(grain.MapDataset.range(20).to_iter_dataset())
    with StageCheckpoints(folder) as store:
        store.save(3, trained(), optax.sgd(1e-3).init(trained()), batches, {"seconds": 1.0})


def result(folder):
    with StageCheckpoints(folder) as store:
        store.finish(trained(), {})


@pytest.mark.parametrize("write", [text, rows, queue, export, checkpoint, result])
def test_a_full_disk_names_the_folder_and_the_next_attempt_succeeds(tmp_path, write, caplog):
    with full(), pytest.raises(DiskFull, match=rf"{tmp_path}.* cannot be written: .*Make room there; then the same"):
        write(tmp_path)
    left = [file.name for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size > 20_000]
    assert not left
    assert not [record for record in caplog.records if record.name == "absl" and record.levelname == "ERROR"]
    write(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: writing /x/y: No space left on device [source locations='...']"),
        ExceptionGroup("several", [OSError(errno.ENOSPC, "No space left on device")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whoever_finds_the_disk_full_the_message_is_one_line_with_the_folder(tmp_path, error):
    with pytest.raises(DiskFull, match=rf"^{tmp_path} cannot be written: .*(space|quota)"), room_in(tmp_path):
        raise error
    with pytest.raises(DiskFull), room_in(tmp_path):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a library's own") from cause
    message = errors.in_words(error, str(tmp_path))
    assert (
        message is not None
        and message.startswith(f"error: {tmp_path} cannot be written")
        and "Make room there" in message
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."),
    ],
    ids=["host", "device"],
)
def test_exhausted_memory_names_what_the_run_did_and_the_fields_that_help(error, tmp_path):
    signals.doing("compiling")
    message = errors.in_words(error, str(tmp_path))
    signals.doing("starting")
    assert message is not None and "out of memory while compiling" in message
    for field in ("stages.NAME.accumulate", "stages.NAME.batch", "towers.remat", "decode.batch"):
        assert f"--config.{field}" in message or f"config.{field}" in message


def test_an_error_of_the_program_itself_keeps_its_traceback():
    assert errors.in_words(RuntimeError("a defect"), None) is None
    assert errors.in_words(ValueError("config.x: wrong"), None) == (
        "error: config.x: wrong\n(ValueError; --traceback shows where)"
    )

"""Queues in parts: a build that is stopped encodes, the next time, what no part holds; the queue is the same one."""

import functools
import math
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.losses import queue_parts, queues
from eim_jax.losses.queues import Queue, QueueParts
from eim_jax.parallel.sharding import make_mesh

N, D = 61, 6
FIELDS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
PARAMS = np.random.default_rng(1).normal(size=(D, D)).astype(np.float32)


class Stopped(Exception):
    pass


class Rows:
    """The samples, as what is asked for counts: stops the build when it asks for batch number `stop`."""

    shape, dtype = FIELDS.shape, FIELDS.dtype

    def __init__(self, devices, stop=None):
        self.asked, self._devices, self._stop = [], devices, stop

    def __getitem__(self, rows):
        if self._stop is not None and len(self.asked) == self._stop * self._devices:
            raise Stopped
        self.asked.append(np.ravel(rows))
        return FIELDS[rows]


def described(dtype="float32", **changes):
    facts = dict(weights="w", data="d", tokenizer="t", pooling="p", similarity="cosine", count=N)
    return queues.manifest("k", dtype=dtype, **{**facts, **changes})


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(queue_parts, "_SECONDS", 0)


def build(folder, rows, *, mesh=None, said=None, batch=8, dtype="float32", facts=None):
    parts = QueueParts(folder / "k.parts", facts or described(dtype), print if said is None else said.append)
    encode = lambda params, fields: jnp.tanh(fields @ params)  # noqa: E731
    return Queue.build(encode, PARAMS, rows, batch=batch, mesh=mesh, dtype=dtype, parts=parts), parts


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_build_goes_on_behind_its_last_part_and_gives_the_same_queue(tmp_path, often, dtype, devices, stop):
    mesh = None if devices == 1 else make_mesh((1, devices, 1), jax.devices()[:devices])
    make = functools.partial(build, mesh=mesh, dtype=dtype, batch=4 * devices)
    whole, _ = make(tmp_path / "whole", Rows(devices))
    with pytest.raises(Stopped):
        make(tmp_path, Rows(devices, stop))
    again = Rows(devices)
    queue, parts = make(tmp_path, again)
    same(queue, whole)
    steps = math.ceil(math.ceil(N / devices) / 4)
    assert len(again.asked) == (steps - stop) * devices  # batches of the encoder, of each device
    first = min(min(rows) for rows in again.asked)
    assert first == 4 * stop
    queue.save(tmp_path / "k", described(dtype))
    parts.remove()
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["k"]


def test_a_build_stopped_twice_keeps_the_parts_of_both(tmp_path, often):
    whole, _ = build(tmp_path / "whole", Rows(1))
    for stop in (2, 3):
        with pytest.raises(Stopped):
            build(tmp_path, Rows(1, stop))
    rows, said = Rows(1), []
    queue, _ = build(tmp_path, rows, said=said)
    same(queue, whole)
    assert len(rows.asked) == 8 - 5 and said == [f"queue k: continuing after 40 of {N} keys"]


def test_the_last_step_is_no_part_because_it_encodes_rows_of_the_one_before_again(tmp_path, often):
    whole, _ = build(tmp_path, Rows(1))  # all steps are done, and it is killed before the queue is saved
    rows = Rows(1)
    queue, _ = build(tmp_path, rows)
    same(queue, whole)
    assert len(rows.asked) == 1


@pytest.mark.parametrize(
    ("changes", "word"), [({"facts": described(weights="w2")}, "weights"), ({"batch": 16}, "rows")], ids=str
)
def test_parts_of_something_else_are_not_continued_and_the_difference_is_named(tmp_path, often, changes, word):
    with pytest.raises(Stopped):
        build(tmp_path, Rows(1, 2))
    rows, said = Rows(1), []
    build(tmp_path, rows, said=said, **changes)
    assert min(rows.asked[0]) == 0 and f"begun with another {word}: building the queue anew" in said[0]


@pytest.mark.parametrize("change", ["flip", "cut", "no note", "half a note", "missing"])
def test_damaged_parts_are_not_continued(tmp_path, often, change):
    whole, _ = build(tmp_path / "whole", Rows(1))
    with pytest.raises(Stopped):
        build(tmp_path, Rows(1, 3))
    folder = tmp_path / "k.parts" / "process-0"
    file, note = folder / "keys-000001.npy", folder / "manifest.json"
    content = file.read_bytes()
    if change == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "cut":
        file.write_bytes(content[:-1])
    elif change == "missing":
        file.unlink()
    elif change == "no note":
        note.unlink()
    else:
        note.write_text(note.read_text()[:50])
    rows, said = Rows(1), []
    queue, _ = build(tmp_path, rows, said=said)
    same(queue, whole)
    assert min(rows.asked[0]) == 0
    assert (not said) == (change == "no note") and all("damaged" in line for line in said)


def test_between_parts_some_seconds_pass(tmp_path):
    build(tmp_path, Rows(1))
    assert not list(tmp_path.iterdir())  # this one took less


TWO = """
import os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
sys.path.insert(0, os.path.dirname(sys.argv[5]))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
number, port, folder, stop = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
import test_queue_parts as own
from eim_jax.losses import queue_parts
from eim_jax.parallel.sharding import make_mesh
queue_parts._STEPS = 1
if stop and number == 1:
    queue_parts._STEPS = 2  # killed before it wrote what the other one did
rows = own.Rows(2, stop or None)
try:
    queue, parts = own.build(pathlib.Path(folder), rows, mesh=make_mesh((1, 4, 1), jax.devices()), batch=16)
except own.Stopped:
    # Both are gone at once: one that ends before the other has done its third step takes it along.
    multihost_utils.sync_global_devices("stopped")
    pathlib.Path(f"{folder}-stopped-{number}").touch()
    while not pathlib.Path(f"{folder}-stopped-{1 - number}").exists():
        pass
    os._exit(3)
print("asked", len(rows.asked) // 2, flush=True)
queue.save(pathlib.Path(folder) / "k", own.described())
parts.remove()
"""


@pytest.mark.slow
def test_two_processes_go_on_behind_the_last_part_that_both_wrote(tmp_path, monkeypatch):
    def two(stop, codes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", TWO]
        values = [str(port), str(tmp_path), str(stop), __file__]
        started = [
            subprocess.Popen([*command, str(i), *values], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]
        said = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == codes, said
        return said

    two(3, [3, 3])  # in the fourth of four steps
    kept = sorted(path.name for path in (tmp_path / "k.parts").glob("*/keys-*"))
    assert kept == [f"keys-{part:06d}.npy" for part in (0, 0, 1, 2)]
    said = two(0, [0, 0])
    for out, _ in said:
        assert "asked 2" in out and f"continuing after 32 of {N} keys" in out  # not 48
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    mesh = make_mesh((1, 4, 1), jax.devices()[:4])
    whole, _ = build(tmp_path / "whole", Rows(4), mesh=mesh, batch=16)
    same(Queue.load(tmp_path / "k", described(), mesh), whole)

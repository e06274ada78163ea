"""What runs keep for themselves: checkpoints, results, queues, cached features.

Each file is what was written, or an error: a result that differs in one bit is wrong, whatever changed.
"""

import contextlib
import functools
import pathlib
import tempfile

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eim_jax.data.feature_cache import cached_features
from eim_jax.data.samples import DrawnImages, Split
from eim_jax.losses.queues import Queue, manifest
from eim_jax.training.checkpoint import StageCheckpoints

from .engine import Format, taken

TRAINED = {"lm/ln_f/scale": np.arange(96.0, dtype=np.float32), "st/dense/kernel": np.ones((6, 8), np.float32)}
ROWS = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
FACTS = dict.fromkeys(("weights", "data", "tokenizer", "pooling"), "x")
COUNT, SIZE = 11, 6


def _written(write) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder))
        return taken(pathlib.Path(folder))


def _same(found, wanted) -> None:
    """Every leaf, bit by bit."""
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(ours) == len(theirs), "another number of leaves"
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype}{a.shape} for {b.dtype}{b.shape}"
        assert a.tobytes() == b.tobytes(), "other bits"


def _batches():
    return iter(grain.MapDataset.range(20).to_iter_dataset())


def _trained(fill=None):
    return {k: jnp.asarray(v if fill is None else np.full_like(v, fill)) for k, v in TRAINED.items()}


@functools.cache
def _steps():
    def write(folder):
        with StageCheckpoints(folder) as store:
            store.save(3, _trained(), optax.sgd(1e-3, 0.9).init(_trained()), _batches(), {"seconds": 1.0})

    return _written(write)


def _restore(folder: pathlib.Path):
    with StageCheckpoints(folder) as store:
        if store.latest_step() is None:
            return None
        rows = _batches()
        step, trained, state, record = store.restore(_trained(0), optax.sgd(1e-3, 0.9).init(_trained(0)), rows)
        return step, trained, state, record, next(rows)


def _check_steps(folder: pathlib.Path, found):
    if found is None:  # no whole checkpoint: the stage starts again, which Orbax decides by the folder's names
        return
    step, trained, state, record, row = found
    assert (step, record, row) == (3, {"seconds": 1.0}, 0), f"another record: {step} {record} {row}"
    _same(trained, _trained())
    _same(state, optax.sgd(1e-3, 0.9).init(_trained()))


@functools.cache
def _result():
    def write(folder):
        with StageCheckpoints(folder) as store:
            store.finish(_trained(), {"steps": 3, "seconds": 1.5})

    return _written(write)


def _read_result(folder: pathlib.Path):
    with StageCheckpoints(folder) as store:
        return store.result(_trained(0)) if store.finished else None


def _check_result(folder: pathlib.Path, found):
    if found is not None:
        assert found[1] == {"steps": 3, "seconds": 1.5}, f"another summary: {found[1]}"
        _same(found[0], _trained())


def _facts(dtype):
    return manifest("k", **FACTS, similarity="dot", dtype=dtype, count=len(ROWS))


@functools.cache
def _queue(dtype):
    made = Queue.of(ROWS, dtype=dtype, similarity="dot")
    return _written(lambda folder: made.save(folder / "q", _facts(dtype)))


def _load_queue(dtype, folder: pathlib.Path):
    return Queue.load(folder / "q", _facts(dtype))


def _check_queue(dtype, folder: pathlib.Path, found):
    wanted = Queue.of(ROWS, dtype=dtype, similarity="dot")
    assert found.count == len(ROWS), "another count"
    _same(found, wanted)


def _split():
    def draw(row):
        from PIL import Image

        return Image.fromarray(np.random.default_rng(row).integers(0, 256, (9, 12, 3), np.uint8))

    names = [f"i{row}" for row in range(COUNT)]
    return Split("train", (), DrawnImages(names, draw, names))


@jax.jit
def _see(images):
    return images.astype(jnp.float32).mean(1).reshape(len(images), 1, SIZE * 3)


def _features_of(folder: pathlib.Path, see=_see):
    options = {"image_size": SIZE, "batch_size": 4, "threads": 1}
    return cached_features(folder / "cache", _split(), see, {"weights": "w"}, **options)


@functools.cache
def _features():
    return _written(_features_of)


@functools.cache
def _interrupted():
    """The files of a cache whose computation stopped after its first batch."""

    def write(folder):
        calls = []

        def stops(images):
            calls.append(None)
            if len(calls) > 3 and not isinstance(images, jax.core.Tracer):  # one call is the shapes'
                raise KeyboardInterrupt
            return _see(images)

        with contextlib.suppress(KeyboardInterrupt):
            _features_of(folder, stops)

    return _written(write)


@functools.cache
def _right_features():
    with tempfile.TemporaryDirectory() as folder:
        return np.array(_features_of(pathlib.Path(folder)))


def _check_features(folder: pathlib.Path, found):
    _same(np.asarray(found), _right_features())


FORMATS = (
    Format("checkpoint", _steps, _restore, _check_steps, most=1, quick=40),
    Format("result", _result, _read_result, _check_result, most=1, quick=40),
    *(
        Format(
            f"queue-{dtype}",
            functools.partial(_queue, dtype),
            functools.partial(_load_queue, dtype),
            functools.partial(_check_queue, dtype),
            most=1,
            quick=30,
        )
        for dtype in ("int8", "bfloat16")
    ),
    Format("features", _features, _features_of, _check_features, most=1, quick=30),
    Format("features-partial", _interrupted, _features_of, _check_features, most=1, quick=30),
)

"""Queues on disk and on devices: content, order, refusal."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close
from jax.sharding import PartitionSpec

from eim_jax.config import Losses
from eim_jax.losses import queue_steps, queues
from eim_jax.losses.neighbours import similarities
from eim_jax.losses.queues import BadRow, Queue, StaleQueue
from eim_jax.losses.table import LOSSES
from eim_jax.models.batch import Batch
from eim_jax.parallel.sharding import make_mesh

N, T, V, D = 37, 5, 11, 6
MESHES = {"none": None, "8": (8, 1, 1), "2x2x2": (2, 2, 2), "1x3": (1, 3, 1)}


def mesh_of(shape):
    return None if shape is None else make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def samples(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, V, (N, T)).astype(np.int32)
    valid = np.arange(T) < rng.integers(1, T + 1, (N, 1))
    table = rng.normal(size=(V, D)).astype(np.float32)
    return tokens, valid, np.arange(N, dtype=np.int32) // 5, table


def mean_embedding(table, texts):
    tokens, valid = texts
    return jnp.sum(table[tokens] * valid[..., None], axis=1) / jnp.sum(valid, axis=1, keepdims=True)


def expected_keys(tokens, valid, table, cosine=True):
    mean = (table.astype(np.float64)[tokens] * valid[..., None]).sum(1) / valid.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True) if cosine else mean


def described(**changes):
    facts = dict(weights="w1", data="d1", tokenizer="t1", pooling="mean", similarity="cosine", dtype="float32", count=N)
    return queues.manifest("embed", **{**facts, **changes})


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("batch", [1, 8, 16, 64])
def test_row_i_is_the_key_of_sample_i_on_any_mesh_and_batch(shape, batch):
    tokens, valid, groups, table = samples()
    mesh = mesh_of(shape)
    queue = Queue.build(mean_embedding, table, (tokens, valid), groups, batch=batch, mesh=mesh)
    assert queue.count == N
    assert_close(np.asarray(queue.keys)[:N], expected_keys(tokens, valid, table), 1e-6)
    np.testing.assert_array_equal(np.asarray(queue.groups)[:N], groups)
    assert not np.asarray(queue.keys)[N:].any()
    assert (np.asarray(queue.groups)[N:] == -1).all()
    if mesh is not None:
        assert queue.keys.sharding.spec == PartitionSpec(("data", "fsdp"))
        assert len(queue.keys) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


def test_dot_queue_keeps_the_rows_lengths():
    tokens, valid, groups, table = samples()
    queue = Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8, similarity="dot")
    assert_close(np.asarray(queue.keys), expected_keys(tokens, valid, table, cosine=False), 1e-6)


def test_encode_is_traced_twice_for_shape_and_program_however_many_batches():
    tokens, valid, groups, table = samples()
    traces = []

    def encode(table, texts):
        traces.append(texts[0].shape)
        return mean_embedding(table, texts)

    Queue.build(encode, table, (tokens, valid), groups, batch=4)
    assert traces == [(4, T)] * 2


@pytest.mark.parametrize("by_length", [False, True])
def test_building_moves_no_key_between_devices(by_length):
    """Each device encodes its own rows: with replicated weights the compiled step has no gather."""
    tokens, valid, groups, table = samples()
    mesh = mesh_of((1, 8, 1))
    programs = []
    jit = jax.jit

    def recording_jit(f, **options):
        compiled = jit(f, **options)

        def call(*args):
            programs.append(compiled.lower(*args).compile().as_text())
            return compiled(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", recording_jit)
        patch.setattr(queue_steps, "_LEAST", 0)
        lengths = valid.sum(1) if by_length else None
        Queue.build(mean_embedding, table, (tokens, valid), groups, batch=16, mesh=mesh, lengths=lengths)
    assert programs
    for text in programs:
        assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf], ids=["zero", "nan", "inf"])
@pytest.mark.parametrize("row", [0, 20, N - 1])
def test_a_bad_row_is_named_by_its_sample_id(value, row):
    tokens, valid, groups, table = samples()
    table[V - 1] = value
    tokens[tokens == V - 1] = 1
    tokens[row] = V - 1
    ids = [f"coco-{i}" for i in range(N)]
    with pytest.raises(BadRow, match=rf"coco-{row}' \(row {row}\)"):
        Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8, ids=ids)


def test_a_zero_row_is_a_key_like_any_other_under_dot():
    tokens, valid, groups, table = samples()
    tokens[3], table[0] = 0, 0
    queue = Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8, similarity="dot")
    assert not np.asarray(queue.keys)[3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("read_on", MESHES.values(), ids=MESHES.keys())
def test_a_saved_queue_loads_bit_identical_on_another_mesh(tmp_path, dtype, read_on):
    tokens, valid, groups, table = samples()
    built = Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8, mesh=mesh_of((2, 2, 2)), dtype=dtype)
    built.save(tmp_path / "q", described(dtype=dtype))
    mesh = mesh_of(read_on)
    read = Queue.load(tmp_path / "q", described(dtype=dtype), mesh)
    assert read.count == N and read.keys.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(read.keys)[:N], np.asarray(built.keys)[:N])
    np.testing.assert_array_equal(np.asarray(read.groups)[:N], groups)
    assert not np.asarray(read.keys)[N:].any() and (np.asarray(read.groups)[N:] == -1).all()
    if mesh is not None:
        assert read.keys.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert sorted(os.listdir(tmp_path)) == ["q"]
    assert np.load(tmp_path / "q" / "keys.npy").shape == (N, D)


def test_bfloat16_rows_are_stored_as_their_bits(tmp_path):
    keys = jnp.asarray([[1.0, -0.5], [3.25, 1e-3]], jnp.bfloat16)
    Queue(keys, jnp.arange(2), 2).save(tmp_path / "q", {"kind": "embed"})
    stored = np.load(tmp_path / "q" / "keys.npy")
    assert stored.dtype == np.uint16 and stored[0, 0] == 0x3F80 and stored[0, 1] == 0xBF00
    assert json.loads((tmp_path / "q" / "manifest.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("read_on", MESHES.values(), ids=MESHES.keys())
def test_a_queue_in_one_file_a_device_reads_as_one(tmp_path, read_on):
    """As several processes write it: each device's rows in a file named by the first one."""
    keys = np.random.default_rng(0).normal(size=(N, D)).astype(jnp.bfloat16)
    (tmp_path / "q").mkdir()
    facts = described(dtype="bfloat16")
    (tmp_path / "q" / "manifest.json").write_text(json.dumps({**facts, "width": D}))
    for start in range(0, N, 10):
        np.save(tmp_path / "q" / f"keys-{start:012d}.npy", keys[start : start + 10].view(np.uint16))
        np.save(tmp_path / "q" / f"groups-{start:012d}.npy", np.arange(N, dtype=np.int32)[start : start + 10])
    read = Queue.load(tmp_path / "q", facts, mesh_of(read_on))
    np.testing.assert_array_equal(np.asarray(read.keys)[:N], keys)
    np.testing.assert_array_equal(np.asarray(read.groups)[:N], np.arange(N))
    (tmp_path / "q" / "keys-000000000010.npy").unlink()
    with pytest.raises(StaleQueue, match="damaged"):
        Queue.load(tmp_path / "q", facts)


def test_a_stale_queue_is_refused_and_every_difference_named(tmp_path):
    tokens, valid, groups, table = samples()
    Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8).save(tmp_path / "q", described())
    with pytest.raises(StaleQueue) as refusal:
        Queue.load(tmp_path / "q", described(weights="w2", count=N + 1))
    text = str(refusal.value)
    assert "weights: expected 'w2', found 'w1'" in text
    assert f"count: expected {N + 1}, found {N}" in text
    assert "tokenizer" not in text and "Delete it" in text


@pytest.mark.parametrize("field", sorted(described()))
def test_each_manifest_field_alone_makes_a_queue_stale(tmp_path, field):
    Queue(jnp.eye(N, D), jnp.arange(N), N).save(tmp_path / "q", described())
    with pytest.raises(StaleQueue, match=field):
        Queue.load(tmp_path / "q", {**described(), field: "other"})
    with pytest.raises(StaleQueue, match=rf"{field}: expected '\(absent\)'"):
        Queue.load(tmp_path / "q", {k: v for k, v in described().items() if k != field})


def test_a_cut_off_file_is_called_damaged(tmp_path):
    Queue(jnp.eye(N, D), jnp.arange(N), N).save(tmp_path / "q", described())
    np.save(tmp_path / "q" / "keys.npy", np.zeros((N - 1, D), np.float32))
    with pytest.raises(StaleQueue, match="damaged"):
        Queue.load(tmp_path / "q", described())


def test_a_save_that_dies_leaves_the_old_queue_readable(tmp_path, monkeypatch):
    old = Queue(jnp.eye(N, D), jnp.arange(N), N)
    old.save(tmp_path / "q", described())

    def die(*args):
        raise OSError("no space left")

    monkeypatch.setattr(np.lib.format, "open_memmap", die)
    with pytest.raises(OSError, match="no space"):
        Queue(2 * old.keys, old.groups, N).save(tmp_path / "q", described())
    monkeypatch.undo()
    np.testing.assert_array_equal(Queue.load(tmp_path / "q", described()).keys, old.keys)
    Queue(2 * old.keys, old.groups, N).save(tmp_path / "q", described())
    np.testing.assert_array_equal(Queue.load(tmp_path / "q", described()).keys, 2 * old.keys)


def test_save_refuses_a_manifest_that_contradicts_the_queue(tmp_path):
    with pytest.raises(ValueError, match="count"):
        Queue(jnp.eye(N, D), jnp.arange(N), N).save(tmp_path / "q", described(count=N - 1))


def test_progress_bar_reaches_the_number_of_samples(capsys):
    tokens, valid, groups, table = samples()
    Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8, name="embed", progress=True)
    assert f"queue embed: {N} keys in" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [None, (1, 3, 1)])
def test_an_int8_queue_rounds_to_half_a_step_of_its_row_and_comes_back_the_same(tmp_path, shape):
    tokens, valid, groups, table = samples()
    queue = Queue.build(mean_embedding, table, (tokens, valid), groups, batch=8, mesh=mesh_of(shape), dtype="int8")
    keys, scale = np.asarray(queue.keys)[:N], np.asarray(queue.scale)[:N, None]
    assert keys.dtype == np.int8 and (np.abs(keys).max(1) == 127).all()
    assert (np.abs(keys * scale - expected_keys(tokens, valid, table)) <= 0.5001 * scale).all()
    queue.save(tmp_path / "q", described(dtype="int8"))
    for mesh in (None, mesh_of((2, 2, 2))):
        found = Queue.load(tmp_path / "q", described(dtype="int8"), mesh)
        np.testing.assert_array_equal(np.asarray(found.keys)[:N], keys)
        np.testing.assert_array_equal(np.asarray(found.scale)[:N, None], scale)
    with pytest.raises(StaleQueue, match="dtype"):
        Queue.load(tmp_path / "q", described(dtype="bfloat16"))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_a_queue_of_ready_features_holds_them_at_unit_norm(shape, place):
    tokens, valid, groups, table = samples()
    features = expected_keys(tokens, valid, table, cosine=False).astype(np.float32)
    queue = Queue.of(place(features), groups, mesh=mesh_of(shape))
    assert_close(np.asarray(queue.keys)[:N], expected_keys(tokens, valid, table), 1e-6)
    np.testing.assert_array_equal(np.asarray(queue.groups)[:N], groups)
    assert queue.count == N and not np.asarray(queue.keys)[N:].any() and (np.asarray(queue.groups)[N:] == -1).all()
    np.testing.assert_array_equal(np.asarray(Queue.of(place(features), similarity="dot").keys), features)
    np.testing.assert_array_equal(np.asarray(Queue.of(place(features)).groups), np.arange(N))


@pytest.mark.parametrize("value", [0.0, np.nan], ids=["zero", "nan"])
def test_features_without_a_direction_are_named(value):
    features = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    features[7] = value
    with pytest.raises(BadRow, match=r"photo-7' \(row 7\)"):
        Queue.of(features, ids=[f"photo-{i}" for i in range(N)], mesh=mesh_of((8, 1, 1)))
    with pytest.raises(ValueError, match=r"takes \[N D\] floats"):
        Queue.of(features[0])
    with pytest.raises(ValueError, match="groups has 3"):
        Queue.of(features, groups=[0, 1, 2])


class Photos:
    """Images that are read when asked for, as from files."""

    shape, dtype = (N, 2, 3), np.dtype(np.float32)

    def __init__(self):
        self.rows, self.asked = np.random.default_rng(0).normal(size=self.shape).astype(np.float32), []

    def __getitem__(self, rows):
        self.asked.append(np.size(rows))
        return self.rows[rows]


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_an_encoder_reads_any_fields_and_lazy_ones_a_batch_at_a_time(shape):
    photos, bias = Photos(), np.arange(N, dtype=np.float32)

    def encode(scale, fields):
        return scale * fields["image"].reshape(-1, 6) + fields["bias"][:, None]

    queue = Queue.build(encode, 2.0, {"image": photos, "bias": bias}, batch=8, similarity="dot", mesh=mesh_of(shape))
    np.testing.assert_allclose(np.asarray(queue.keys)[:N], 2 * photos.rows.reshape(N, 6) + bias[:, None], rtol=1e-6)
    assert max(photos.asked) <= 8
    with pytest.raises(ValueError, match="36 samples, but field 1 has 37"):
        Queue.build(encode, 2.0, {"image": photos, "bias": bias[1:]})


def test_a_queue_passes_through_jit_and_its_count_is_static():
    keys = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    query, index, traced = jnp.asarray(keys[:3]), jnp.arange(3), []

    @jax.jit
    def loss(queue, query):
        traced.append(queue.count)
        return queue.nce(query, index, tau=0.5).loss

    def expected(count):
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        scores = unit[:3].astype(np.float64) @ unit[:count].T.astype(np.float64) / 0.5
        return (np.log(np.exp(scores).sum(1)) - scores[np.arange(3), np.arange(3)]).sum()

    for count in (N, N - 5, N):
        np.testing.assert_allclose(loss(Queue.of(keys[:count]), query), expected(count), rtol=1e-6)
    assert traced == [N, N - 5]
    whole = Queue.of(keys)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(whole)] == [".keys", ".groups"]


def test_what_cannot_be_meant_is_an_error_where_values_are_at_hand():
    queue, query = Queue.of(np.eye(4, dtype=np.float32)), jnp.ones((2, 4))
    for index in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="outside the queue, whose rows are 0 to 3"):
            queue.nce(query, jnp.asarray(index))
    long = Queue(2 * queue.keys, queue.groups, 4)
    with pytest.raises(ValueError, match=r"row 0 has length 2: .*Queue.of\(features\) normalises"):
        long.nce(query, jnp.asarray([0, 1]))
    with pytest.raises(ValueError, match="row 0 has length 2"):  # constants of a jitted function
        jax.jit(lambda query: long.nce(query, jnp.asarray([0, 1])))(query)
    assert np.isfinite(long.nce(query, jnp.asarray([0, 1]), similarity="dot").loss)
    for dtype in ("bfloat16", "int8"):
        rows = np.random.default_rng(0).normal(size=(50, 8))
        assert np.isfinite(Queue.of(rows, dtype=dtype).nce(jnp.ones((1, 8)), jnp.asarray([49])).loss)


def test_the_queue_and_its_loss_need_no_heavy_package():
    """In a fresh process: what `pip install eim_jax` brings without an extra."""
    code = (
        "import sys, jax.numpy as jnp\n"
        "import eim_jax.losses.queues as q, eim_jax.training.partition, eim_jax.losses.next_token\n"
        "q.Queue.of(jnp.eye(3)).save(sys.argv[1], {})\n"
        "print([name for name in ('flax', 'rich', 'ml_collections', 'transformers', 'orbax') if name in sys.modules])"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, f"{folder}/q"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("center", ["none", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_nearest_keys_are_those_of_float64(dtype, center):
    """int8's codes alone would put rows of another scale in another order."""
    rng = np.random.default_rng(4)
    features = rng.standard_normal((N, D)) ** 3 + 1
    query = rng.standard_normal((4, D)) + 1

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    mean = unit(features).mean(0) if center == "mean" else 0.0
    want = unit(unit(query) - mean) @ unit(unit(features) - mean).T
    loss = dataclasses.replace(LOSSES["st"], query=lambda forward: forward.batch.features[:, 0])
    batch = Batch(index=jnp.arange(4), features=jnp.asarray(query, jnp.float32)[:, None])
    queue = Queue.of(features.astype(np.float32), dtype=jnp.dtype(dtype), center=center)
    found = np.asarray(similarities(tiny.model()[0], Losses(), loss, {}, batch, queue))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 if dtype == "float32" else 1 / 127)
    if dtype == "int8":
        codes = unit(unit(query) - mean) @ np.asarray(queue.keys, np.float64).T
        assert (codes.argmax(1) != want.argmax(1)).any()  # or the scale would decide nothing here
    np.testing.assert_array_equal(found.argmax(1), want.argmax(1))

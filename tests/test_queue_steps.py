"""Texts encoded in order of their length: the same keys at the same rows, from fewer slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_close
from test_queue_parts import Stopped, described, same

from eim_jax.losses import queue_build, queue_parts, queue_placement, queue_steps
from eim_jax.losses.loss_ie import CAPTIONS
from eim_jax.losses.loss_lm import LAST_TOKENS
from eim_jax.losses.loss_st import EMBEDDINGS
from eim_jax.losses.queues import Queue, QueueParts
from eim_jax.parallel.sharding import make_mesh
from eim_jax.training import partition

N, T, END = 61, 9, tiny.VOCAB - 1


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(queue_steps, "_LEAST", 0)
    monkeypatch.setattr(queue_steps, "_ROUND", 2)


def texts():
    """Tokens whose last own one is END, which are valid, and how many; what stands behind them is noise."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(0.4, N) + 1, T)
    lengths[[7, 40]] = T
    tokens = rng.integers(1, END, (N, T)).astype(np.int32)
    tokens[np.arange(N), lengths - 1] = END
    return tokens, np.arange(T) < lengths[:, None], lengths


@pytest.mark.parametrize("lengths", [[5], [3, 9, 2, 2, 8, 2, 1], texts()[2]], ids=len)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("batch", [1, 12, 500])
def test_every_row_is_encoded_once_and_no_text_is_cut(lengths, shards, batch):
    lengths = np.array(lengths)
    plan = queue_steps.plan_steps(len(lengths), shards, batch, lengths, T)
    seen = []
    for step in plan.steps:
        rows = plan.places(step) + plan.held * np.arange(shards)[:, None]
        rows = rows[(plan.places(step) < plan.held) & (rows < len(lengths))]
        assert step.width <= T and (lengths[rows] <= step.width).all()
        assert step.rows == min(plan.held, max(plan.rows, step.rows)) and step.rows * step.width <= plan.rows * T
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert [plan.stop(i) for i in (0, len(plan.steps))] == [0, plan.held]


def test_few_samples_are_encoded_as_they_come(monkeypatch):
    monkeypatch.setattr(queue_steps, "_LEAST", 10 * T + 1)
    plan = queue_steps.plan_steps(10, 1, 4, np.full(10, 2), T)
    assert plan.order is None and [step[:2] for step in plan.steps] == [(0, 4), (4, 4), (6, 4)]


@pytest.mark.parametrize("kind", [CAPTIONS, EMBEDDINGS, LAST_TOKENS], ids=lambda kind: kind.symbol)
def test_keys_are_those_of_whole_rows(kind):
    """K_t and K_b read a causal tower at a text's end, K_e a mean of what is valid: padding decides nothing."""
    vlm, params = tiny.model()
    tokens, valid, lengths = texts()
    fields = tokens if kind is CAPTIONS else (tokens, valid)
    slots = []

    def encode(params, fields):
        slots.append(jax.tree.leaves(fields)[0].shape)
        return kind.keys(vlm, params, fields)

    make = functools.partial(Queue.build, encode, partition.unflatten(params), fields, batch=8)
    whole = make()
    traced = len(slots)
    by_length = make(lengths=lengths)
    assert_close(np.asarray(by_length.keys), np.asarray(whole.keys), 1e-6)
    assert len({width for _, width in slots[traced:]}) > 1 and max(b * t for b, t in slots) == 8 * T


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_stopped_build_goes_on_and_gives_the_same_queue(tmp_path, monkeypatch, dtype, devices):
    monkeypatch.setattr(queue_parts, "_SECONDS", 0)
    mesh = None if devices == 1 else make_mesh((1, devices, 1), jax.devices()[:devices])
    tokens, _, lengths = texts()
    table = np.random.default_rng(1).normal(size=(tiny.VOCAB, 6)).astype(np.float32)

    class Rows:
        shape, dtype = tokens.shape, tokens.dtype

        def __init__(self, stop=None):
            self.asked, self.stop = 0, stop

        def __getitem__(self, rows):
            if self.asked == self.stop:
                raise Stopped
            self.asked += 1
            return tokens[rows]

    def encode(table, tokens):
        own = jnp.cumsum(tokens == END, axis=1) - (tokens == END) == 0  # up to the first END
        return jnp.sum(table[tokens] * own[..., None], axis=1)

    def build(folder, rows, lengths=lengths, said=None):
        parts = QueueParts(folder / "k.parts", described(dtype), print if said is None else said.append)
        options = dict(batch=4 * devices, mesh=mesh, dtype=dtype, parts=parts, lengths=lengths)
        return Queue.build(encode, table, rows, **options)

    whole, expected = build(tmp_path / "whole", Rows()), Queue.build(encode, table, tokens, dtype=dtype)
    np.testing.assert_allclose(np.asarray(whole.keys)[:N], np.asarray(expected.keys), rtol=1e-5, atol=1e-6)
    with pytest.raises(Stopped):
        build(tmp_path, Rows(2 * devices))
    again, said = Rows(), []
    same(build(tmp_path, again, said=said), whole)
    steps = len(queue_steps.plan_steps(N, devices, 4 * devices, lengths, T).steps)
    assert again.asked == (steps - 2) * devices and "continuing after" in said[0]
    build(tmp_path, Rows(), lengths=lengths[::-1].copy(), said=said)
    assert "begun with another order" in said[1]


@pytest.mark.parametrize(("by_length", "devices"), [(True, 1), (True, 4), (False, 4)])
def test_devices_filled_up_to_eight_rows_hold_the_same_keys_with_the_same_loss(monkeypatch, by_length, devices):
    """As on GPUs: 61 rows take 64 on one device, 16 on each of four, of which the last has three of padding."""
    mesh = make_mesh((1, devices, 1), jax.devices()[:devices])
    tokens, _, lengths = texts()
    table = np.random.default_rng(1).normal(size=(tiny.VOCAB, 6)).astype(np.float32)
    query, index = jnp.asarray(table[:3]), jnp.array([0, 7, 60])

    def encode(table, tokens):
        return jnp.sum(table[tokens] * (jnp.cumsum(tokens == END, axis=1) <= 1)[..., None], axis=1)

    def made():
        how = dict(batch=4 * devices, mesh=mesh, lengths=lengths if by_length else None)
        built = Queue.build(encode, table, tokens, **how)
        return built, Queue.of(np.asarray(built.keys)[:N], mesh=mesh), built.nce(query, index, mesh=mesh)

    *plain, loss = made()
    for module in (queue_build, queue_placement):
        monkeypatch.setattr(module, "rows_of_each", lambda count, mesh: 8 * -(-count // (8 * devices)))
    *filled, same_loss = made()
    for before, after in zip(plain, filled, strict=True):
        assert after.keys.shape[0] == 64 and after.groups.shape == (64,) and after.count == N
        assert_close(np.asarray(after.keys)[:N], np.asarray(before.keys)[:N], 1e-6)
        assert not np.asarray(after.keys)[N:].any()
    assert_close(np.asarray(same_loss.loss), np.asarray(loss.loss), 1e-6)

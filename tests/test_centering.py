"""Claims about centred queues and the positives "others", against float64 NumPy on raw features."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from eim_jax.config import Config, ConfigError, Losses, LossWeights, Stage, from_config_dict
from eim_jax.losses import queue_contrast, table
from eim_jax.losses.centering import check_center
from eim_jax.losses.kinds import ContrastiveLoss
from eim_jax.losses.queue_contrast import contrast
from eim_jax.losses.queue_health import measure, report
from eim_jax.losses.queues import BadRow, Queue, QueueParts, StaleQueue, manifest
from eim_jax.parallel.sharding import make_mesh
from eim_jax.training.arm import check_siblings

N, D, B, TAU = 61, 9, 6, 0.1
GROUPS = np.array([*np.repeat(np.arange(20), 3), 99], np.int32)  # the last sample is alone
INDEX = np.array([0, 7, 8, 30, 59, 60], np.int32)
WEIGHTS = np.array([1, 0.5, 2, 0, 1, 1.5], np.float32)


def features(narrow=0.1, seed=0):
    """Rows that all point nearly one way, of different lengths; queries that are noisy copies of some."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=D) / 3 + narrow * rng.normal(size=(N, D))
    rows *= rng.uniform(0.5, 3, (N, 1))
    return rows.astype(np.float32), (rows[INDEX] * 1.7 + 0.05 * rng.normal(size=(B, D))).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact_keys(rows, similarity="cosine"):
    """(centred keys, mean) in float64, from the definition."""
    x = rows.astype(np.float64)
    x = unit(x) if similarity == "cosine" else x
    left = x - x.mean(0)
    return unit(left) if similarity == "cosine" else left, x.mean(0)


def exact(query, keys, mean, similarity, positives):
    """The weighted sum of losses and its gradient by central differences of float64, of these keys."""

    def loss(query):
        q = unit(query) - mean if similarity == "cosine" else query - mean
        q = unit(q) if similarity == "cosine" else q
        scores = q @ keys.T / TAU
        own = np.arange(N) == INDEX[:, None]
        same = GROUPS[INDEX][:, None] == GROUPS
        if positives == "others":
            lonely = same.sum(1, keepdims=True) == 1
            inside, everyone = np.where(lonely, own, same & ~own), lonely | ~own
        else:
            inside, everyone = own, np.ones_like(own)
        nats = np.log((np.exp(scores) * everyone).sum(1)) - np.log((np.exp(scores) * inside).sum(1))
        return (WEIGHTS * nats).sum()

    query, step = query.astype(np.float64), 1e-5
    moves = step * np.eye(B * D).reshape(B * D, B, D)
    return loss(query), np.array([(loss(query + m) - loss(query - m)) / (2 * step) for m in moves]).reshape(B, D)


def found(queue, query, mesh=None, **options):
    def total(query):
        return queue.nce(
            query, jnp.asarray(INDEX), tau=TAU, weights=jnp.asarray(WEIGHTS), chunk=8, mesh=mesh, **options
        ).loss

    return jax.jit(jax.value_and_grad(total))(query)


@pytest.mark.parametrize(
    ("similarity", "positives"), [("cosine", "self"), ("cosine", "others"), ("dot", "self"), ("dot", "others")]
)
def test_loss_and_gradient_are_float64s_from_raw_features_on_one_device_and_on_eight(similarity, positives):
    rows, query = features()
    keys, mean = exact_keys(rows, similarity)
    mesh = make_mesh((2, 2, 2))
    for place in (None, mesh):
        queue = Queue.of(rows, GROUPS, similarity=similarity, center="mean", mesh=place)
        assert_close(queue.center, mean, 2e-7)  # unit keys are float32's, to an ulp or two
        assert_close(np.asarray(queue.keys)[:N], keys, 2e-6)
        assert not np.asarray(queue.keys)[N:].any()
        loss, gradient = found(queue, query, place, similarity=similarity, positives=positives)
        wanted = exact(query, keys, mean, similarity, positives)
        np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
        assert_close(gradient, wanted[1], 1e-5, size=np.abs(wanted[1]).max(), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_keys_are_rounded_after_the_mean_is_taken_and_the_loss_is_that_of_the_rounded_keys(dtype):
    rows, query = features(narrow=0.002)
    keys, mean = exact_keys(rows)
    assert np.linalg.norm(mean) > 0.9999  # rounded first, keys would be equal to 1 in 256
    mesh = make_mesh((1, 8, 1))
    queue = Queue.of(rows, GROUPS, center="mean", dtype=dtype, mesh=mesh)
    held = np.asarray(queue.keys, np.float64)[:N]
    held = held if queue.scale is None else held * np.asarray(queue.scale, np.float64)[:N, None]
    assert np.abs(held - keys).max() < 2**-8
    loss, gradient = found(queue, query, mesh)
    wanted = exact(query, held, np.asarray(queue.center, np.float64), "cosine", "self")
    # float32 holds a unit query to 6e-8, of which the mean leaves a part of 1/300.
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-3)
    assert_close(gradient, wanted[1], 2e-3, size=np.abs(wanted[1]).max(), rtol=1e-2)


def test_the_mean_of_many_rows_is_that_of_float64():
    rows = 1 + 1e-3 * np.random.default_rng(0).normal(size=(2600, 5)).astype(np.float32)
    unit_rows = np.asarray(Queue.of(rows).keys, np.float64)
    for mesh in (None, make_mesh((1, 3, 1), jax.devices()[:3])):
        assert_close(Queue.of(rows, center="mean", mesh=mesh).center, unit_rows.mean(0), 5e-8)


def test_a_build_that_goes_on_is_the_ready_features_queue_and_comes_back_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(QueueParts, "due", lambda self, steps: True)
    rows, query = features()
    facts = manifest(
        "k",
        weights="w",
        data="d",
        tokenizer="t",
        pooling="p",
        similarity="cosine",
        dtype="int8",
        count=N,
        center="mean",
    )

    class Stops:
        shape, dtype = rows.shape, rows.dtype

        def __getitem__(self, numbers):
            if numbers.max() > 40:
                raise InterruptedError
            return rows[numbers]

    def build(fields, mesh=None):
        parts = QueueParts(tmp_path / "k.parts", facts, lambda said: None)
        return Queue.build(lambda _, x: x, (), fields, GROUPS, batch=8, dtype="int8", center="mean", parts=parts)

    with pytest.raises(InterruptedError):
        build(Stops())
    built, whole = build(rows), Queue.of(rows, GROUPS, dtype="int8", center="mean")
    for name in ("keys", "scale", "groups", "center"):
        np.testing.assert_array_equal(getattr(built, name), getattr(whole, name))
    built.save(tmp_path / "k", facts)
    mesh = make_mesh((2, 4, 1))
    again = Queue.load(tmp_path / "k", facts, mesh)
    for name in ("keys", "scale", "center"):
        np.testing.assert_array_equal(
            np.asarray(getattr(again, name))[: len(getattr(built, name))], getattr(built, name)
        )
    np.testing.assert_allclose(found(again, query, mesh)[0], found(built, query)[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"center='none', but its parts' manifest says 'mean'"):
        parts = QueueParts(tmp_path / "k.parts", facts)
        Queue.build(lambda _, x: x, (), rows, dtype="int8", parts=parts)


def test_a_stored_queue_with_another_centring_is_refused_and_one_without_stays_as_it_was(tmp_path):
    rows, _ = features()
    facts = dict(weights="w", data="d", tokenizer="t", pooling="p", similarity="cosine", dtype="float32", count=N)
    raw, centred = manifest("k", **facts), manifest("k", **facts, center="mean")
    assert "center" not in raw
    Queue.of(rows, GROUPS).save(tmp_path / "raw", raw)
    Queue.of(rows, GROUPS, center="mean").save(tmp_path / "centred", centred)
    assert "center" not in json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert not (tmp_path / "raw" / "center.npy").exists() and Queue.load(tmp_path / "raw", raw).center is None
    with pytest.raises(StaleQueue, match=r"center: expected 'mean', found 'none' \(config.losses.center"):
        Queue.load(tmp_path / "raw", centred)
    with pytest.raises(StaleQueue, match=r"center: expected 'none', found 'mean' \(config.losses.center"):
        Queue.load(tmp_path / "centred", raw)
    with pytest.raises(ValueError, match="manifest says center='mean', the queue has 'none'"):
        Queue.of(rows).save(tmp_path / "q", centred)
    np.save(tmp_path / "centred" / "center.npy", np.zeros(3, np.float32))
    with pytest.raises(StaleQueue, match="damaged"):
        Queue.load(tmp_path / "centred", centred)


def test_another_word_for_centring_is_refused():
    with pytest.raises(ValueError, match="center='median' is none of none, mean"):
        check_center("median")  # which Queue.of and Queue.build ask first


def test_what_is_no_key_once_the_mean_is_taken_is_named():
    with pytest.raises(BadRow, match=r"the key of sample 'a' .* is the mean of all keys"):
        Queue.of(np.ones((3, 4), np.float32), ids=["a", "b", "c"], center="mean")
    rows, query = features()
    queue = Queue.of(rows, GROUPS, center="mean")
    mean = np.asarray(queue.center)[None] * np.ones((B, 1), np.float32)
    loss, gradient = found(queue, jnp.asarray(mean))  # a query of which nothing is left is as near to every key
    assert np.isfinite(gradient).all()
    query[3] = np.nan  # it has weight 0
    loss, gradient = found(queue, query)
    assert np.isfinite(loss) and np.isfinite(gradient).all() and not np.asarray(gradient)[3].any()


def test_a_setting_is_for_all_losses_or_by_name_and_what_cannot_be_meant_is_refused(monkeypatch):
    assert [Losses().of("center", name) for name in ("ie", "lm")] == ["none", "none"]
    assert [Losses(center="mean").of("center", name) for name in ("ie", "lm")] == ["mean", "mean"]
    mixed = Losses(positives="mask, lm:others")
    assert [mixed.of("positives", name) for name in ("ie", "lm")] == ["mask", "others"]

    def with_losses(**fields):
        config = from_config_dict(
            {"losses": fields, "arms": ["a"], "arm": {"a": {"sequence": ["s"]}}, "stages": STAGES}
        )
        table.check(config)
        return config

    STAGES = {"s": {"train": ["st/.*"], "losses": {"st": 1.0}, "epochs": 1, "warmup_steps": 0}}
    assert table.center_of(table.LOSSES["lm"].queue, with_losses(center="lm:mean").losses) == "mean"
    for fields, message in (
        (
            {"center": "median"},
            r"config.losses.center: 'median' is none of none, mean \(for some losses alone: 'ie:mean",
        ),
        ({"center": "lm:mean, lm:none"}, "config.losses.center: 'lm:mean, lm:none' names a loss twice"),
        ({"center": "lm:max"}, "config.losses.center: 'max' is none of none, mean"),
        ({"center": "base:mean"}, "config.losses.center: 'base' is no loss with a queue; there are ie, st, lm"),
        ({"positives": "self, all"}, "config.losses.positives: 'self,all' is none of self, group, mask, others"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_losses(**fields)
    lm = table.LOSSES["lm"]
    assert isinstance(lm, ContrastiveLoss)
    monkeypatch.setitem(table.LOSSES, "lm2", dataclasses.replace(lm, name="lm2"))
    with pytest.raises(ConfigError, match="lm:mean, lm2:none, but these losses share the queue 'hidden'"):
        with_losses(center="lm:mean")


def test_other_captions_are_refused_where_no_picture_has_two():
    stage, settings = Stage(losses=LossWeights(lm=1)), Losses(positives="lm:others")
    check_siblings(stage, settings, GROUPS, "config.stages.lm")
    check_siblings(stage, Losses(), np.arange(3), "config.stages.lm")
    with pytest.raises(ConfigError, match=r"config.stages.lm: by config.losses.positives loss_LM draws .* no two"):
        check_siblings(stage, settings, np.arange(3), "config.stages.lm")
    assert Config().losses.positives == "self"


@pytest.mark.parametrize("positives", ["self", "others"])
def test_a_queue_says_what_its_loss_lies_between_and_a_cone_is_a_warning(positives, monkeypatch):
    monkeypatch.setattr(queue_contrast, "SAMPLE", 40)
    rows, _ = features(narrow=0.02)
    asked = np.sort(np.random.default_rng(0).choice(N, 40, replace=False))
    mesh = make_mesh((2, 2, 2))
    narrow = {}
    for center in ("none", "mean"):
        keys = unit(rows.astype(np.float64)) if center == "none" else exact_keys(rows)[0]
        queue = Queue.of(rows, GROUPS, center=center, mesh=mesh)
        got = contrast(queue, tau=TAU, positives=positives, mesh=mesh)
        scores = keys[asked] @ keys.T / TAU
        own, same = np.arange(N) == asked[:, None], GROUPS[asked][:, None] == GROUPS
        lonely = same.sum(1, keepdims=True) == 1
        inside = own if positives == "self" else np.where(lonely, own, same & ~own)
        everyone = np.ones_like(own) if positives == "self" else lonely | ~own
        for value, e in ((got.floor, np.exp(scores)), (got.chance, np.ones_like(scores))):
            wanted = (np.log((e * everyone).sum(1)) - np.log((e * inside).sum(1))).mean()
            np.testing.assert_allclose(value, wanted, rtol=2e-5)
        health = measure(queue, mesh)
        np.testing.assert_allclose(health.mean_norm, np.linalg.norm(keys.mean(0)), atol=1e-5)
        ids = [str(row) for row in range(N)]
        narrow[center] = report(queue, "k", ids, mesh, health, got, "loss_LM", "take the mean")
    line, warning = narrow["none"]
    assert "loss_LM where the query is its own key" in line and "(by 40 rows), by chance" in line
    assert "of chance: the keys can hardly be told apart" in warning and warning.endswith("; take the mean")
    if positives == "self":
        [line] = narrow["mean"]
        assert "after centring (the mean that was taken: 0.99" in line

"""Claims about a queue's health: counted exactly on any mesh, equal keys refused, repeated ones named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_text import tiny_clip

from eim_jax.config import ConfigError, Losses, LossWeights, Stage
from eim_jax.data import tokenize
from eim_jax.losses import queue_health
from eim_jax.losses.queue_health import EqualKeys, measure, report
from eim_jax.losses.queues import Queue
from eim_jax.parallel.sharding import make_mesh
from eim_jax.training.arm import check_contrast

IDS = [f"s{row}" for row in range(200)]


def vectors(count, width=7, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def mean_cosine(rows):
    """In float64, over all pairs of different rows."""
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (unit @ unit.T)[~np.eye(len(rows), dtype=bool)].mean()


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_distinct_rows_and_mean_cosine_on_any_mesh_in_any_dtype(shape, dtype, monkeypatch):
    monkeypatch.setattr(queue_health, "BLOCK", 4)  # several blocks a device, the last one overlapping
    mesh = None if shape is None else make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    rows = vectors(37)
    rows[[5, 11, 36]] = rows[2]
    rows[20] = rows[30]
    found = measure(Queue.of(rows, dtype=jnp.dtype(dtype), mesh=mesh), mesh)
    assert (found.count, found.distinct, found.all_equal, found.commonest) == (37, 33, False, (2, 4))
    assert abs(found.mean_cosine - mean_cosine(rows)) < {"float32": 1e-6}.get(dtype, 2e-3)


def test_the_last_bit_of_one_number_makes_another_row():
    rows = np.repeat(vectors(1), 3, axis=0)
    rows[1, 3] = np.nextafter(rows[1, 3], np.float32(9))
    assert measure(Queue.of(rows, similarity="dot")).distinct == 2


def test_rows_of_one_direction_and_other_lengths_are_distinct_keys_of_a_dot_queue():
    found = measure(Queue.of(vectors(1) * np.array([[1.0], [2.0], [3.0]], np.float32), similarity="dot"))
    assert found.distinct == 3 and not found.all_equal and abs(found.mean_cosine - 1) < 1e-6


def test_all_equal_is_an_error_also_where_rounding_makes_rows_distinct():
    same = np.repeat(vectors(1), 60, axis=0)
    with pytest.raises(EqualKeys, match=r"queue 'caption': the keys of all 60 samples are equal .* sample 's0'"):
        report(Queue.of(same), "caption", IDS)
    noise = np.random.default_rng(1).normal(size=same.shape).astype(np.float32) * 3e-7
    with pytest.raises(EqualKeys, match="60 samples are equal"):
        report(Queue.of(same + noise), "caption", IDS)


def test_many_equal_rows_are_a_warning_with_the_number_few_are_not():
    rows = vectors(40)
    [line] = report(Queue.of(rows), "caption", IDS)
    assert line.startswith("queue caption: 40 keys, 40 distinct, mean cosine between keys")
    rows[10:30] = rows[3]
    _, warning = report(Queue.of(rows), "caption", IDS)
    assert "20 of 40 keys repeat another sample's, that of sample 's3' stands 21 times" in warning


def test_one_training_sample_is_refused_for_a_contrastive_loss():
    with pytest.raises(ConfigError, match=r"config.stages.st: loss_ST contrasts .* there is 1 training sample"):
        check_contrast(Stage(losses=LossWeights(base=1, st=1)), Losses(), 1, "config.stages.st")
    check_contrast(Stage(losses=LossWeights(base=1)), Losses(), 1, "config.stages.base")
    check_contrast(Stage(losses=LossWeights(base=1, st=1)), Losses(), 2, "config.stages.st")


def test_a_batch_of_one_is_refused_where_negatives_are_the_batchs():
    single = Stage(losses=LossWeights(base=1, st=1, ie=1), batch=1)
    with pytest.raises(ConfigError, match=r"config.stages.x.batch=1: by config.losses.negatives loss_IE contrasts"):
        check_contrast(single, Losses(negatives="queue, ie:batch"), 9, "config.stages.x")
    check_contrast(single, Losses(negatives="queue, lm:batch"), 9, "config.stages.x")
    check_contrast(dataclasses.replace(single, batch=2), Losses(negatives="batch"), 9, "config.stages.x")


def test_equal_captions_give_one_distinct_key_of_clips_text_tower(shared_case):
    """The texts of the case through a tower of random weights: whatever it computes, equal texts are equal keys."""
    captions = json.loads((shared_case("captions_all_equal") / "captions.json").read_text())["annotations"]
    words = sorted({record["caption"] for record in captions})
    tokens = np.array([[words.index(record["caption"]) + 1, 2] for record in captions], np.int32)
    queue = Queue.build(lambda table, ids: table[ids].mean(1), vectors(5), tokens, batch=16)
    with pytest.raises(EqualKeys, match="all 60 samples are equal"):
        report(queue, "caption", [str(record["id"]) for record in captions])


def test_texts_cut_to_the_towers_context_are_counted(capsys):
    tokenize.encode_clip(["ab", "a b c d e f g h"], tiny_clip(), 6)
    assert "1 of 2 texts cut to the 6 tokens" in capsys.readouterr().out

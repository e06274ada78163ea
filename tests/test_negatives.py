"""What a query is contrasted with, `losses.negatives`: against float64 NumPy, on meshes, in micro-batches, resumed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_losses import assert_agree, oracle, problem
from test_stages import run_step, stage

from eim_jax.config import Config, ConfigError, Losses
from eim_jax.data import loader
from eim_jax.data.miniature import captioning
from eim_jax.losses import table
from eim_jax.losses.contrastive import queue_nce
from eim_jax.losses.negatives import BatchRows, Recent, Share, negatives_of, parse
from eim_jax.losses.queue_contrast import contrast
from eim_jax.losses.queues import Queue, compress
from eim_jax.parallel.sharding import batch_sharding, make_mesh, queue_sharding
from eim_jax.training import partition


def reference(data, among, **options):
    """Sums over queries, each with a queue of its own: its own key, and those of `among` as often as it lists them."""
    total = None
    for row in range(len(data["query"])):
        own = data["index"][row]
        rows = [own, *(j for j in among if j not in (-1, own))]
        alone = dict(
            query=data["query"][row : row + 1],
            keys=data["keys"][rows],
            index=np.zeros(1, np.int32),
            weights=data["weights"][row : row + 1],
            groups=data["groups"][rows],
            count=len(rows),
        )
        nce, gradient = oracle(**alone, **options)
        nce = np.array(nce)
        total = (nce, [gradient]) if total is None else (total[0] + nce, [*total[1], gradient])
    return type(oracle(**alone, **options)[0])(*total[0]), np.concatenate(total[1])


def ours(data, among, fixed, mesh=None, dtype=jnp.float32, **options):
    keys, scale = compress(jnp.asarray(data["keys"]), dtype)
    groups, query, index, weights = (data[name] for name in ("groups", "query", "index", "weights"))
    if mesh is not None:
        query, index, weights = jax.device_put((query, index, weights), batch_sharding(mesh))
        keys, scale, groups = jax.device_put((keys, scale, groups), queue_sharding(mesh))

    @jax.jit
    def of(query, keys, scale, groups, index, weights, listed):
        def loss(query):
            found = queue_nce(
                query,
                keys,
                index,
                count=data["count"],
                weights=weights,
                groups=groups,
                scale=scale,
                among=among if fixed else listed,
                mesh=mesh,
                **options,
            )
            return found.loss, found

        return jax.value_and_grad(loss, has_aux=True)(query)

    (_, nce), gradient = of(query, keys, scale, groups, index, weights, jnp.asarray(among))
    return jax.device_get((nce, gradient))


# Twice the same row, none, an own key among them and one that is not.
AMONG = np.array([3, 3, -1, 7, 11, 0, 22, 15], np.int32)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("positives", ["self", "group", "mask"])
def test_chosen_negatives_match_float64(positives, fixed):
    data = problem()
    data["index"][:2] = (3, 5)
    found = ours(data, AMONG, fixed, positives=positives, chunk=3)  # the last of three blocks overlaps
    assert_agree(found, reference(data, AMONG, positives=positives))


@pytest.mark.parametrize("fixed", [True, False])
def test_chosen_negatives_are_the_same_on_a_mesh(fixed):
    data = problem(b=8, n=23, pad=1)
    data["index"][:2] = (3, 5)
    mesh = make_mesh((2, 2, 2))
    assert_agree(ours(data, AMONG, fixed, mesh), reference(data, AMONG))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_stored_keys_of_every_dtype_are_read_by_row(dtype):
    data = problem()
    keys, scale = compress(jnp.asarray(data["keys"]), dtype)
    rounded = np.asarray(keys, np.float32) * (1 if scale is None else np.asarray(scale)[:, None])
    assert_agree(ours(data, AMONG, True, dtype=dtype), reference({**data, "keys": rounded}, AMONG))


def test_all_rows_as_a_list_are_the_whole_queue():
    data = problem()
    assert_agree(ours(data, np.arange(23, dtype=np.int32), True), oracle(**data))


def test_in_batch_negatives_are_clips_loss():
    """The cross-entropy of a batch's own matrix of similarities, as CLIP has it for the images."""
    data = problem()
    data["index"] = np.array([4, 9, 1, 17, 20], np.int32)
    data["weights"][:] = 1
    found, _ = ours(data, data["index"], False)
    unit = data["query"].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = unit @ data["keys"][data["index"]].astype(np.float64).T / 0.07
    wanted = (np.log(np.exp(scores).sum(1)) - np.diag(scores)).sum()
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-5)


def test_lists_that_cannot_be_meant_are_refused():
    data = problem()
    for among, said in ((np.array([23]), "row 23"), (np.array([-2]), "row -2"), (np.zeros(0, int), "at least one")):
        with pytest.raises(ValueError, match=said):
            ours(data, among.astype(np.int32), True)


def test_a_share_is_fixed_and_a_smaller_one_lies_within_it():
    none = BatchRows(jnp.zeros(0, jnp.int32))
    tenth, hundredth = (parse(word).rows(none, 6000) for word in ("10%", "1%"))
    assert (len(tenth), len(hundredth)) == (600, 60)
    assert set(hundredth) < set(tenth) and len(set(tenth)) == 600
    assert len(Share(0.001).rows(none, 10)) == len(Share(1e-9).rows(none, 4)) == 1  # never none


def test_the_setting_is_checked_and_named():
    for word in ("nearest", "0%", "101%", "recent-0", "", "ie:nearest", "queue, batch", "ie:batch, ie:queue"):
        with pytest.raises(ConfigError, match=r"config\.losses\.negatives"):
            table.check(Config(losses=Losses(negatives=word)))
    with pytest.raises(ConfigError, match="no loss with a queue"):
        table.check(Config(losses=Losses(negatives="base:batch")))
    with pytest.raises(ConfigError, match="lm_distil"):
        table.check(Config(losses=Losses(negatives="batch", lm_distil=True)))
    mixed = Losses(negatives="10%, lm:recent-8")
    table.check(Config(losses=mixed))
    assert negatives_of(mixed, "lm") == Recent(8) and negatives_of(mixed, "ie") == Share(0.1)
    with pytest.raises(ValueError, match="nearest"):
        negatives_of(Losses(negatives="nearest"), "ie")


def test_a_batch_carries_the_rows_of_those_before_it_also_after_a_resume():
    split = captioning.load("train", scenes=4)  # 20 captions, 3 batches of 6 an epoch
    made = functools.partial(
        loader.batches, split, None, fields={"index", "before"}, batch_size=6, seed=1, epochs=3, before=2, threads=0
    )
    whole = list(made())
    indices = [batch.index for batch in whole]
    for step, batch in enumerate(whole):
        for back in (1, 2):
            wanted = indices[step - back] if step >= back else np.full(6, -1)
            np.testing.assert_array_equal(batch.before[:, back - 1], wanted)
    part = list(made(process_index=1, process_count=2))
    np.testing.assert_array_equal(part[4].before, whole[4].before[3:])
    half = made()
    for _ in range(4):
        next(half)
    resumed = made()
    resumed.set_state(half.get_state())
    np.testing.assert_array_equal(next(resumed).before, whole[4].before)


def test_what_a_loss_lies_between_is_that_of_its_negatives():
    queue = Queue.of(np.eye(8, dtype=np.float32))
    found = contrast(queue, tau=1.0, among=parse("batch").like(4, 8))
    sizes = [3 + (row not in parse("batch").like(4, 8)) for row in range(8)]  # an own key among three counts once
    np.testing.assert_allclose(found.chance, np.mean(np.log(sizes)), rtol=1e-5)
    np.testing.assert_allclose(found.floor, np.mean(np.log(np.e + np.array(sizes) - 1) - 1), rtol=1e-5)


def test_micro_batches_are_contrasted_with_the_whole_update():
    """loss_ST's step, whole and in two parts: the same loss and gradient, that of the batch's own keys in float64."""
    vlm, params = tiny.model()
    batch, keys = tiny.batch(), np.asarray(tiny.queues()["embed"].keys, np.float64)
    before = np.array([[0, 3], [1, -1], *[[-1, -1]] * 6], np.int32)
    tree = partition.unflatten(params)
    query = np.asarray(vlm.connect(tree, vlm.encode_image(tree, batch.image)), np.float64).mean(1)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    index = np.asarray(batch.index)
    for word, listed in (("batch", index), ("recent-2", [0, 3, 1])):
        losses, batch = Losses(negatives=word), batch._replace(before=jnp.asarray(before))
        scores = [
            keys[[own, *(row for row in listed if row != own)]] @ q / 0.07 for own, q in zip(index, query, strict=True)
        ]
        wanted = np.mean([np.log(np.exp(row).sum()) - row[0] for row in scores])
        norms = []
        for parts in (1, 2):
            one = stage(train=("st/.*",), accumulate=parts, st=1.0)
            (_, _, metrics), _ = run_step(vlm, params, one, batch, losses=losses)
            assert float(metrics["loss/st"]) == pytest.approx(wanted, rel=2e-5)
            norms.append(float(metrics["grad_norm"]))
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)

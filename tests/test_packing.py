"""Samples that share rows of slots: bins by hand, and the losses and gradients of samples in rows of their own."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_order
import test_stages
import test_vlm
import tiny
from close import assert_close, assert_trees_close

from eim_jax.config import Config, ConfigError, Data, Losses
from eim_jax.data.packing import Packer, Shape, choose, first_fit, parted
from eim_jax.losses.objective import make_objective, normalisers, readings
from eim_jax.losses.table import queues_of
from eim_jax.models.batch import Batch
from eim_jax.models.language.gpt2 import GPT2
from eim_jax.models.packing import Packing
from eim_jax.parallel.sharding import batch_sharding, make_mesh, queue_sharding, shard_params
from eim_jax.training import partition
from eim_jax.training.packing import before, check_packing

WEIGHTS = {"base": 1.0, "ie": 1.0, "st": 1.0, "lm": 1.0}


def packer_of(vlm, params, batch, shapes, parts=1, accumulate=1):
    """A packer of a batch that is the whole split, with what stands before its texts counted as training counts it."""
    flat = partition.flatten(params)
    pictured, texts = np.asarray(batch.has_image), np.asarray(batch.valid.sum(1))
    lengths = {reading: texts + before(vlm, flat, pictured, reading) for reading in shapes}
    return Packer(lengths, {reading: (shape,) for reading, shape in shapes.items()}, parts, accumulate)


def packed(vlm, params, batch, shapes, **options):
    found = packer_of(vlm, params, batch, shapes, **options)(np.arange(len(batch.index)))
    assert found is not None and found.keys() == shapes.keys()
    return batch._replace(packing=jax.tree.map(jnp.asarray, found))


def llama(kind, scan):
    vlm, tree, tokens, valid, images, has_image = test_vlm.build(kind, scan)
    rows = jnp.arange(6, dtype=jnp.int32)
    tokens, images = jnp.concatenate([tokens, tokens[::-1]]), jnp.concatenate([images, 255 - images])
    valid = jnp.arange(6)[None] < jnp.array([6, 4, 1, 2, 3, 5])[:, None]
    supervised = valid & (jnp.arange(6) > 1)[None]
    has_image = jnp.concatenate([has_image, has_image])
    return vlm, tree, Batch(rows, tokens * valid, valid, supervised, images, has_image=has_image)


def test_samples_lie_side_by_side_and_see_themselves_alone():
    valid = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]], bool)
    segment = np.array([[[1, 1, 1, 0, 0], [2, 2, 2, 3, -1]]], np.int32)
    ways = Packing(jnp.asarray(segment), jnp.asarray([[3, 0, 5, 8]])).exchange(jnp.asarray(valid))
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    moved = np.asarray(ways.pack(jnp.asarray(x)[..., None]))[..., 0]
    np.testing.assert_array_equal(moved, [[4, 5, 6, 0, 2], [9, 10, 11, 12, 0]])
    np.testing.assert_array_equal(ways.unpack(jnp.asarray(moved)), np.where(valid, x, 0))
    mask = np.asarray(ways.mask)[:, 0]
    for row in range(2):
        for i in range(5):
            for j in range(5):
                assert mask[row, i, j] == (j <= i and segment[0, row, i] == segment[0, row, j])
    slope = jax.grad(lambda x: (ways.pack(x) * jnp.arange(10.0).reshape(2, 5)).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(slope, [[3, 0, 4, 0], [0, 1, 2, 0], [0, 5, 6, 7], [8, 0, 0, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_bins_hold_every_sample_once_on_its_own_device_and_micro_batch(seed):
    lengths = np.random.default_rng(seed).integers(0, 12, 24)
    packing = Packer({"text": lengths}, {"text": (Shape(1, 12), Shape(4, 20))}, 4, 2)(np.arange(24))["text"]
    assert packing.segment.shape == (4, 4, 20) and packing.start.shape == (4, 6)
    for part in range(4):  # of 2 devices with 12 rows each, in 2 micro-batches
        own = lengths[part // 2 * 12 + part % 2 : part // 2 * 12 + 12 : 2]
        np.testing.assert_array_equal(parted(lengths, 4, 2)[part], own)
        for sample, size in enumerate(own):
            slots = np.flatnonzero(packing.segment[part] == sample)
            np.testing.assert_array_equal(slots, packing.start[part, sample] + np.arange(size))
            assert not size or slots[0] // 20 == slots[-1] // 20  # in one row
    assert Packer({"text": lengths}, {"text": (Shape(1, 12),)}, 4, 2)(np.arange(24)) is None
    with pytest.raises(ValueError, match="a sample of 13 slots does not fit a row of 12"):
        first_fit(np.array([13]), 12)


FAMILIES = {
    "gpt2": {"image": Shape(3, 33), "text": Shape(3, 19)},
    "lavin": {"image": Shape(3, 37)},
    "prompts": {"image": Shape(3, 17)},
}


def gradients(vlm, params, batch, weights, mesh=None):
    """(a compiled program's text, losses, gradients of all parameters); on a mesh with everything in its place."""
    one = test_stages.stage(**weights)
    queues = {k: q for k, q in tiny.queues().items() if k in {kind.name for kind in queues_of(one)}}
    objective = make_objective(vlm, one, Losses(), mesh)
    if mesh is not None:
        params = shard_params(params, mesh)
        batch = jax.device_put(batch, batch_sharding(mesh))
        queues = jax.device_put(queues, queue_sharding(mesh))

    def loss_of(flat, batch, queues):
        return objective(partition.unflatten(flat), batch, queues, normalisers(vlm, one, batch), None)

    program = jax.jit(jax.grad(loss_of, has_aux=True)).lower(params, batch, queues).compile()
    slopes, metrics = program(params, batch, queues)
    return program.as_text(), metrics, slopes


@pytest.mark.parametrize(
    "kind, scan, attention",
    [
        ("gpt2", False, "softmax"),
        ("gpt2", False, "xla"),  # jax.nn.dot_product_attention, whose other form is cuDNN's
        ("lavin", True, "softmax"),
        ("lavin", True, "xla"),
        ("prompts", True, "softmax"),
        ("prompts", False, "softmax"),
    ],
)
def test_packed_samples_have_the_losses_and_gradients_of_samples_in_rows_of_their_own(kind, scan, attention):
    if kind == "gpt2":
        (vlm, params), batch, weights = tiny.model(), tiny.batch(text_only=(2, 5)), WEIGHTS
    else:
        (vlm, tree, batch), weights = llama(kind, scan), {"base": 1.0}
        params = partition.flatten(tree)
    vlm = dataclasses.replace(vlm, lm=vlm.lm.clone(config=dataclasses.replace(vlm.lm.config, attention=attention)))
    assert readings(test_stages.stage(**weights), Losses()) == FAMILIES[kind].keys()
    together = packed(vlm, params, batch, FAMILIES[kind])
    _, expected, slopes = gradients(vlm, params, batch, weights)
    _, found, packed_slopes = gradients(vlm, params, together, weights)
    assert expected.keys() == found.keys() >= {"loss", *(f"loss/{name}" for name in weights)}
    for name, value in expected.items():
        assert_close(found[name], value, 2e-6, size=max(abs(float(value)), 1.0), err_msg=name)
    assert_trees_close(packed_slopes, slopes, 3e-6)


def test_packed_micro_batches_make_the_step_of_unpacked_ones():
    (vlm, params), batch = tiny.model(), tiny.batch(text_only=(1, 4))
    one = test_stages.stage(accumulate=2, **WEIGHTS)
    together = packed(vlm, params, batch, {"image": Shape(2, 30), "text": Shape(2, 16)}, parts=2, accumulate=2)
    (_, state, metrics), _ = test_stages.run_step(vlm, params, one, batch)
    (_, packed_state, found), _ = test_stages.run_step(vlm, params, one, together)
    for name, value in metrics.items():
        assert_close(found[name], value, 2e-5, size=max(abs(float(value)), 1.0), err_msg=name)
    assert_trees_close(packed_state, state, 2e-5, rtol=1e-4)


def test_on_a_mesh_packing_changes_no_number_and_sends_nothing_more():
    mesh = make_mesh((2, 2, 2))
    (vlm, params), batch = tiny.model(), tiny.batch(16)
    vlm = dataclasses.replace(vlm, mesh=mesh)
    weights = {"base": 1.0, "lm": 1.0}
    together = packed(vlm, params, batch, {"image": Shape(2, 24), "text": Shape(2, 14)}, parts=4)
    text, expected, slopes = gradients(vlm, params, batch, weights, mesh)
    packed_text, found, packed_slopes = gradients(vlm, params, together, weights, mesh)
    for name, value in expected.items():
        assert_close(found[name], value, 2e-6, size=max(abs(float(value)), 1.0), err_msg=name)
    assert_trees_close(packed_slopes, slopes, 3e-6)

    def gathers(program):
        return len(re.findall(r"(?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program))

    assert gathers(packed_text) <= gathers(text)


class RowByRow(GPT2):
    """A language model of one's own that knows nothing of packed rows."""

    def hidden(self, embeds, *, valid=None, positions=None, cache=None, train=False):
        return super().hidden(embeds, valid=valid, positions=positions, cache=cache, train=train)


def test_a_language_model_that_reads_one_sample_a_row_is_refused_by_on_alone():
    vlm, _ = tiny.model()
    own = dataclasses.replace(vlm, lm=RowByRow(vlm.lm.config))
    for pack, stage, module in (("off", {"lm": 1.0}, own), ("auto", {"lm": 1.0}, own), ("on", {"st": 1.0}, own)):
        check_packing(module, test_stages.stage(**stage), Config(data=Data(pack=pack)))
    check_packing(vlm, test_stages.stage(lm=1.0), Config(data=Data(pack="on")))
    with pytest.raises(ConfigError, match=r"pack=on: the language model \(gpt2\) reads one sample a row: its `hidden`"):
        check_packing(own, test_stages.stage(lm=1.0), Config(data=Data(pack="on")))


def stream(packer, **changes):
    return test_order.stream(window=1, packer=packer, **changes)


def test_a_stream_packs_the_same_batches_in_every_process_and_after_a_stop():
    lengths = test_order.texts().valid.sum(1)
    packer = Packer({"text": lengths}, {"text": (Shape(1, 40), Shape(2, 40))}, 2, 1)
    plain, whole = list(test_order.stream(window=1)), list(stream(packer))
    assert {batch.packing is None for batch in whole} == {False}
    longest = int(lengths.max())
    for one, other in zip(plain, whole, strict=True):
        np.testing.assert_array_equal(one.index, other.index)
        assert other.tokens.shape[1] == longest
        np.testing.assert_array_equal(one.tokens, other.tokens[:, : one.tokens.shape[1]])
        for part, sizes in enumerate(parted(lengths[other.index], 2, 1)):
            owners = other.packing["text"].segment[part]
            assert [(owners == sample).sum() for sample in range(2)] == sizes.tolist()
    halves = [list(stream(packer, process_index=i, process_count=2)) for i in range(2)]
    first = stream(packer)
    for _ in range(7):
        next(first)
    second = stream(packer)
    second.set_state(first.get_state())
    for step, batch in enumerate(whole):
        joined = [np.concatenate([half[step].packing["text"][i] for half in halves]) for i in range(2)]
        again = next(second).packing["text"] if step >= 7 else batch.packing["text"]
        for i in range(2):
            np.testing.assert_array_equal(joined[i], batch.packing["text"][i])
            np.testing.assert_array_equal(again[i], batch.packing["text"][i])
    tight = Packer({"text": lengths}, {"text": (Shape(1, 24),)}, 1, 1)  # what does not fit stays as it is, whole
    for one, other in zip(plain, stream(tight), strict=True):
        fits = lengths[one.index].sum() <= 24
        assert (other.packing is not None) == fits
        if not fits:
            np.testing.assert_array_equal(one.tokens, other.tokens)


def test_chosen_shapes_hold_most_batches_and_leave_less_than_a_tenth_empty():
    rng = np.random.default_rng(0)
    texts = np.clip(rng.gamma(9, 1.5, 4000).astype(int), 4, 40)
    lengths = {"image": texts + 10, "text": texts}
    drawn = [rng.permutation(4000)[:40] for _ in range(200)]
    sizes = {"width": 768, "head_width": 64, "parts": 1, "accumulate": 1}
    packer, saving = choose(lengths, texts, drawn[:100], [40] * 100, shapes=4, **sizes)
    assert saving.before > 0.6 and saving.after < 0.15 and saving.factor > 1.5  # among text tokens alone
    assert all(packer(rows) for rows in drawn[:100])
    made = [packing for packing in map(packer, drawn[100:]) if packing is not None]
    assert len(made) >= 95  # of batches on which the shapes were not chosen
    assert len({tuple(p.segment.shape for p in packing.values()) for packing in made}) <= 4
    slots = sum(packing[reading].segment.size for packing in made for reading in lengths)
    empty = sum((packing[reading].segment < 0).sum() for packing in made for reading in lengths)
    assert empty < 0.1 * slots
    even = {"text": np.full(4000, 12)}  # nothing to gain
    assert choose(even, even["text"], drawn, [12] * 200, shapes=4, **sizes)[1].factor < 1.05


def test_one_shape_holds_every_batch_of_the_epoch_whatever_few_of_them_it_was_chosen_on(monkeypatch):
    rng = np.random.default_rng(1)
    texts = np.clip(rng.gamma(9, 1.5, 8000).astype(int), 4, 40)
    batches = list(rng.permutation(8000).reshape(200, 40))
    texts[batches[101]] = 30
    sizes = {"width": 768, "head_width": 64, "parts": 1, "accumulate": 1, "shapes": 1}
    monkeypatch.setattr("eim_jax.data.packing._SAMPLED", 1)  # 8 batches
    packer, saving = choose({"text": texts}, texts, batches, [40] * 200, **sizes)
    (shape,) = packer.shapes["text"]
    needed = [first_fit(texts[rows], shape.length)[2] for rows in batches]
    assert needed[101] == max(needed) == shape.rows > sorted(needed)[-2]
    assert saving.factor > 1 and all(packer(rows) for rows in batches)


@pytest.mark.parametrize("visual", [16, 64, 257])
def test_what_packing_is_said_to_save_is_what_it_saves_where_the_lm_reads_a_batch_twice(visual):
    """A batch whose texts would fit a shape with the picture before them or without it alone is not packed at all."""
    rng = np.random.default_rng(2)
    texts = np.clip(rng.gamma(9, 1.5, 4000).astype(int), 4, 40)
    lengths = {"image": texts + visual, "text": texts}
    batches = [rng.permutation(4000)[:16] for _ in range(100)]
    sizes = {"width": 768, "head_width": 64, "parts": 4, "accumulate": 1, "shapes": 4}
    packer, saving = choose(lengths, texts, batches, [40] * 100, **sizes)

    def work(rows, length):
        return rows * length * (1 + length / (3 * 768))

    alone, made = work(4, visual + 40) + work(4, 40), list(map(packer, batches))
    each = [
        alone if packing is None else sum(work(*part.segment.shape[1:]) for part in packing.values())
        for packing in made
    ]
    assert saving.factor == pytest.approx(100 * alone / sum(each), rel=1e-9)
    assert (saving.factor == 1) == (made.count(None) == 100)

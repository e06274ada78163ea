"""LaVIN's own numbers, as its authors' code runs and with the picture's own routing.

Features, losses of batches, rows and micro-batches, all 93 gradients, six steps, and generation with its positions.
The bounds are float32's rounding as tests/close.py counts it: fractions of the largest number compared, those that
shared/originals/README.md gives with room for a CPU that adds up in another order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from authors import arrays, group, off, worst
from close import assert_close
from lavin_model import LaVIN, part

from eim_jax.config import Decode, Losses
from eim_jax.generation import decode_state
from eim_jax.losses.objective import make_objective, normalisers
from eim_jax.training import partition
from eim_jax.training.assembly import assemble

ALL = list(range(8))


@functools.cache
def lavin(variant: str) -> LaVIN:
    return LaVIN(variant)


@pytest.fixture(params=["authors", "batch_first"])
def case(request):
    return lavin(request.param)


# Steps compile longest: as the authors' code runs in `make test`, with each picture's own routing beside it.
STEPS = ["authors", pytest.param("batch_first", marks=pytest.mark.exhaustive)]


@pytest.fixture(params=STEPS)
def stepped(request):
    return lavin(request.param)


def objective_of(case, **fields):
    """(trained leaves, batch) -> loss, jitted."""
    stage = case.stage(**fields)
    objective = make_objective(case.vlm, stage, Losses())

    @jax.jit
    def loss(trained, frozen, batch):
        params = partition.unflatten({**frozen, **trained})
        return objective(params, batch, {}, normalisers(case.vlm, stage, batch), None)[0]

    return lambda batch: loss(case.start, case.frozen, batch)


def test_features_and_visual_tokens_are_theirs(case):
    batch, pictured = case.rows(ALL), np.asarray(case.rows(ALL).has_image)

    @jax.jit
    def see(params):
        seen = case.vlm.encode_image(params, batch.image, has_image=batch.has_image)
        return seen, case.vlm.connect(params, seen)

    seen, connected = see(case.tree)
    assert_close(seen[pictured], case.held["clip_features"][pictured], 2e-6)
    assert_close(connected[pictured], case.held["visual_tokens"][pictured], 2e-6)  # sums over the features' errors
    # The two routings give different features of the same pictures: by 3 of 16 here.
    other = arrays(case.folder / ("batch_first.npz" if case.variant == "authors" else "authors.npz"))
    assert off(seen[pictured], other["clip_features"][pictured]) > 1


def test_logits_losses_and_all_gradients_are_theirs(case):
    batch, stage = case.rows(ALL), case.stage()
    objective = make_objective(case.vlm, stage, Losses())

    @jax.jit
    def run(trained, frozen):
        def loss(trained):
            params = partition.unflatten({**frozen, **trained})
            return objective(params, batch, {}, normalisers(case.vlm, stage, batch), None)[0]

        params = partition.unflatten({**frozen, **trained})
        visual = case.vlm.connect(params, case.vlm.encode_image(params, batch.image, has_image=batch.has_image))
        logits = case.vlm.token_logits(params, visual, batch.tokens, batch.valid, has_image=batch.has_image)
        return logits, *jax.value_and_grad(loss)(trained)

    logits, loss, slopes = run(case.start, case.frozen)
    scored = np.asarray(batch.supervised)
    assert_close(np.asarray(logits)[:2][scored[:2]], case.held["logits_scored_rows_0_1"], 2e-6)
    assert_close(loss, case.held["loss"], 5e-7)
    assert worst(slopes, case.saved("grad_8")) <= 5e-6


def test_the_loss_of_each_row_and_of_each_four_is_theirs(case):
    batch, loss = case.rows(ALL), objective_of(case)
    each = [loss(part(batch, [row])) for row in ALL]
    assert_close(each, case.held["row_loss"], 5e-7)
    fours = [loss(part(batch, rows)) for rows in (ALL[:4], ALL[4:])]
    assert_close(fours, case.held["loss_of_fours"], 5e-7)


def gradient(case, batch, **fields):
    """What the optimizer is given by one step: its first moment at b1 = 0."""
    stage = case.stage(batch=8, b1=0.0, warmup_steps=0, **fields)
    made = assemble(case.vlm, stage, Losses(), case.params, 6, lambda kind: None)
    trained = jax.tree.map(jnp.copy, made.trained)
    _, state, metrics = made.step(trained, made.init_state(), made.frozen, batch, {}, jax.random.key(0), jnp.int32(0))
    moments = {}
    for _, found in optax.tree_utils.tree_get_all_with_path(state, "mu"):
        moments |= {path: leaf for path, leaf in found.items() if path in made.trained and hasattr(leaf, "shape")}
    assert moments.keys() == made.trained.keys()
    return metrics, moments


def theirs_accumulated(case, size: int) -> dict:
    """The leaves whose accumulated gradients are kept: LLaMA's adapters, projector and modality."""
    held = group(case.held, f"grad_{size}")
    whole = case.leaves({**group(case.held, "grad_8"), **held})
    return {path: leaf for path, leaf in whole.items() if not path.startswith("visual/")}


# A micro-batch takes every accumulate-th row; theirs takes neighbours.
FOURS = [0, 4, 1, 5, 2, 6, 3, 7]


def test_micro_batches_of_four_give_their_accumulated_gradient(stepped):
    case = stepped
    metrics, slopes = gradient(case, part(case.rows(ALL), FOURS), accumulate=2, loss_mean="microbatch")
    expected = theirs_accumulated(case, 4)
    assert worst({path: slopes[path] for path in expected}, expected) <= 5e-6
    assert_close(metrics["loss"], case.held["loss_of_fours"].mean(), 5e-7)


def test_the_mean_of_rows_gives_the_gradient_of_micro_batches_of_one():
    """LaVIN lite's, in one part; its size is what the choice of the mean is about."""
    case = lavin("batch_first")
    expected = theirs_accumulated(case, 1)
    _, rows = gradient(case, case.rows(ALL), loss_mean="rows")
    assert worst({path: rows[path] for path in expected}, expected) <= 5e-6
    tokens = case.saved("grad_8")
    whole = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in tokens.values()))
    gap = np.sqrt(sum(float(jnp.sum((rows[path] - tokens[path]) ** 2)) for path in rows))
    assert 0.2 < gap / whole < 1


@pytest.mark.exhaustive
def test_micro_batches_of_one_are_the_mean_of_rows_and_parts_of_the_tokens_mean_are_the_whole():
    case = lavin("batch_first")
    expected = theirs_accumulated(case, 1)
    _, ones = gradient(case, case.rows(ALL), accumulate=8, loss_mean="microbatch")
    assert worst({path: ones[path] for path in expected}, expected) <= 5e-6
    _, tokens = gradient(case, case.rows(ALL), accumulate=2)
    assert worst(tokens, case.saved("grad_8")) <= 5e-6


def test_six_steps_end_at_their_leaves(stepped):
    case = stepped
    stage = case.stage()
    rates = partition.learning_rate(stage, 6)
    assert_close([rates(i) for i in range(6)], case.held["train_lrs"], 1e-6)
    made = assemble(case.vlm, stage, Losses(), case.params, 6, lambda kind: None)
    trained, state, losses = jax.tree.map(jnp.copy, made.trained), made.init_state(), []
    whole = case.rows(ALL)
    for i in range(6):
        batch = part(whole, ALL[4 * (i % 2) :][:4])
        trained, state, metrics = made.step(trained, state, made.frozen, batch, {}, jax.random.key(0), jnp.int32(i))
        losses.append(metrics["loss"])
    assert_close(losses, case.held["train_losses"], 5e-7)
    # The authors' run saved its checkpoint after these three epochs of two steps.
    after = case.checkpoint("checkpoint-2.pth") if case.variant == "authors" else case.saved("after_6_steps")
    assert worst(trained, after) <= 2e-6
    assert worst(trained, case.start) > 5e-3


@pytest.mark.parametrize("rows", ["picture", "text", "mixed"])
def test_generated_tokens_and_logits_are_theirs_with_their_positions(case, rows):
    theirs = group(arrays(case.folder / "generate.npz"), f"{case.variant}/{rows}")
    ours, batch, read = _generated(case, theirs, Decode(rope="lavin"))
    assert_close(ours, theirs["logits"], 2e-6)
    np.testing.assert_array_equal(ours.argmax(-1), theirs["tokens"])
    for i in range(len(batch.tokens)):
        index = theirs[f"rope_index_row{i}"]
        before, steps = index[1:-4], np.asarray(read.last_position)[i] + 1 + np.arange(4)
        np.testing.assert_array_equal(np.asarray(read.positions)[i][np.asarray(read.valid)[i]], before)
        np.testing.assert_array_equal(steps, index[-4:])


@pytest.mark.parametrize("rows", ["picture", "text"])
def test_generation_by_default_is_the_training_forward(case, rows):
    theirs = group(arrays(case.folder / "generate.npz"), f"{case.variant}/{rows}")
    ours, _, _ = _generated(case, theirs, Decode())
    assert_close(ours[0], theirs["logits_of_training_forward"], 2e-6)
    assert 0.1 < off(ours[:, 1:], theirs["logits"][:, 1:]) < 1  # what a position too low does


def _read(case, rows, settings):
    vlm, batch = case.vlm.in_generation(settings), case.prompts(rows)

    @jax.jit
    def read(tree):
        visual = vlm.connect(tree, vlm.encode_image(tree, batch.image, has_image=batch.has_image))
        how = {"visual": visual, "has_image": batch.has_image, "generating": True}
        return vlm.lm_input(tree, batch.tokens, batch.valid, **how)

    return batch, read(case.tree)


def _generated(case, theirs, settings):
    """The logits of four new tokens [rows 4 V], each after their tokens before it."""
    batch, read = _read(case, theirs["rows"].tolist(), settings)
    lm, params = case.vlm.lm, case.tree["lm"]
    logits, cache = jax.jit(lambda params, read: decode_state.prefill(lm, params, read, 3, None))(params, read)
    state, found = decode_state.begin(cache, read.last_position, 4), [logits]
    step = jax.jit(functools.partial(decode_state.advance, lm, mesh=None))
    for i in range(3):
        state = state._replace(last=jnp.asarray(theirs["tokens"][:, i]))
        logits, state = step(params, state=state, steer=read.steer)
        found.append(logits)
    return np.stack(found, axis=1), batch, read


def test_a_scale_is_a_factor_of_what_the_adapters_add():
    """scale 2 is the adapter whose second maps and their biases are twice as large."""
    case = lavin("batch_first")
    batch = case.rows([0, 1])
    double = {path: 2 * leaf if "/up/" in path and "adapter" in path else leaf for path, leaf in case.params.items()}
    lm = case.vlm.lm.clone(config=dataclasses.replace(case.vlm.lm.config, adapter=_twice(case.vlm.lm)))
    visual = case.vlm.visual.clone(config=dataclasses.replace(case.vlm.visual.config, adapter=_twice(case.vlm.visual)))

    @functools.partial(jax.jit, static_argnums=0)
    def logits(vlm, flat):
        tree = partition.unflatten(flat)
        seen = vlm.connect(tree, vlm.encode_image(tree, batch.image))
        return vlm.token_logits(tree, seen, batch.tokens, batch.valid, has_image=batch.has_image)

    scaled = logits(dataclasses.replace(case.vlm, lm=lm, visual=visual), case.params)
    assert_close(scaled, logits(case.vlm, double))
    assert off(scaled, logits(case.vlm, case.params)) > 0.1


def _twice(tower):
    return dataclasses.replace(tower.config.adapter, scale=2.0)

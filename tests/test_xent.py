"""loss_base without its logits: exact, on every mesh, and never a float32 logit for every position at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from eim_jax.losses.next_token import head_xent
from eim_jax.parallel.sharding import make_mesh

B, T, WIDTH, VOCAB = 8, 7, 16, 53
MESHES = {"none": None, "(1, 8, 1)": (1, 8, 1), "(2, 2, 2)": (2, 2, 2)}


def problem(seed=0, share=0.4):
    """hidden [b t d], head [V d], targets, mask: as float64 NumPy and integers; one row has nothing supervised."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < share
    mask[2] = False
    return rng.normal(size=(B, T, WIDTH)), rng.normal(size=(VOCAB, WIDTH)), rng.integers(0, VOCAB, (B, T)), mask


def plain_xent(hidden, head, targets, mask):
    """The sum from all logits at once, in float32, for autodiff."""
    logits = jnp.where(mask[..., None], jnp.einsum("btd,vd->btv", hidden, head), 0).astype(jnp.float32)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - own, 0))


def oracle(hidden, head, targets, mask):
    """The sum and its gradients, float64."""
    scores = hidden @ head.T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    own = np.eye(VOCAB)[targets]
    slope = (p - own) * mask[..., None]
    loss = -np.log((p * own).sum(-1))[mask].sum()
    return loss, slope @ head, np.einsum("btv,btd->vd", slope, hidden)


def both(hidden, head, targets, mask, vocab_axis=0, factor=0.25, **options):
    """(sum, count), gradients of factor x sum towards hidden [b t d] and head [V d]; head is given as [V d]."""
    head = jnp.asarray(head if vocab_axis == 0 else np.asarray(head).T)

    def loss(hidden, head):
        total, count = head_xent(
            hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(mask), vocab_axis=vocab_axis, **options
        )
        return factor * total, (total, count)

    (to_hidden, to_head), found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(jnp.asarray(hidden), head)
    return found, to_hidden, to_head if vocab_axis == 0 else to_head.T


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize(("chunk", "vocab_axis"), [(0, 0), (3, 1), (1, 0), (100, 1)])
def test_sum_and_gradients_are_those_of_float64_on_every_mesh(shape, chunk, vocab_axis):
    hidden, head, targets, mask = problem()
    mesh = make_mesh(shape) if shape else None
    inputs = hidden.astype(np.float32), head.astype(np.float32), targets, mask
    (total, count), to_hidden, to_head = both(*inputs, vocab_axis, chunk=chunk, mesh=mesh)
    loss, expected_hidden, expected_head = oracle(hidden, head, targets, mask)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, loss, rtol=1e-6)
    assert count == mask.sum()
    assert_close(to_hidden, 0.25 * expected_hidden, 2e-6)
    assert_close(to_head, 0.25 * expected_head, 2e-6)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_a_mask_of_floats_weighs_each_position(shape):
    """Each row's own mean: a weight of one over its supervised positions."""
    hidden, head, targets, mask = problem()
    weight = (mask / np.maximum(mask.sum(1, keepdims=True), 1)).astype(np.float32)
    mesh = make_mesh(shape) if shape else None
    inputs = hidden.astype(np.float32), head.astype(np.float32), targets, weight
    (total, count), to_hidden, to_head = both(*inputs, chunk=3, mesh=mesh)
    rows = [oracle(hidden[[row]], head, targets[[row]], mask[[row]]) for row in range(B) if mask[row].any()]
    number = mask.sum(1)[mask.any(1)]
    np.testing.assert_allclose(total, sum(loss / n for (loss, _, _), n in zip(rows, number, strict=True)), rtol=1e-6)
    np.testing.assert_allclose(count, mask.any(1).sum(), rtol=1e-6)
    expected = np.zeros_like(hidden)
    expected[mask.any(1)] = np.concatenate([slope / n for (_, slope, _), n in zip(rows, number, strict=True)])
    assert_close(to_hidden, 0.25 * expected, 2e-6)
    assert_close(to_head, 0.25 * sum(slope / n for (_, _, slope), n in zip(rows, number, strict=True)), 2e-6)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_capped_logits_give_the_sum_and_gradients_of_float64(shape):
    """z = cap tanh(x / cap) of the product x, whose derivative is 1 - (z / cap)^2."""
    cap, (hidden, head, targets, mask) = 1.5, problem(7)
    mesh = make_mesh(shape) if shape else None
    capped = cap * np.tanh(hidden @ head.T / cap)
    p = np.exp(capped) / np.exp(capped).sum(-1, keepdims=True)
    own = np.eye(VOCAB)[targets]
    slope = 0.25 * (p - own) * (1 - (capped / cap) ** 2) * mask[..., None]
    arrays = hidden.astype(np.float32), head.astype(np.float32), targets, mask
    (total, _), to_hidden, to_head = both(*arrays, mesh=mesh, chunk=3, cap=cap)
    assert_close(total, -np.log((p * own).sum(-1))[mask].sum(), 1e-5)
    assert_close(to_hidden, slope @ head, 1e-5)
    assert_close(to_head, np.einsum("btv,btd->vd", slope, hidden), 1e-5)


def test_gradients_agree_with_autodiff_through_the_logits():
    hidden, head, targets, mask = problem(1)
    hidden, head = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    targets, mask = jnp.asarray(targets), jnp.asarray(mask)

    def plain(hidden, head):
        return plain_xent(hidden, head, targets, mask)

    def fused(hidden, head):
        return head_xent(hidden, head, targets, mask, chunk=5)[0]

    np.testing.assert_allclose(fused(hidden, head), plain(hidden, head), rtol=1e-6)
    for mine, theirs in zip(*(jax.grad(f, (0, 1))(hidden, head) for f in (fused, plain)), strict=True):
        assert_close(mine, theirs, 1e-6)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_what_is_not_supervised_may_be_anything(shape):
    hidden, head, targets, mask = problem(2)
    hidden, head = hidden.astype(np.float32), head.astype(np.float32)
    mesh = make_mesh(shape) if shape else None
    clean = both(hidden, head, targets, mask, chunk=4, mesh=mesh)
    spoilt = np.where(mask[..., None], hidden, np.where(np.arange(T)[None, :, None] % 2, np.nan, np.inf))
    jax.tree.map(np.testing.assert_array_equal, both(spoilt, head, targets, mask, chunk=4, mesh=mesh), clean)
    assert not np.asarray(clean[1])[~mask].any()


@pytest.mark.parametrize("chunk", [0, 4])
def test_with_nothing_supervised_sum_count_and_gradients_are_zero(chunk):
    hidden, head, targets, mask = problem()
    (total, count), *gradients = both(
        np.full(hidden.shape, np.nan, np.float32), head.astype(np.float32), targets, mask & False, chunk=chunk
    )
    assert total == 0 and count == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_bfloat16_products_add_up_in_float32_and_the_head_keeps_a_float32_gradient(shape):
    hidden, head, targets, mask = problem(3)
    rounded = jnp.asarray(hidden, jnp.bfloat16)
    held = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    loss, expected_hidden, expected_head = oracle(np.asarray(rounded, np.float64), held.astype(float), targets, mask)
    mesh = make_mesh(shape) if shape else None
    (total, _), to_hidden, to_head = both(rounded, held, targets, mask, chunk=5, mesh=mesh)
    assert (to_hidden.dtype, to_head.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(total, loss, rtol=1e-5)  # the logits and the softmax are float32
    for mine, theirs in ((to_hidden, expected_hidden), (to_head, expected_head)):
        error = np.linalg.norm(np.asarray(mine, np.float64) - 0.25 * theirs)
        assert error < 2**-8 * 0.25 * np.linalg.norm(theirs)  # bfloat16 rounds by at most 2^-9


def test_micro_batches_add_up_to_the_whole_batch():
    hidden, head, targets, mask = problem(4)
    hidden, head = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    micro = jax.tree.map(
        lambda x: x.reshape(4, B // 4, *x.shape[1:]), (hidden, jnp.asarray(targets), jnp.asarray(mask))
    )

    def loss(head, hidden, targets, mask):
        return head_xent(hidden, head, targets, mask, chunk=3)[0]

    @jax.jit
    def accumulated(head):
        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(head, *part)), None

        return jax.lax.scan(add, (jnp.float32(0), jnp.zeros_like(head)), micro)[0]

    value, gradient = accumulated(head)
    expected = jax.value_and_grad(loss)(head, hidden, jnp.asarray(targets), jnp.asarray(mask))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert_close(gradient, expected[1], 1e-5)


def shaped(b, t, width, vocab):
    make = jax.ShapeDtypeStruct
    hidden, head = make((b, t, width), jnp.float32), make((vocab, width), jnp.float32)
    return hidden, head, make((b, t), jnp.int32), make((b, t), jnp.bool_)


def loss_of(hidden, head, targets, mask, mesh=None, chunk=0):
    return head_xent(hidden, head, targets, mask, mesh=mesh, chunk=chunk)[0]


def plain_of(hidden, head, targets, mask):
    return plain_xent(hidden, head, targets, mask)


def test_no_float32_array_of_the_compiled_program_is_as_large_as_the_logits():
    arguments = shaped(8, 256, 64, 50257)
    logits = 8 * 256 * 50257
    fused = jax.jit(jax.grad(loss_of, (0, 1))).lower(*arguments).compile()
    plain = jax.jit(jax.grad(plain_of, (0, 1))).lower(*arguments).compile()

    def largest(compiled):
        return max(int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"f32\[([\d,]+)\]", compiled))

    assert largest(plain.as_text()) >= logits  # what the search would find
    assert largest(fused.as_text()) <= logits / 6
    assert plain.memory_analysis().temp_size_in_bytes > 4 * logits
    assert fused.memory_analysis().temp_size_in_bytes < 4 * logits / 2


def test_a_frozen_head_gets_no_gradient_of_its_size():
    arguments = shaped(4, 8, 128, 4096)

    def compiled(which):
        return jax.jit(jax.grad(functools.partial(loss_of, chunk=8), which)).lower(*arguments).compile()

    size, matrix = 4 * 4096 * 128, re.compile(r"f32\[4096,128\]\S* (?!parameter|get-tuple|copy)[\w-]+\(")
    frozen, both = compiled(0), compiled((0, 1))
    assert matrix.search(both.as_text()) and not matrix.search(frozen.as_text())
    assert frozen.memory_analysis().temp_size_in_bytes < size <= both.memory_analysis().temp_size_in_bytes


def test_collectives_on_a_mesh_stand_outside_the_chunks_but_for_rows_of_scalars():
    """Inside the loop only [chunk, 1] moves (over "tensor"); the head and its gradient move once."""
    mesh = make_mesh((2, 2, 2))
    step = jax.grad(functools.partial(loss_of, mesh=mesh, chunk=2), (0, 1))
    text = jax.jit(step).lower(*shaped(8, 8, 32, 4096)).compile().as_text()
    loop = set(re.findall(r"body=%?([\w.-]+)", text))
    sizes = {True: [0], False: [0]}
    for block in re.split(r"\n(?=\S)", text):
        inside = any(block.lstrip("%").startswith(name) for name in loop)
        for line in re.findall(r".* (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", block):
            for dims in re.findall(r"\w+\[([\d,]*)\]", line.split("=")[1]):
                sizes[inside].append(int(np.prod([int(n) for n in dims.split(",") if n])))
    assert loop and 0 < max(sizes[True]) <= 2  # positions of a chunk
    assert max(sizes[False]) >= 4096 // 2 * 32 // 2  # the head's gradient, at least a device's part of it


@pytest.mark.parametrize(
    ("change", "words"), [({"head": (VOCAB, 9)}, "16 wide"), ({"rows": 6, "mesh": (1, 8, 1)}, "6 rows do not divide")]
)
def test_shapes_that_cannot_be_meant_are_refused(change, words):
    rows = change.get("rows", B)
    mesh = make_mesh(change["mesh"]) if "mesh" in change else None
    with pytest.raises(ValueError, match=words):
        head_xent(
            jnp.zeros((rows, T, WIDTH)),
            jnp.zeros(change.get("head", (VOCAB, WIDTH))),
            jnp.zeros((rows, T), jnp.int32),
            jnp.ones((rows, T), bool),
            mesh=mesh,
        )

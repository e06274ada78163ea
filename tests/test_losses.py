"""The one-pass queue loss against float64 NumPy and plain autodiff, on one device and on meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, size_of
from hypothesis import given, settings
from hypothesis import strategies as st

from eim_jax.losses import online_softmax
from eim_jax.losses.contrastive import NCE, queue_nce
from eim_jax.losses.queues import compress
from eim_jax.parallel.sharding import batch_sharding, make_mesh, queue_sharding

MODES = ("self", "group", "mask")
MESHES = {"1": (1, 1, 1), "data8": (8, 1, 1), "2x2x2": (2, 2, 2), "fsdp8": (1, 8, 1)}


def problem(b=5, n=23, d=7, pad=0, seed=0, unit=True):
    """Random queries, keys, own rows, weights with a zero, and groups of about three keys."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(n, d))
    if unit:
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    keys = np.concatenate([keys, np.zeros((pad, d))]).astype(np.float32)
    groups = np.concatenate([np.sort(rng.integers(0, max(1, n // 3), n)), np.full(pad, -1)]).astype(np.int32)
    weights = rng.uniform(0.5, 2, b).astype(np.float32)
    weights[b // 2] = 0
    return dict(
        query=rng.normal(size=(b, d)).astype(np.float32),
        keys=keys,
        index=rng.integers(0, n, b).astype(np.int32),
        weights=weights,
        groups=groups,
        count=n,
    )


def oracle(query, keys, index, weights, groups, count, tau=0.07, similarity="cosine", positives="self"):
    """Loss sums, diagnostics and d loss / d query in float64, from the definition."""
    q, k = query.astype(np.float64), np.asarray(keys[:count]).astype(np.float64)
    groups, b = groups[:count], len(q)
    length = np.linalg.norm(q, axis=1, keepdims=True) if similarity == "cosine" else np.ones((b, 1))
    unit = q / np.where(length > 0, length, 1)
    scores = unit @ k.T / tau
    own = np.arange(count) == index[:, None]
    same = groups == groups[index][:, None]
    positive = same if positives == "group" else own
    logits = np.where(same & ~own, -np.inf, scores) if positives == "mask" else scores

    def lse(x):
        top = x.max(1, keepdims=True)
        return top[:, 0] + np.log(np.exp(x - top).sum(1))

    p = np.exp(logits - lse(logits)[:, None])
    inside = np.where(positive, scores, -np.inf)
    r = np.exp(inside - lse(inside)[:, None])
    loss = lse(logits) - lse(inside)
    du = (p - r) @ k / tau
    if similarity == "cosine":
        du = (du - unit * (du * unit).sum(1, keepdims=True)) / np.where(length > 0, length, 1)
        du = np.where(length > 0, du, 0)
    score = scores[own]
    tolerance = 1e-6 * np.linalg.norm(unit, axis=1) * np.linalg.norm(k[index], axis=1) / tau
    rivals = (~own if positives == "self" else ~same) & (scores >= (score - tolerance)[:, None])
    rank = 1 + rivals.sum(1)
    w = weights.astype(np.float64)
    rows = NCE(loss, np.ones(b), rank == 1, rank, score * tau, 1 / (p * p).sum(1))
    return NCE(*((w * x).sum() for x in rows)), w[:, None] * du


def run(query, keys, index, weights, groups, count, mesh=None, dtype=jnp.float32, **options):
    """The same by queue_nce, inside an outer jit whose batch is sharded over ("data", "fsdp") when there is a mesh."""
    keys = jnp.asarray(keys).astype(dtype)
    if mesh is not None:
        query, index, weights = jax.device_put((query, index, weights), batch_sharding(mesh))
        keys, groups = jax.device_put((keys, groups), queue_sharding(mesh))

    @jax.jit
    def value_and_grad(query, keys, index, weights, groups):
        def loss(query):
            nce = queue_nce(query, keys, index, count=count, weights=weights, groups=groups, mesh=mesh, **options)
            return nce.loss, nce

        return jax.value_and_grad(loss, has_aux=True)(query)

    (_, nce), gradient = value_and_grad(query, keys, index, weights, groups)
    return jax.device_get((nce, gradient))


def assert_agree(got, wanted, tolerance=1e-5):
    """All are sums over the rows of differences (scores, averages of keys) that count as the row's weight or more."""
    (nce, gradient), (nce_wanted, gradient_wanted) = got, wanted
    rows = float(nce_wanted.weight)
    for field, a, b in zip(NCE._fields, nce, nce_wanted, strict=True):
        assert_close(a, b, tolerance, size=max(rows, size_of(b)), rtol=tolerance, err_msg=field)
    size = max(rows, size_of(gradient_wanted))
    assert_close(gradient, gradient_wanted, tolerance, size=size, rtol=tolerance, err_msg="gradient")


@pytest.mark.parametrize("chunk", [1, 4, 23, 1024])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("positives", MODES)
def test_value_gradient_and_diagnostics_match_float64(positives, similarity, chunk):
    data = problem(unit=similarity == "cosine")
    options = dict(tau=0.07 if similarity == "cosine" else 1.0, positives=positives, similarity=similarity)
    assert_agree(run(**data, **options, chunk=chunk), oracle(**data, **options))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("positives", MODES)
def test_gradient_matches_plain_autodiff(positives, similarity):
    data = problem(seed=3)

    def naive(query):
        q = query / jnp.linalg.norm(query, axis=1, keepdims=True) if similarity == "cosine" else query
        s = q @ data["keys"].T / 0.2
        own = jnp.arange(data["count"])[None, :] == data["index"][:, None]
        same = jnp.asarray(data["groups"])[None, :] == data["groups"][data["index"]][:, None]
        positive = jax.nn.logsumexp(s, axis=1, where=same if positives == "group" else own)
        everyone = (
            jax.nn.logsumexp(s, axis=1, where=~same | own) if positives == "mask" else jax.nn.logsumexp(s, axis=1)
        )
        return jnp.sum(data["weights"] * (everyone - positive))

    value, gradient = jax.value_and_grad(naive)(data["query"])
    nce, got = run(**data, tau=0.2, positives=positives, similarity=similarity, chunk=5)
    np.testing.assert_allclose(nce.loss, value, rtol=1e-6)
    assert_close(got, gradient, 1e-6, rtol=1e-5)


@pytest.mark.parametrize("positives", MODES)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_sharded_equals_single_device(shape, positives):
    mesh = make_mesh(shape, jax.devices()[: np.prod(shape)])
    data = problem(b=8, n=37, d=16, pad=3, seed=1)
    data["index"][0], data["index"][1] = 0, 36
    single = run(**data, positives=positives, chunk=4)
    assert_agree(single, oracle(**data, positives=positives))
    assert_agree(run(**data, positives=positives, chunk=4, mesh=mesh), single, 1e-6)


@pytest.mark.parametrize("positives", MODES)
def test_devices_that_hold_only_padding_change_nothing(positives):
    data = problem(n=3, pad=13)
    mesh = make_mesh((1, 8, 1))
    data = {
        **data,
        **{name: np.resize(data[name], (8, *data[name].shape[1:])) for name in ("query", "index", "weights")},
    }
    assert_agree(run(**data, positives=positives, mesh=mesh), oracle(**data, positives=positives))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("positives", MODES)
def test_sharded_loss_moves_queries_and_sums_but_never_keys(positives, dtype):
    b, n, d = 8, 8 * 64, 16
    mesh = make_mesh((2, 4, 1))
    data = problem(b=b, n=n, d=d)
    loss = functools.partial(queue_nce, count=n, positives=positives, mesh=mesh, chunk=16)

    @jax.jit
    def gradient(query, keys, index, groups):
        return jax.value_and_grad(lambda q: loss(q, keys, index, groups=groups).loss)(query)

    query, index = jax.device_put((data["query"], data["index"]), batch_sharding(mesh))
    keys, groups = jax.device_put((data["keys"].astype(dtype), data["groups"]), queue_sharding(mesh))
    text = gradient.lower(query, keys, index, groups).compile().as_text()
    assert set(collectives(text)) <= {"all-reduce", "all-gather"}
    assert max(collectives(text).values()) <= b * d


def collectives(text: str) -> dict[str, int]:
    """Compiled HLO -> collective: elements of its largest result, tuples' members each."""
    largest: dict[str, int] = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            size = int(np.prod([int(x) for x in dims.split(",") if x], initial=1))
            largest[kind] = max(size, largest.get(kind, 0))
    assert largest, "no collective found: has the text format changed?"
    return largest


@pytest.mark.parametrize("positives", MODES)
@pytest.mark.parametrize("query", [0.0, np.nan, np.inf], ids=["zero", "nan", "inf"])
def test_a_row_of_weight_zero_gives_no_loss_and_no_gradient_whatever_its_query(query, positives):
    data = problem()
    out = np.flatnonzero(data["weights"] == 0)
    data["query"][out] = 1.0
    wanted = run(**data, positives=positives)
    data["query"][out] = query
    got = run(**data, positives=positives)
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])
    assert not got[1][out].any()


def test_a_batch_without_a_counted_row_gives_zeros():
    data = problem()
    data["weights"][:] = 0
    nce, gradient = run(**data)
    assert not np.any(nce) and not gradient.any()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_counted_zero_query_has_loss_log_n(similarity):
    data = problem()
    data["query"][:] = 0
    data["weights"][:] = 1
    nce, gradient = run(**data, similarity=similarity)
    np.testing.assert_allclose(nce.loss / nce.weight, np.log(data["count"]), rtol=1e-6)
    np.testing.assert_allclose(nce.effective / nce.weight, data["count"], rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("positives", MODES)
def test_logits_of_ten_thousand_stay_finite_and_exact(positives):
    data = problem(unit=False, d=16, seed=5)
    scores = data["query"] @ data["keys"].T
    tau = float(np.abs(scores).max() / 1e4)
    got = run(**data, tau=tau, similarity="dot", positives=positives, chunk=6)
    wanted = oracle(**data, tau=tau, similarity="dot", positives=positives)
    assert np.isfinite(got[1]).all()
    assert_agree(got, wanted, 2e-5)


def test_alone_is_the_distance_to_the_own_key_whatever_the_others_are():
    query, keys, index = (jax.random.normal(jax.random.key(0), (3, 8)), _unit_rows(1, 20, 8), jnp.array([4, 0, 19]))

    def plain(query):
        q = query / jnp.linalg.norm(query, axis=1, keepdims=True)
        return jnp.sum(1 - jnp.sum(q * keys[index], axis=1)) / 0.07

    def ours(query, keys=keys):
        return queue_nce(query, keys, index, count=20, positives="alone", chunk=8).loss

    np.testing.assert_allclose(ours(query), plain(query), rtol=1e-5)
    assert_close(jax.grad(ours)(query), jax.grad(plain)(query), 1e-4, rtol=1e-4)
    others = keys.at[1:4].set(-keys[1:4])
    assert ours(query, others) == ours(query)
    with pytest.raises(ValueError, match="cosine"):
        queue_nce(query, keys, index, count=20, positives="alone", similarity="dot")


def _unit_rows(seed, number, width):
    rows = jax.random.normal(jax.random.key(seed), (number, width))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def test_duplicate_keys_share_the_probability_and_count_against_the_rank():
    data = problem(b=1, n=23)
    data["weights"][:] = 1
    data["keys"][[4, 9, 22]] = data["keys"][4]
    data["query"] = data["keys"][[4]].copy()
    data["index"][:] = 4
    nce, gradient = run(**data, tau=0.01, chunk=5)
    assert nce.rank == 3 and nce.recall1 == 0
    np.testing.assert_allclose(nce.loss, np.log(3), rtol=1e-4)
    np.testing.assert_allclose(nce.effective, 3, rtol=1e-4)
    assert_agree((nce, gradient), oracle(**data, tau=0.01))


def test_siblings_do_not_compete_for_the_rank_under_group_and_mask():
    data = problem(b=1, n=23)
    data["weights"][:], data["groups"][:] = 1, np.arange(23)
    data["keys"][[4, 9]] = data["keys"][4]
    data["groups"][9] = 4
    data["query"], data["index"][:] = data["keys"][[4]].copy(), 4
    ranks = {mode: run(**data, positives=mode)[0].rank for mode in MODES}
    assert ranks == {"self": 2, "group": 1, "mask": 1}


@pytest.mark.parametrize("pad", [1, 9])
@pytest.mark.parametrize("positives", MODES)
def test_padding_is_invisible(positives, pad):
    plain, padded = problem(), problem(pad=pad)
    padded["keys"][-pad:] = 100.0
    padded["groups"][-pad:] = padded["groups"][0]
    assert_agree(run(**padded, positives=positives, chunk=4), run(**plain, positives=positives, chunk=4), 1e-6)


@pytest.mark.parametrize("on_cpu", [True, False], ids=["widened", "halves"])
@pytest.mark.parametrize("positives", MODES)
def test_bfloat16_keys_give_the_loss_of_the_rounded_keys(positives, on_cpu, monkeypatch):
    """Both forms of the products: f32 chunks on CPU, and pairs of bf16 halves for matrix units."""
    products = online_softmax._products
    monkeypatch.setattr(online_softmax, "_products", lambda u, dtype, _: products(u, dtype, on_cpu))
    data = problem(d=16)
    data["keys"] = np.asarray(jnp.asarray(data["keys"]).astype(jnp.bfloat16).astype(jnp.float32))
    got = run(**data, positives=positives, dtype=jnp.bfloat16, chunk=6)
    assert_agree(got, oracle(**data, positives=positives), 1e-5 if on_cpu else 2e-4)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["widened", "halves"])
@pytest.mark.parametrize("positives", MODES)
def test_int8_keys_give_the_loss_of_the_keys_that_the_codes_stand_for(positives, on_cpu, shape, monkeypatch):
    data = problem(b=8, n=24)
    codes, scale = compress(jnp.asarray(data.pop("keys")), "int8")
    products = online_softmax._products
    monkeypatch.setattr(online_softmax, "_products", lambda u, dtype, _: products(u, dtype, on_cpu))
    mesh = make_mesh(shape) if shape else None
    got = run(keys=codes, **data, dtype=jnp.int8, scale=scale, positives=positives, chunk=4, mesh=mesh)
    wanted = oracle(keys=np.asarray(codes, float) * np.asarray(scale, float)[:, None], **data, positives=positives)
    assert_agree(got, wanted, 1e-5 if on_cpu else 2e-4)


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.int8, None), (jnp.float32, jnp.ones(23))])
def test_int8_keys_and_their_scale_come_together(dtype, scale):
    data = problem()
    with pytest.raises(ValueError, match="int8 alone"):
        run(**data, dtype=dtype, scale=scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_beyond_the_keys_is_a_few_chunks_and_never_a_widened_copy(dtype):
    n, d, b, chunk = 16384, 64, 8, 128
    args = jnp.ones((b, d)), jnp.ones((n, d), dtype), jnp.arange(b)
    loss = functools.partial(queue_nce, count=n - 1, chunk=chunk)
    compiled = jax.jit(jax.value_and_grad(lambda q, k, i: loss(q, k, i).loss)).lower(*args).compile()
    copied = n * d * 2 if dtype == jnp.bfloat16 else 0  # XLA's CPU compiler cannot slice bf16 without it
    assert compiled.memory_analysis().temp_size_in_bytes < copied + 3 * 4 * (chunk * (d + b) + b * d)


@pytest.mark.parametrize("positives", MODES)
def test_micro_batches_add_up_to_the_batch(positives):
    data = problem(b=12, n=40, d=8)
    nce, gradient = run(**data, positives=positives)
    parts = []
    for rows in np.split(np.arange(12), 4):
        part = {**data, **{name: data[name][rows] for name in ("query", "index", "weights")}}
        parts.append(run(**part, positives=positives))
    summed = NCE(*(sum(values) for values in zip(*(part[0] for part in parts), strict=True)))
    assert_agree((summed, np.concatenate([part[1] for part in parts])), (nce, gradient), 1e-6)


def test_diagnostics_carry_no_gradient():
    data = problem()

    query, keys, index = (jnp.asarray(data[name]) for name in ("query", "keys", "index"))
    assert not jax.grad(lambda query: sum(queue_nce(query, keys, index, count=data["count"])[1:]))(query).any()


def test_tau_may_be_an_array_and_has_the_right_gradient():
    data = problem()

    args = [jnp.asarray(data[name]) for name in ("query", "keys", "index")]

    def value(tau):
        return queue_nce(*args, count=data["count"], weights=jnp.asarray(data["weights"]), tau=tau).loss

    step = 1e-3
    numeric = (oracle(**data, tau=0.5 + step)[0].loss - oracle(**data, tau=0.5 - step)[0].loss) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(jnp.float32(0.5)), numeric, rtol=1e-4)


def test_wrong_sizes_are_refused_with_what_to_do():
    data = problem()
    args = [jnp.asarray(data[name]) for name in ("query", "keys", "index")]
    with pytest.raises(ValueError, match="count=24"):
        queue_nce(*args, count=24)
    with pytest.raises(ValueError, match="groups="):
        queue_nce(*args, count=23, positives="group")
    with pytest.raises(ValueError, match="pad them"):
        queue_nce(*args, count=23, mesh=make_mesh((8, 1, 1)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_small_problems_match_float64(draw):
    b, n, d = (draw.draw(st.integers(1, top)) for top in (4, 12, 5))
    data = problem(b, n, d, pad=draw.draw(st.integers(0, 3)), seed=draw.draw(st.integers(0, 999)))
    options = dict(
        tau=draw.draw(st.sampled_from([0.05, 1.0])),
        similarity=draw.draw(st.sampled_from(["cosine", "dot"])),
        positives=draw.draw(st.sampled_from(MODES)),
    )
    chunk = draw.draw(st.integers(1, 15))
    assert_agree(run(**data, **options, chunk=chunk), oracle(**data, **options), 2e-5)

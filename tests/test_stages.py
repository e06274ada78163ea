"""A stage's objective and step: the right losses, exact accumulation, gradients for the trained leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_vlm
import tiny
from close import assert_close, assert_trees_close

from eim_jax.config import Losses, LossWeights, Stage
from eim_jax.losses.loss_lm import LAST_TOKENS
from eim_jax.losses.loss_st import EMBEDDINGS
from eim_jax.losses.objective import fields, make_objective, normalisers
from eim_jax.losses.table import queues_of
from eim_jax.models.batch import Batch
from eim_jax.training import partition
from eim_jax.training.assembly import assemble
from eim_jax.training.step import make_step

ALL = ("visual/prompt/.*", "st/.*", "lm/.*")


def stage(train=ALL, accumulate=1, **weights):
    return Stage(
        train=train,
        losses=LossWeights(**weights),
        batch=8,
        accumulate=accumulate,
        lr=1e-2,
        warmup_steps=0,
        schedule="constant",
    )


_compiled = {}


def run_step(vlm, params, one, batch, train=False, key=0, losses=None):
    found = partition.groups(one, params)
    trained, frozen = partition.split(params, found)
    tx = partition.optimizer(one, found, params, 10)
    objective = make_objective(vlm, one, losses or Losses())
    queues = {k: q for k, q in tiny.queues().items() if k in {kind.name for kind in queues_of(one)}}
    arguments = (trained, tx.init(params), frozen, batch, queues, jax.random.key(key), jnp.int32(0))
    program = (repr(vlm), repr(one), repr(losses), train, str(jax.tree.map(jnp.shape, arguments)))
    if program not in _compiled:
        _compiled[program] = jax.jit(make_step(vlm, one, objective, tx, train)).lower(*arguments).compile()
    return _compiled[program](*arguments), _compiled[program]


def nce(query, keys, index):
    """Mean queue loss by float64 NumPy."""
    query = np.asarray(query, np.float64)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    scores = query @ np.asarray(keys, np.float64).T / 0.07
    peak = scores.max(1, keepdims=True)
    return (np.log(np.exp(scores - peak).sum(1)) + peak[:, 0] - scores[np.arange(len(query)), index]).mean()


@pytest.fixture(scope="module")
def world():
    vlm, params = tiny.model()
    return vlm, params, tiny.batch(), tiny.queues()


def test_each_loss_is_the_papers_formula_on_its_own_query(world):
    vlm, params, batch, queues = world
    tree = partition.unflatten(params)
    objective = make_objective(vlm, stage(base=1.0, ie=2.0, st=3.0, lm=4.0), Losses())
    norms = normalisers(vlm, stage(base=1.0, ie=2.0, st=3.0, lm=4.0), batch)
    loss, metrics = objective(tree, batch, queues, norms, None)

    seen = vlm.encode_image(tree, batch.image)
    visual = vlm.connect(tree, seen)
    index = np.asarray(batch.index)
    ie = nce(vlm.visual.apply({"params": tree["visual"]}, seen[:, 0], method="project"), queues["caption"].keys, index)
    st = nce(np.asarray(visual).mean(1), queues["embed"].keys, index)
    hidden, last = np.asarray(vlm.lm_block(tree, batch.tokens, batch.valid)), np.asarray(batch.valid).sum(1) - 1
    lm = nce(hidden[np.arange(8), last], queues["hidden"].keys, index)
    # loss_base token by token: the whole sequence through the LM, the row before a token predicts it.
    text = vlm.embed(tree, batch.tokens)
    out, _ = vlm.lm.apply({"params": tree["lm"]}, jnp.concatenate([visual, text], 1), method="hidden")
    logits = np.asarray(vlm.logits(tree, out), np.float64)
    nll = []
    for b, t in zip(*np.nonzero(np.asarray(batch.supervised)), strict=True):
        row = logits[b, visual.shape[1] - 1 + t]
        nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[int(batch.tokens[b, t])])
    want = {"base": np.mean(nll), "ie": ie, "st": st, "lm": lm}
    for name, value in want.items():
        assert float(metrics[f"loss/{name}"]) == pytest.approx(value, rel=2e-5), name
    assert float(loss) == pytest.approx(want["base"] + 2 * ie + 3 * st + 4 * lm, rel=2e-5)


def test_accumulated_micro_batches_are_the_big_batch(world):
    vlm, params, batch, _ = world
    batch = tiny.batch(text_only=(1, 4, 5))  # micro-batches with different counts
    weights = {"base": 1.0, "ie": 1.0, "st": 1.0, "lm": 1.0}
    whole, _ = run_step(vlm, params, stage(**weights), batch)
    parts, _ = run_step(vlm, params, stage(accumulate=4, **weights), batch)
    gradients = {
        path: np.abs(leaf)
        for _, moments in optax.tree_utils.tree_get_all_with_path(whole[1], "mu")
        for path, leaf in moments.items()
        if isinstance(leaf, jax.Array)
    }
    assert gradients.keys() == whole[0].keys()
    for path, leaf in whole[0].items():
        # One Adam step turns the rounding of a gradient near zero (a keys' bias has no other) into a fraction of lr.
        sure = gradients[path] > 1e-3 * gradients[path].max()
        found, expected = np.asarray(parts[0][path])[sure], np.asarray(leaf)[sure]
        assert_close(found, expected, 2e-3, size=1e-2, rtol=1e-4, err_msg=path)
    for moment in ("mu", "nu"):
        found, expected = (
            [x for _, x in optax.tree_utils.tree_get_all_with_path(s[1], moment)] for s in (parts, whole)
        )
        assert expected
        assert_trees_close(found, expected, 2e-5, rtol=1e-4)
    for name, value in whole[2].items():
        assert_close(parts[2][name], value, 2e-5, size=max(abs(float(value)), 1.0), rtol=1e-4, err_msg=name)


def test_a_micro_batch_without_a_scored_token_adds_nothing_and_is_not_counted(world):
    """loss_mean="microbatch": the update is that of the others, where the originals' is NaN and skipped."""
    vlm, params, batch, _ = world
    silent = (jnp.arange(8) % 4 == 2)[:, None]  # the third of four micro-batches
    batch = batch._replace(supervised=batch.supervised & ~silent)
    kept = jax.tree.map(lambda x: x[jnp.asarray([0, 1, 3, 4, 5, 7])], batch)
    settings = {"losses": LossWeights(base=1.0), "loss_mean": "microbatch"}
    (_, state, metrics), _ = run_step(vlm, params, dataclasses.replace(stage(), **settings, accumulate=4), batch)
    (_, others, expected), _ = run_step(
        vlm, params, dataclasses.replace(stage(), **settings, accumulate=3, batch=6), kept
    )
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
    for found, one in ((s, t) for s, t in zip(jax.tree.leaves(state), jax.tree.leaves(others), strict=True) if s.ndim):
        assert_close(found, one, 2e-5, rtol=1e-4)
    nothing = batch._replace(supervised=jnp.zeros_like(batch.supervised))
    for mean in ("tokens", "rows", "microbatch"):
        one = dataclasses.replace(stage(), losses=LossWeights(base=1.0), loss_mean=mean, accumulate=4)
        (_, _, metrics), _ = run_step(vlm, params, one, nothing)
        assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("train", "weights"),
    [(("st/.*",), {"st": 1.0}), (("lm/.*",), {"lm": 1.0}), (ALL, {"base": 1.0, "ie": 1.0})],
    ids=["st", "lm", "ie"],
)
def test_a_step_returns_the_stages_own_leaves_only_and_changes_each_of_them(world, train, weights):
    vlm, params, batch, _ = world
    one = stage(train=train, **weights)
    (trained, opt_state, _), _ = run_step(vlm, params, one, batch)
    owned = {path for group in partition.groups(one, params) for path in group.paths}
    assert set(trained) == owned
    moments = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(params[path].size for path in owned)
    still = [path for path in owned if np.array_equal(trained[path], params[path])]
    # Positions past the batch's longest text get no gradient anywhere else either.
    assert not still


def test_the_st_stage_computes_no_language_model_and_the_lm_stage_no_vision(world):
    vlm, params, batch, _ = world
    flops = {}
    for name, train, weights in (
        ("st", ("st/.*",), {"st": 1.0}),
        ("lm", ("lm/.*",), {"lm": 1.0}),
        ("all", ALL, {"base": 1.0, "ie": 1.0, "st": 1.0, "lm": 1.0}),
    ):
        _, compiled = run_step(vlm, params, stage(train=train, **weights), batch)
        flops[name] = compiled.cost_analysis()["flops"]
    assert flops["st"] + flops["lm"] < 0.6 * flops["all"]
    needed = fields(stage(st=1.0), Losses())
    assert needed == {"index", "image", "has_image"}
    assert fields(stage(lm=1.0), Losses()) == {"index", "tokens", "valid"}


def test_frozen_weights_cost_no_gradient(world):
    vlm, params, batch, _ = world
    _, alone = run_step(vlm, params, stage(train=("st/.*",), base=1.0), batch)
    _, whole = run_step(vlm, params, stage(train=("st/.*", "lm/.*"), base=1.0), batch)
    # Backward through the LM to the ST remains; the LM's weight gradients, a third of its work, do not.
    assert alone.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]


def test_rows_without_an_image_leave_loss_ie_and_loss_st_untouched(world):
    vlm, params, _, queues = world
    batch = tiny.batch(text_only=(0, 3))
    one = stage(ie=1.0, st=1.0)
    objective = make_objective(vlm, one, Losses())
    tree = partition.unflatten(params)
    _, with_noise = objective(tree, batch, queues, normalisers(vlm, one, batch), None)
    kept = jax.tree.map(lambda x: x[jnp.asarray([1, 2, 4, 5, 6, 7])], batch)
    _, without = objective(tree, kept, queues, normalisers(vlm, one, kept), None)
    for name in ("loss/ie", "loss/st", "queue/st/rank"):
        assert float(with_noise[name]) == pytest.approx(float(without[name]), rel=1e-5)


def test_a_text_only_row_is_answered_as_by_the_language_model_alone(world):
    vlm, params, batch, _ = world
    tree = partition.unflatten(params)
    visual = vlm.connect(tree, vlm.encode_image(tree, batch.image))
    nobody = jnp.zeros(8, bool)
    got = vlm.token_logits(tree, visual, batch.tokens, batch.valid, has_image=nobody)[:, 1:]
    want = vlm.logits(tree, vlm.lm_block(tree, batch.tokens, batch.valid))[:, :-1]
    real = np.asarray(batch.valid)[:, 1:]
    assert_close(np.asarray(got)[real], np.asarray(want)[real], 2e-5)


def test_lm_loss_starts_at_the_right_key_when_queue_and_query_are_the_same_model(world):
    vlm, params, batch, _ = world
    tree = partition.unflatten(params)
    keys = np.array(tiny.queues()["hidden"].keys)
    own = np.asarray(LAST_TOKENS.encode(vlm, tree, (batch.tokens, batch.valid)))
    keys[np.asarray(batch.index)] = own / np.linalg.norm(own, axis=1, keepdims=True)
    queues = {"hidden": dataclasses.replace(tiny.queues()["hidden"], keys=jnp.asarray(keys))}
    one = stage(lm=1.0)
    _, metrics = make_objective(vlm, one, Losses())(tree, batch, queues, normalisers(vlm, one, batch), None)
    assert float(metrics["queue/lm/similarity"]) == pytest.approx(1.0, abs=1e-5)


def test_embed_keys_leave_the_end_of_text_out(world):
    vlm, params, batch, _ = world
    tree = partition.unflatten(params)
    table = np.asarray(tree["lm"]["token_embedding"]["embedding"], np.float64)
    keys = EMBEDDINGS.encode(vlm, tree, (batch.tokens, batch.valid))
    for row, tokens, valid in zip(keys, np.asarray(batch.tokens), np.asarray(batch.valid), strict=True):
        assert_close(row, table[tokens[valid][:-1]].mean(0), 1e-6, rtol=1e-5)


def test_dropout_follows_the_key_and_the_step(world):
    vlm, params = tiny.model(dropout=0.3)
    batch = tiny.batch()
    one = stage(train=("st/.*", "lm/.*"), base=1.0)
    (_, _, a), _ = run_step(vlm, params, one, batch, train=True, key=0)
    (_, _, again), _ = run_step(vlm, params, one, batch, train=True, key=0)
    (_, _, other), _ = run_step(vlm, params, one, batch, train=True, key=1)
    assert float(a["loss"]) == float(again["loss"])
    assert float(a["loss"]) != float(other["loss"])


@pytest.mark.parametrize("train", [("st/.*",), ("st/.*", "lm/.*")], ids=["frozen", "trained"])
def test_a_language_model_that_the_stage_does_not_train_runs_without_dropout(train):
    vlm, params = tiny.model(dropout=0.3)
    one, batch = stage(train=train, base=1.0, lm=1.0), tiny.batch()
    made = assemble(vlm, one, Losses(), params, 10, lambda kind: tiny.queues()[kind.name])
    objective = make_objective(vlm.for_stage(made.trained), one, Losses())
    norms = normalisers(vlm, one, batch)
    keys = [None, *(jax.random.key(i) for i in range(3))]
    losses = {float(objective(partition.unflatten(params), batch, made.queues, norms, key)[0]) for key in keys}
    assert len(losses) == (1 if train == ("st/.*",) else 4)
    assert (vlm.for_stage(made.trained).dropout == 0) == (train == ("st/.*",))


def gradients(vlm, params, batch, weights):
    """(losses, the gradient of their sum for every parameter) of a batch."""
    one = stage(**weights)
    tree = partition.unflatten(params)
    queues = {k: q for k, q in tiny.queues().items() if k in {kind.name for kind in queues_of(one)}}
    objective = make_objective(vlm, one, Losses())

    def loss_of(tree, batch, queues):
        return objective(tree, batch, queues, normalisers(vlm, one, batch), None)

    found, metrics = jax.jit(jax.grad(loss_of, has_aux=True))(tree, batch, queues)
    return metrics, found


@pytest.mark.parametrize("kind", ["gpt2", "lavin", "prompts"])
def test_texts_cut_to_the_longest_have_the_losses_and_gradients_of_fully_padded_ones(world, kind):
    if kind == "gpt2":
        vlm, params, batch, _ = world
        weights = {"base": 1.0, "ie": 1.0, "st": 1.0, "lm": 1.0}
    else:  # a LLaMA with LaVIN's adapters and with LLaMA-Adapter's; its width is not the queues'
        vlm, tree, tokens, valid, images, has_image = test_vlm.build(kind)
        params, weights = partition.flatten(tree), {"base": 1.0}
        rows = jnp.arange(3, dtype=jnp.int32)
        batch = Batch(rows, tokens, valid, valid & (jnp.arange(6) > 1)[None], images, has_image=has_image)
    texts = ("tokens", "valid", "supervised")
    wide = {field: jnp.pad(getattr(batch, field), ((0, 0), (0, 6))) for field in texts}
    narrow = int(batch.valid.sum(1).max())
    cut = {field: getattr(batch, field)[:, :narrow] for field in texts}
    (full, full_slopes), (short, slopes) = (
        gradients(vlm, params, batch._replace(**fields), weights) for fields in (wide, cut)
    )
    assert {name for name in full if name.startswith("loss")} == {"loss", *(f"loss/{name}" for name in weights)}
    for name, value in full.items():  # the products of two unit rows, a cosine, add up to at most 1 in magnitude
        assert_close(short[name], value, 2e-6, size=max(abs(float(value)), 1.0), err_msg=name)
    assert_trees_close(slopes, full_slopes)

"""ClipCap's own numbers: mapped prefixes, logits, loss, gradients, 24 of its steps, its beams and its greedy texts.

The bounds are float32's rounding as tests/close.py counts it: fractions of the largest number compared, those that
shared/originals/README.md gives with room for a CPU that adds up in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from authors import group, off, read_json, worst
from clipcap_model import ClipCap, batch_of
from close import assert_close

from eim_jax.config import Losses, LossWeights, Stage
from eim_jax.generation.sampler import DecodeConfig, generate
from eim_jax.losses.objective import make_objective, normalisers
from eim_jax.training import partition
from eim_jax.training.assembly import assemble

BASE = LossWeights(base=1.0)


@pytest.fixture(scope="module", params=["clipcap_mlp", "clipcap_transformer"])
def case(request):
    return ClipCap(request.param)


@pytest.fixture(scope="module")
def weights(case):
    return case.weights()


def test_prefix_logits_loss_and_gradients_are_theirs(case, weights):
    held = case.read("forward.npz")
    batch = batch_of(held["tokens"], held["clip_features"])  # not the normalised ones: normalize does that
    stage = Stage(train=("st/.*", "lm/.*"), losses=BASE)
    objective = make_objective(case.vlm, stage, Losses())

    @jax.jit
    def run(flat):
        params = partition.unflatten(flat)
        mapped = case.vlm.connect(params, batch.features)
        logits = case.vlm.token_logits(params, mapped, batch.tokens, batch.valid)

        def loss(flat):
            return objective(partition.unflatten(flat), batch, {}, normalisers(case.vlm, stage, batch), None)[0]

        return mapped, logits, *jax.value_and_grad(loss)(flat)

    mapped, logits, loss, grads = run(weights)
    assert_close(mapped, held["mapped"], 3e-6)
    # Their columns prefix - 1 to the last but one predict the caption; a padded row's tail is read by nobody.
    real, theirs = np.asarray(batch.valid), held["logits"][:, case.tokens - 1 : -1]
    assert_close(np.asarray(logits)[real], theirs[real], 1e-6)
    assert_close(loss, held["loss"], 2e-6)
    expected = case.renamed(group(held, "grad")) | {
        "lm/token_embedding/embedding": group(held, "grad")["gpt.transformer.wte.weight"]
    }
    assert worst({path: grads[path] for path in expected}, expected) <= 5e-6
    norms = {path: np.linalg.norm(leaf) for path, leaf in grads.items() if path.startswith("lm/blocks")}
    for i in range(2):
        assert norms[f"lm/blocks_{i}/mlp/up/kernel"] == pytest.approx(
            float(held[f"gradnorm/gpt.transformer.h.{i}.mlp.c_fc.weight"]), abs=1e-6
        )


def test_scoring_every_token_would_give_another_loss(case, weights):
    """What config.data.ignore_token=0 is for: theirs leaves `!` out, which is in these captions."""
    held = case.read("forward.npz")
    batch = batch_of(held["tokens"], held["clip_features"])
    stage = Stage(losses=BASE)
    whole = batch._replace(supervised=batch.valid)
    loss, _ = make_objective(case.vlm, stage, Losses())(
        partition.unflatten(weights), whole, {}, normalisers(case.vlm, stage, whole), None
    )
    assert abs(float(loss) - float(held["loss"])) > 0.1


def test_24_steps_end_at_their_weights(case, weights):
    """Their AdamW adds eps before the correction; a frozen GPT-2 takes no dropout, though 0.1 is configured."""
    held = case.read("train.npz")
    settings = case.config["train"]
    stage = Stage(
        train=case.train,
        losses=BASE,
        batch=4,
        lr=settings["lr"],
        warmup_steps=settings["warmup_steps"],
        eps=1e-6,
        eps_added="before",
    )
    rates = partition.learning_rate(stage, settings["steps"])
    assert_close([rates(i) for i in range(settings["steps"])], held["lrs"], 1e-6)
    made = assemble(case.vlm, stage, Losses(), weights, settings["steps"], lambda kind: None)
    trained, state = jax.tree.map(jnp.copy, made.trained), made.init_state()
    losses = []
    for i, rows in enumerate(held["index"]):
        batch = batch_of(held["tokens"][i], held["clip_features_by_index"][rows])
        trained, state, metrics = made.step(trained, state, made.frozen, batch, {}, jax.random.key(7), jnp.int32(i))
        losses.append(metrics["loss"])
    assert_close(losses, held["losses"], 2e-6)
    after = case.weights("weights_after_24_steps.pt")
    assert worst({**made.frozen, **trained}, after) <= 1.5e-6
    moved = max(off(after[path], weights[path]) for path in trained)
    assert moved > 5e-3  # the bound is less than a thousandth of the way


@pytest.fixture(scope="module")
def mapped(case, weights):
    held = case.read("decode_inputs.npz")
    found = case.vlm.connect(partition.unflatten(weights), jnp.asarray(held["clip_features"])[:, None])
    assert_close(found, held["prefix_embed"], 3e-6)
    return found


@pytest.mark.parametrize("method, key", [("beam", "beams"), ("greedy", "generate2")])
@pytest.mark.parametrize("longest, rows", [(67, "rows"), (4, "rows_with_entry_length_4")])
def test_decoded_ids_are_theirs(case, weights, mapped, method, key, longest, rows):
    """The best of generate_beam's five, and generate2, which takes the arg max whatever its top_p."""
    theirs = read_json(case.folder / "decode.json")
    config = DecodeConfig(method, beams=theirs["beam_size"], max_tokens=longest, stop_at_period=True)
    lm, ends = partition.unflatten(weights)["lm"], {"eos_id": None, "period_id": theirs["stop_id"]}
    wanted = [row[key] for row in theirs[rows]]
    said = generate(case.vlm.lm, lm, mapped[: len(wanted)], None, None, config, **ends)
    found = [ids[:n].tolist() for ids, n in zip(np.asarray(said.tokens), np.asarray(said.length), strict=True)]
    for ours, one in zip(found, wanted, strict=True):
        if one is not None:  # generate2 fails where a text is one token long
            assert ours == (one[0] if key == "beams" else one)

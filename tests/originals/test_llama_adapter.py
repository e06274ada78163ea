"""LLaMA-Adapter's own numbers: logits, losses, gradients, 12 of its steps, and its greedy texts with and without tanh.

The bounds are float32's rounding as tests/close.py counts it: fractions of the largest number compared, those that
shared/originals/README.md gives with room for a CPU that adds up in another order.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from authors import arrays, group, off, original, placed, read_json, read_torch, worst
from close import assert_close
from llama_model import meta_llama, prompts_and_gates

from eim_jax.config import Decode, Losses, LossWeights, Stage
from eim_jax.generation.sampler import DecodeConfig, continue_text
from eim_jax.losses.objective import make_objective, normalisers
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.batch import Batch
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM
from eim_jax.training import partition
from eim_jax.training.assembly import assemble

PROMPTS, LAYERS, ALL = 10, 3, 4
STAGE = Stage(train=("lm/adapter/.*",), losses=LossWeights(base=1.0))
BOS, EOS = 1, 2


class Case:
    """The frozen LLaMA, its adapter, and the model that reads texts alone."""

    def __init__(self):
        self.folder = original("llama_adapter")
        sizes = read_json(self.folder / "7B" / "params.json")
        lm = LlamaConfig(
            vocab=512, context=160, width=sizes["dim"], layers=ALL, heads=sizes["n_heads"], mlp=96,
            eps=sizes["norm_eps"], adapter=ZeroInit(PROMPTS, LAYERS),
        )  # fmt: skip
        # No row has a picture: tower and ST are there for their shapes alone.
        vision = CLIPVisionConfig(image_size=4, patch_size=4, width=4, layers=1, heads=1, mlp=4, joint=4)
        text = CLIPTextConfig(vocab=3, context=2, width=4, layers=1, heads=1, mlp=4, joint=4)
        st = make_st(STConfig("mlp", width_in=4, width_out=lm.width, tokens=PROMPTS, hidden=4))
        self.vlm = VLM(CLIPVision(vision), CLIPText(text), st, Llama(lm), features="cls", bos=BOS)
        self.frozen = placed(meta_llama(read_torch(self.folder / "7B" / "consolidated.00.pth"), ALL, lm.heads))
        self.frozen |= partition.flatten({"st": st.init(jax.random.key(0), jnp.zeros((1, 1, 4)))["params"]})
        self.adapter = self.leaves(read_torch(self.folder / "adapter.pth"))

    def leaves(self, held):
        return placed(prompts_and_gates(held, LAYERS, PROMPTS, ALL - LAYERS))

    def batch(self, examples, labels) -> Batch:
        """Their rows; BOS is put in by the model, as it is before every text."""
        assert (examples[:, 0] == BOS).all()
        tokens = np.asarray(examples[:, 1:], np.int32)
        length = tokens.shape[1] - np.argmax(tokens[:, ::-1] != 0, axis=1)
        return Batch(
            index=jnp.arange(len(tokens), dtype=jnp.int32),
            tokens=jnp.asarray(tokens),
            valid=jnp.asarray(np.arange(tokens.shape[1])[None] < length[:, None]),
            supervised=jnp.asarray(labels[:, 1:] != 0),
            features=jnp.zeros((len(tokens), 1, 4)),
            has_image=jnp.zeros(len(tokens), bool),
        )


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(scope="module")
def held(case):
    return arrays(case.folder / "forward.npz")


@pytest.fixture(scope="module")
def loss_and_slopes(case):
    objective = make_objective(case.vlm, STAGE, Losses())

    @jax.jit
    def run(adapter, frozen, batch):
        def loss(adapter):
            params = partition.unflatten({**frozen, **adapter})
            return objective(params, batch, {}, normalisers(case.vlm, STAGE, batch), None)[0]

        return jax.value_and_grad(loss)(adapter)

    return lambda adapter, batch: run(adapter, case.frozen, batch)


def logits_of(case, batch, vlm=None):
    params = partition.unflatten({**case.frozen, **case.adapter})
    vlm = vlm or case.vlm
    visual = vlm.connect(params, batch.features)
    return np.asarray(vlm.token_logits(params, visual, batch.tokens, batch.valid, has_image=batch.has_image))


def test_logits_are_theirs(case, held):
    batch = case.batch(held["examples"], held["labels"])
    scored = logits_of(case, batch)[np.asarray(batch.supervised)]
    assert_close(scored, held["logits_scored"], 2e-6)


def test_losses_and_gradients_are_theirs(case, held, loss_and_slopes):
    batch = case.batch(held["examples"], held["labels"])
    loss, slopes = loss_and_slopes(case.adapter, batch)
    assert_close(loss, held["loss"], 5e-7)
    assert worst(slopes, case.leaves(group(held, "grad"))) <= 5e-6
    shut = case.adapter | {"lm/adapter/gate": jnp.zeros_like(case.adapter["lm/adapter/gate"])}
    loss, slopes = loss_and_slopes(shut, batch)
    assert_close(loss, held["loss_gates_zero"], 5e-7)
    assert worst(slopes, case.leaves(group(held, "grad_gates_zero"))) <= 5e-6


def test_the_loss_with_their_float16_prompts_and_opened_gates_is_theirs(case, held, loss_and_slopes):
    """Their code rounds the prompts and the gates' tanh, not the gates: here by the gate that opens as far."""

    def half(x):
        return np.asarray(x).astype(np.float16).astype(np.float32)

    prompts, gates = (np.asarray(case.adapter[f"lm/adapter/{name}"]) for name in ("tokens", "gate"))
    rounded = placed({"lm/adapter/tokens": half(prompts), "lm/adapter/gate": np.arctanh(half(np.tanh(gates)))})
    loss, _ = loss_and_slopes(rounded, case.batch(held["examples"], held["labels"]))
    assert_close(loss, held["loss_with_fp16_prompts_and_gates"], 5e-7)
    assert off(loss, held["loss"]) > 4e-6  # the rounding shows


def test_each_rows_loss_is_theirs_and_loss_mean_rows_is_their_mean(case, held):
    batch = case.batch(held["examples"], held["labels"])
    params = partition.unflatten({**case.frozen, **case.adapter})

    def loss(batch, mean):
        stage = dataclasses.replace(STAGE, loss_mean=mean)
        return make_objective(case.vlm, stage, Losses())(params, batch, {}, normalisers(case.vlm, stage, batch), None)[
            0
        ]

    each = [loss(jax.tree.map(lambda x, i=i: x[i : i + 1], batch), "tokens") for i in range(6)]
    assert_close(each, held["row_loss"], 5e-7)
    assert_close(loss(batch, "rows"), held["row_loss"].mean(), 5e-7)
    assert abs(float(held["row_loss"].mean()) - float(held["loss"])) > 1e-3  # another number than the tokens' mean


@pytest.mark.parametrize("also", ["lm/adapter/gate", ""], ids=["decayed", "undecayed"])
def test_12_steps_end_at_their_leaves_where_gates_are_decayed(case, held, also):
    train = arrays(case.folder / "train.npz")
    stage = dataclasses.replace(
        STAGE, batch=3, lr=float(train["peak_lr"]), warmup_steps=4, schedule="cosine",
        b1=float(train["betas"][0]), b2=float(train["betas"][1]), eps=float(train["eps"]),
        weight_decay=float(train["weight_decay"]), decay_also=also,
    )  # fmt: skip
    rates = partition.learning_rate(stage, 12)
    assert_close([rates(i) for i in range(12)], train["lrs"], 1e-6)
    start = {**case.frozen, **case.leaves(group(train, "start"))}
    made = assemble(case.vlm, stage, Losses(), start, 12, lambda kind: None)
    trained, state, losses = jax.tree.map(jnp.copy, made.trained), made.init_state(), []
    for i, rows in enumerate(train["rows"]):
        batch = case.batch(held["examples"][rows], held["labels"][rows])
        trained, state, metrics = made.step(trained, state, made.frozen, batch, {}, jax.random.key(0), jnp.int32(i))
        losses.append(metrics["loss"])
    gap = worst(trained, case.leaves(group(train, "end")))
    if also:
        assert gap <= 1e-6
        assert_close(losses, train["losses"], 5e-7)
        assert worst(trained, case.leaves(read_torch(case.folder / "adapter_after_12_steps.pth"))) <= 1e-6
    else:
        assert 1e-4 < gap < 1e-3  # the gates', by what 12 steps of decay take


@pytest.mark.parametrize("gates", ["tanh", "raw"])
def test_greedy_texts_and_logits_are_theirs(case, gates):
    theirs = group(arrays(case.folder / "inference.npz"), gates)
    whole = arrays(case.folder / "inference.npz")
    vlm = case.vlm.in_generation(Decode(raw_gates=gates == "raw"))
    ids, length = whole["prompt_ids"], whole["prompt_length"]
    tokens = jnp.asarray(np.maximum(ids[:, 1:], 0), jnp.int32)
    valid = jnp.asarray(np.arange(ids.shape[1])[None] < length[:, None])[:, 1:]
    params = partition.unflatten({**case.frozen, **case.adapter})
    nobody = jnp.zeros(len(ids), bool)
    read = vlm.lm_input(params, tokens, valid, has_image=nobody, generating=True)
    said = continue_text(vlm.lm, params["lm"], read, DecodeConfig("greedy", max_tokens=12), eos_id=EOS)
    for ours, n, wanted in zip(np.asarray(said.tokens), np.asarray(said.length), theirs["greedy"], strict=True):
        assert ours[:n].tolist() == [token for token in wanted.tolist() if token not in (-1, EOS)]
    # The same, by a forward over prompt and text: each prompt's last logits, and 8 steps of the first.
    hidden = np.asarray(vlm.logits(params, vlm.run_lm(params, read)))
    assert_close(hidden[np.arange(len(ids)), length - 1], theirs["last_logits"], 2e-6)
    text = np.concatenate([ids[0, 1 : length[0]], theirs["greedy"][0, :7]])[None]
    row = vlm.lm_input(params, jnp.asarray(text), jnp.ones(text.shape, bool), has_image=nobody[:1])
    steps = np.asarray(vlm.logits(params, vlm.run_lm(params, row)))[0, -8:]
    assert_close(steps, theirs["step_logits_prompt0"], 2e-6)

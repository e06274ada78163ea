"""Time of one ClipCap training step (ST + GPT-2 small, all trained, AdamW): eim_jax's modules against PyTorch.

python benchmarks/clipcap_step.py [--st mlp|ffn] [--visual 10] [--text 40] [--batch 8] [--dropout 0.1] [--repeats 5]
Both sides: float32, the same shapes, dropout rate, loss (mean over text tokens) and AdamW; random weights.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from pairs import Pair, report
from transformers import GPT2Config as TorchConfig
from transformers import GPT2LMHeadModel

from eim_jax.losses import response_xent
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.gpt2 import GPT2, GPT2Config

WIDTH, VOCAB = 768, 50257


def jax_step(st_config: STConfig, seen: np.ndarray, tokens: np.ndarray, dropout: float):
    """Returns a function that takes one training step and waits for it."""
    st, lm = make_st(st_config), GPT2(GPT2Config(dropout=dropout))
    optimizer = optax.adamw(2e-5, weight_decay=0.0)
    init_st = jax.jit(st.init)(jax.random.key(0), seen)["params"]
    init_lm = jax.jit(lm.init)(jax.random.key(1), tokens)["params"]
    params = {"st": init_st, "lm": init_lm}

    def loss_of(params, key):
        visual = st.apply({"params": params["st"]}, seen)
        text = lm.apply({"params": params["lm"]}, tokens, method="embed")
        embeds = jnp.concatenate([visual, text], axis=1)
        options = {"train": dropout > 0, "rngs": {"dropout": key}, "method": "hidden"}
        hidden, _ = lm.apply({"params": params["lm"]}, embeds, **options)
        logits = lm.apply({"params": params["lm"]}, hidden[:, visual.shape[1] - 1 : -1], method="logits")
        total, count = response_xent(logits, tokens, jnp.ones(tokens.shape, bool))
        return total / count

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key):
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params, key)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state, key = (params, optimizer.init(params)), jax.random.key(2, impl="rbg")  # as eim_jax.train draws it

    def run():
        nonlocal state
        state, loss = step(state, key)
        return float(jax.block_until_ready(loss))

    return run


def torch_step(st_config: STConfig, seen: np.ndarray, tokens: np.ndarray, dropout: float):
    """Returns a function that takes one training step."""
    inner = torch.nn.Tanh() if st_config.kind == "mlp" else torch.nn.GELU()
    out = WIDTH * st_config.tokens if st_config.kind == "mlp" else WIDTH
    hidden = st_config.hidden_width
    st = torch.nn.Sequential(torch.nn.Linear(st_config.width_in, hidden), inner, torch.nn.Linear(hidden, out))
    lm = GPT2LMHeadModel(TorchConfig(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)).train()
    optimizer = torch.optim.AdamW([*st.parameters(), *lm.parameters()], lr=2e-5, weight_decay=0.0)
    features, ids = torch.from_numpy(seen.copy()), torch.from_numpy(tokens.astype(np.int64))

    def run():
        visual = st(features).reshape(len(features), -1, WIDTH)
        embeds = torch.cat([visual, lm.transformer.wte(ids)], dim=1)
        n = visual.shape[1]
        hidden = lm.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, n - 1 : -1]
        loss = torch.nn.functional.cross_entropy(lm.lm_head(hidden).reshape(-1, VOCAB), ids.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--st", choices=("mlp", "ffn"), default="mlp")
    parser.add_argument("--visual", type=int, default=10, help="visual tokens (paper: 10 for ClipCap, 50 for EIM)")
    parser.add_argument("--text", type=int, default=40, help="text tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    width_in = 512 if options.st == "mlp" else 768
    st = STConfig(kind=options.st, width_in=width_in, width_out=WIDTH, tokens=options.visual)
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((options.batch, st.output_tokens(options.visual), width_in), np.float32)
    if options.st == "mlp":  # one image feature
        seen = seen[:, :1]
    tokens = rng.integers(0, VOCAB, (options.batch, options.text)).astype(np.int32)
    arguments = (st, seen, tokens, options.dropout)
    shape = f"{options.visual} visual + {options.text} text tokens, batch {options.batch}, float32"
    title = f"ClipCap training step: {options.st} ST + GPT-2 small, {shape}, dropout {options.dropout}"
    report(title, [Pair("training step", jax_step(*arguments), torch_step(*arguments))], options.repeats)


if __name__ == "__main__":
    main()

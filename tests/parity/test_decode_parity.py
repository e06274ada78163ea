"""Greedy decoding against transformers' generate on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.generation.sampler import DecodeConfig, generate
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.pretrained import LM, export_lm

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def test_greedy_equals_transformers_generate(tmp_path):
    from transformers import GPT2LMHeadModel

    config = GPT2Config(vocab=61, context=48, width=32, layers=2, heads=4)
    lm = GPT2(config)
    params = jax.tree.map(lambda x: 6 * x, lm.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    export_lm(tmp_path, LM(config, params))
    model = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    prefix = np.asarray(jax.random.normal(jax.random.key(1), (5, 4, 32)), np.float32)
    with torch.no_grad():
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 7, "pad_token_id": 0}
        expected = model.generate(inputs_embeds=torch.from_numpy(prefix.copy()), **options).numpy()
    found = generate(lm, params, jnp.asarray(prefix), None, None, DecodeConfig(max_tokens=12), eos_id=7)
    for row in range(5):
        tokens = expected[row].tolist()
        tokens = tokens[: tokens.index(7)] if 7 in tokens else tokens
        assert found.tokens[row, : int(found.length[row])].tolist() == tokens

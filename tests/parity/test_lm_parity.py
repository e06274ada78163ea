"""Every family of language models against transformers: values, gradients and exported directories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.models.language.gpt2 import GPT2
from eim_jax.models.language.llama import Llama
from eim_jax.pretrained import export_lm, load_lm

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

GPT2_TINY = {"vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
TINY = {
    "vocab_size": 97,
    "max_position_embeddings": 40,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
SMALL = {
    "vocab_size": 2000,
    "max_position_embeddings": 64,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
TIED = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}
ROPE = {"rope_parameters": {"rope_theta": 5e5}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"rope_parameters": {**LLAMA3, "rope_theta": 5e3, "original_max_position_embeddings": 24}}
LINEAR = {"rope_parameters": {"rope_theta": 1e3, "rope_type": "linear", "factor": 2.5}}
FULL, NARROW = "full_attention", "sliding_attention"
GROUPED = {**TINY, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 12}
GEMMA = {**WIDE_HEADS, "layer_types": [NARROW, FULL, NARROW], "sliding_window": 5, "query_pre_attn_scalar": 9}
GEMMA_ROPE = {NARROW: {"rope_type": "default", "rope_theta": 50.0}, FULL: {**LINEAR["rope_parameters"]}}
GEMMA_ROPE = {"rope_parameters": GEMMA_ROPE}
GEMMA2 = {**GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Ours, theirs, the config's fields, by how much the initial weights are moved, whether the blocks are scanned.
CASES = {
    "gpt2-tiny": (GPT2, "GPT2", GPT2_TINY, 0.05, False),
    "gpt2-tiny-scan": (GPT2, "GPT2", GPT2_TINY, 0.05, True),
    "gpt2-small": (GPT2, "GPT2", {}, 0.01, False),
    "llama-ungrouped": (Llama, "Llama", TINY, 0.05, False),
    "llama-grouped": (Llama, "Llama", {**TINY, "num_key_value_heads": 2}, 0.05, False),
    "llama-grouped-scan": (Llama, "Llama", {**TINY, **ROPE, "num_key_value_heads": 4}, 0.05, True),
    "llama-tied": (Llama, "Llama", {**TINY, **TIED, "num_key_value_heads": 2}, 0.05, False),
    "llama-biases": (Llama, "Llama", {**WIDE_HEADS, "attention_bias": True}, 0.05, False),
    "llama-small": (Llama, "Llama", SMALL, 0.01, True),
    "llama3-scan": (Llama, "Llama", {**WIDE_HEADS, **LLAMA3}, 0.05, True),
    "llama-linear": (Llama, "Llama", {**GROUPED, **LINEAR}, 0.05, False),
    "mistral": (Llama, "Mistral", {**WIDE_HEADS, "sliding_window": 5}, 0.05, False),
    "mistral-unbounded-scan": (Llama, "Mistral", {**GROUPED, "sliding_window": None}, 0.05, True),
    "qwen2": (Llama, "Qwen2", GROUPED, 0.05, False),
    "qwen2-window-scan": (Llama, "Qwen2", {**GROUPED, **QWEN_WINDOW}, 0.05, True),
    "qwen3-scan": (Llama, "Qwen3", WIDE_HEADS, 0.05, True),
    "smollm3": (Llama, "SmolLM3", {**GROUPED, "no_rope_layers": [1, 0, 1]}, 0.05, False),
    "smollm3-scan": (Llama, "SmolLM3", {**GROUPED, "no_rope_layer_interval": 2}, 0.05, True),
    "phi3": (Llama, "Phi3", {**GROUPED, "sliding_window": 5}, 0.05, False),
    "phi3-scan": (Llama, "Phi3", {**GROUPED, **ROPE}, 0.05, True),
    "gemma2": (Llama, "Gemma2", GEMMA2, 0.05, False),
    "gemma2-scan": (Llama, "Gemma2", {**GEMMA2, "sliding_window": 3, **ROPE}, 0.05, True),
    "gemma3": (Llama, "Gemma3", GEMMA, 0.05, False),
    "gemma3-scan": (Llama, "Gemma3", {**GEMMA, **GEMMA_ROPE}, 0.05, True),
}
EXPORTS = {
    "gpt2": ("GPT2", GPT2_TINY),
    "llama": ("Llama", {**TINY, "num_key_value_heads": 2}),
    "llama-tied": ("Llama", {**TINY, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {**GROUPED, "attention_bias": True}),
    "llama3": ("Llama", {**WIDE_HEADS, **LLAMA3}),
    "mistral": ("Mistral", {**WIDE_HEADS, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**GROUPED, **QWEN_WINDOW}),
    "qwen3": ("Qwen3", {**WIDE_HEADS, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {**GROUPED, "no_rope_layers": [1, 0, 1]}),
    "phi3": ("Phi3", {**GROUPED, "sliding_window": 5}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma3": ("Gemma3", {**GEMMA, **GEMMA_ROPE}),
}


def causal_lm(family, config, moved, perturbed):
    """A model of transformers with weights that are nowhere trivial."""
    ends = {"bos_token_id": 0, "eos_token_id": 0} if family == "GPT2" else {}
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    return perturbed(model(model.config_class(**config, **ends)), moved)


@pytest.mark.parametrize(("ours_class", "family", "config", "moved", "scan"), CASES.values(), ids=CASES)
def test_lm_after_an_image_prefix_agrees_in_values_and_gradients(
    ours_class, family, config, moved, scan, perturbed, saved, agree
):
    """The captioning graph: 4 prefix embeddings, then text with padding; cross-entropy over the text."""
    model = causal_lm(family, config, moved, perturbed)
    words = model.get_input_embeddings()
    tokens = torch.randint(0, words.num_embeddings, (2, 8))
    prefix = torch.randn(2, 4, words.embedding_dim, requires_grad=True)
    valid = torch.arange(8)[None] < torch.tensor([[8], [5]])
    everything = torch.cat([torch.ones(2, 4, dtype=torch.bool), valid], dim=1)
    embeds = torch.cat([prefix, words(tokens)], dim=1)
    out = model(inputs_embeds=embeds, attention_mask=everything.long(), output_hidden_states=True)
    target = torch.where(valid, tokens, -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), target.flatten())
    loss.backward()

    weights, gradient = saved(model)
    lm = load_lm(weights, scan=scan)
    ids, mask = jnp.asarray(tokens.numpy(), jnp.int32), jnp.asarray(valid.numpy())

    def ours(params, prefix):
        def method(module):
            embeds = jnp.concatenate([prefix, module.embed(ids)], axis=1)
            hidden, _ = module.hidden(embeds, valid=jnp.concatenate([jnp.ones((2, 4), bool), mask], axis=1))
            return hidden, module.logits(hidden)

        hidden, logits = ours_class(lm.config).apply({"params": params}, method=method)
        logp = jax.nn.log_softmax(logits[:, 3:-1])
        picked = jnp.take_along_axis(logp, ids[..., None], axis=2)[..., 0]
        return -jnp.mean(picked, where=mask), (hidden, logits)

    grad = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (value, (hidden, logits)), grads = grad(lm.params, jnp.asarray(prefix.detach().numpy()))
    real = everything.numpy()
    agree("hidden", np.asarray(hidden)[real], out.hidden_states[-1].detach().numpy()[real])
    agree("logits", np.asarray(logits)[real], out.logits.detach().numpy()[real])
    agree("loss", value, loss.item())
    agree("gradient", grads, (load_lm(gradient, scan=scan).params, prefix.grad.numpy()))


@pytest.mark.parametrize(("family", "config"), EXPORTS.values(), ids=EXPORTS)
def test_an_exported_lm_gives_the_same_logits_in_transformers(family, config, perturbed, saved, tmp_path):
    model = causal_lm(family, config, 0.05, perturbed)
    weights, _ = saved(model)
    export_lm(tmp_path / "export", load_lm(weights, scan=True))
    again, info = type(model).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, 97, (2, 8))
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


def test_bfloat16_directories_of_save_pretrained_load_bit_for_bit(perturbed, tmp_path):
    model = perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), 0.05).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params = load_lm(tmp_path, param_dtype=jnp.bfloat16).params
    theirs = model.model.layers[2].mlp.gate_proj.weight.detach().T.float().numpy()
    kernel = params["blocks_2"]["mlp"]["gate"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), theirs)

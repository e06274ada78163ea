import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.models.gpt2 import GPT2
from eim_jax.weights import export_lm, load_lm

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install 'eim_jax[parity]'")
transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
SIZES = {"tiny": (TINY, 0.05, False), "tiny-scan": (TINY, 0.05, True), "small": ({}, 0.01, False)}


@pytest.mark.parametrize(("config", "moved", "scan"), SIZES.values(), ids=SIZES)
def test_gpt2_after_an_image_prefix_agrees_in_values_and_gradients(config, moved, scan, perturbed, saved, agree):
    """The captioning graph: 4 prefix embeddings, then text with padding; cross-entropy over the text."""
    hf_config = transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    model = perturbed(transformers.GPT2LMHeadModel(hf_config), moved)
    tokens = torch.randint(0, hf_config.vocab_size, (2, 8))
    prefix = torch.randn(2, 4, hf_config.n_embd, requires_grad=True)
    valid = torch.arange(8)[None] < torch.tensor([[8], [5]])
    everything = torch.cat([torch.ones(2, 4, dtype=torch.bool), valid], dim=1)
    embeds = torch.cat([prefix, model.transformer.wte(tokens)], dim=1)
    out = model(inputs_embeds=embeds, attention_mask=everything.long(), output_hidden_states=True)
    target = torch.where(valid, tokens, -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), target.flatten())
    loss.backward()

    weights, gradient = saved(model)
    lm = load_lm(weights, scan=scan)
    ids, mask = jnp.asarray(tokens.numpy(), jnp.int32), jnp.asarray(valid.numpy())

    def ours(params, prefix):
        def method(gpt2):
            embeds = jnp.concatenate([prefix, gpt2.embed(ids)], axis=1)
            hidden, _ = gpt2.hidden(embeds, valid=jnp.concatenate([jnp.ones((2, 4), bool), mask], axis=1))
            return hidden, gpt2.logits(hidden)

        hidden, logits = GPT2(lm.config).apply({"params": params}, method=method)
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


def test_exported_gpt2_gives_the_same_logits_in_transformers(perturbed, saved, tmp_path):
    model = perturbed(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, bos_token_id=0, eos_token_id=0)), 0.05
    )
    weights, _ = saved(model)
    export_lm(tmp_path / "export", load_lm(weights, scan=True))
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, 97, (2, 8))
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)

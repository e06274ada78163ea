import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.models.vision.clip import CLIPText, CLIPVision
from eim_jax.pretrained import export_clip, load_clip

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

TINY = {
    "vision_config": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 24, "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "vocab_size": 60, "max_position_embeddings": 10, "bos_token_id": 58, "eos_token_id": 59,
    },
    "projection_dim": 16,
}  # fmt: skip
SIZES = {"tiny": (TINY, 0.05, False), "tiny-scan": (TINY, 0.05, True), "vit-b-32": ({}, 0.005, False)}


def inputs(config):
    vision, text = config.vision_config, config.text_config
    tokens = torch.randint(0, text.vocab_size - 2, (2, 9))
    tokens[0, 6:], tokens[1, 3:] = text.eos_token_id, text.eos_token_id
    return torch.randn(2, vision.image_size, vision.image_size, 3), tokens


@pytest.mark.parametrize(("config", "moved", "scan"), SIZES.values(), ids=SIZES)
def test_both_towers_agree_in_features_and_gradients(config, moved, scan, perturbed, saved, agree):
    model = perturbed(transformers.CLIPModel(transformers.CLIPConfig(**config)), moved)
    pixels, tokens = inputs(model.config)
    seen = model.vision_model(pixels.permute(0, 3, 1, 2))
    read = model.text_model(tokens)
    theirs = {
        "seen": seen.last_hidden_state,
        "image": model.visual_projection(seen.pooler_output),
        "hidden": read.last_hidden_state,
        "text": model.text_projection(read.pooler_output),
    }
    # Means of products with fixed numbers, so that gradients are of the size that training sees.
    probes = {k: torch.randn_like(v) / v.numel() ** 0.5 for k, v in theirs.items()}
    sum((probes[k] * v).sum() for k, v in theirs.items()).backward()

    weights, gradient = saved(model)
    clip = load_clip(weights, scan=scan)

    def ours(params):
        vision, text = CLIPVision(clip.vision), CLIPText(clip.text)
        ids = jnp.asarray(tokens.numpy(), jnp.int32)
        seen, image = vision.apply({"params": params["visual"]}, jnp.asarray(pixels.numpy()))
        hidden = text.apply({"params": params["text"]}, ids, method="hidden")
        values = {"seen": seen, "image": image, "hidden": hidden, "text": text.apply({"params": params["text"]}, ids)}
        return sum(jnp.sum(probes[k].numpy() * v) for k, v in values.items()), values

    grads, values = jax.jit(jax.grad(ours, has_aux=True))(clip.params)
    for k, value in values.items():
        agree(k, value, theirs[k].detach().numpy())
    agree("gradient", grads, load_clip(gradient, scan=scan).params)


def test_deep_prompts_agree_with_tokens_inserted_into_transformers_blocks(perturbed, saved, agree):
    """A forward hook before every block appends that block's prompts; one after it cuts their outputs off."""
    model = perturbed(transformers.CLIPModel(transformers.CLIPConfig(**TINY)), 0.05)
    pixels, _ = inputs(model.config)
    weights, _ = saved(model)
    clip = load_clip(weights)
    config = dataclasses.replace(clip.vision, prompts=5)
    prompts = torch.randn(3, 5, 32, requires_grad=True)
    for layer, block in enumerate(model.vision_model.encoder.layers):
        put = lambda _, args, i=layer: (torch.cat([args[0], prompts[i].expand(2, 5, 32)], dim=1), *args[1:])  # noqa: E731
        block.register_forward_pre_hook(put)
        block.register_forward_hook(lambda _, args, out: (out[0] if isinstance(out, tuple) else out)[:, :-5])
    seen = model.vision_model(pixels.permute(0, 3, 1, 2)).last_hidden_state
    probe = torch.randn_like(seen)
    (seen * probe).sum().backward()

    def ours(tokens):
        params = {**clip.params["visual"], "prompt": {"tokens": tokens}}
        seen = CLIPVision(config).apply({"params": params}, jnp.asarray(pixels.numpy()), method="tokens")
        return jnp.sum(seen * probe.numpy()), seen

    grad, value = jax.jit(jax.grad(ours, has_aux=True))(jnp.asarray(prompts.detach().numpy()))
    agree("seen", value, seen.detach().numpy())
    agree("prompt gradient", grad, prompts.grad.numpy())


def test_exported_clip_gives_the_same_features_in_transformers(perturbed, saved, tmp_path):
    model = perturbed(transformers.CLIPModel(transformers.CLIPConfig(**TINY)), 0.05)
    weights, _ = saved(model)
    export_clip(tmp_path / "export", load_clip(weights, scan=True))
    again, info = transformers.CLIPModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    pixels, tokens = inputs(model.config)
    arguments = {"pixel_values": pixels.permute(0, 3, 1, 2), "input_ids": tokens}
    np.testing.assert_array_equal(
        again.eval()(**arguments).logits_per_image.detach(), model(**arguments).logits_per_image.detach()
    )

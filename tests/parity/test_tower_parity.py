"""SigLIP, DINOv2 and CLIP's forms beside transformers on tiny random folders: values, gradients, exports."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eim_jax.models.vision import VISION_TOWERS, build_text
from eim_jax.pretrained import export_clip, load_clip

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 60, "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 1, "projection_size": 32}
CLIP_TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 10, "bos_token_id": 58, "eos_token_id": 59}
EXACT = 1e-5  # of the largest value: these towers are three layers deep


def siglip(**vision):
    vision = {**SIZES, "image_size": 24, "patch_size": 8, **vision}
    config = transformers.SiglipConfig(vision_config=vision, text_config={**SIZES, "num_hidden_layers": 2, **TEXT})
    return transformers.SiglipModel(config)


def clip(activation, eos=59):
    vision = {**SIZES, "image_size": 24, "patch_size": 8, "hidden_act": activation}
    text = {**CLIP_TEXT, "hidden_act": activation, "eos_token_id": eos}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))


def close(name, ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, name
    worst = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert worst <= EXACT, (name, worst)


def compare(model, folder, theirs, pixels, tokens=None, **options):
    """Our values, and gradients of their products with fixed numbers, beside `theirs`."""
    probes = {k: torch.randn_like(v) / v.numel() ** 0.5 for k, v in theirs.items()}
    sum((probes[k] * v).sum() for k, v in theirs.items()).backward()
    model.save_pretrained(folder / "weights")
    shadow = copy.deepcopy(model)  # a model of gradients: loading is linear, and the file has the keys of the weights
    with torch.no_grad():
        for parameter, of in zip(shadow.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(of) if of.grad is None else of.grad)
    shadow.save_pretrained(folder / "gradient")
    found = load_clip(folder / "weights", **options)
    tower = VISION_TOWERS[found.vision.model_type].build(found.vision)

    def ours(params):
        seen, image = tower.apply({"params": params["visual"]}, jnp.asarray(pixels.numpy()))
        values = {"seen": seen, "image": image}
        if tokens is not None:
            ids = jnp.asarray(tokens.numpy(), jnp.int32)
            values["text"] = build_text(found.vision, found.text).apply({"params": params["text"]}, ids)
        return sum(jnp.sum(probes[k].numpy() * v) for k, v in values.items()), values

    grads, values = jax.jit(jax.grad(ours, has_aux=True))(found.params)
    for name, value in values.items():
        close(name, value, theirs[name].detach().numpy())
    expected = load_clip(folder / "gradient", **options).params
    if options.get("image_size"):  # theirs is of the table in the file, ours of the one interpolated from it
        del grads["visual"]["position_embedding"], expected["visual"]["position_embedding"]
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(lambda at, a, b: close(jax.tree_util.keystr(at), a, b), grads, expected)


@pytest.mark.parametrize(
    ("scan", "size"), [(False, 24), (True, 24), (False, 40), (False, 20)], ids=["own", "scan", "larger", "smaller"]
)
def test_siglip_agrees_in_features_and_gradients(scan, size, perturbed, tmp_path):
    model = perturbed(siglip(), 0.05)
    pixels, tokens = torch.randn(2, size, size, 3), torch.randint(0, 60, (2, 10))
    seen = model.vision_model(pixels.permute(0, 3, 1, 2), interpolate_pos_encoding=size != 24)
    text = model.text_model(tokens).pooler_output
    theirs = {"seen": seen.last_hidden_state, "image": seen.pooler_output, "text": text}
    compare(model, tmp_path, theirs, pixels, tokens, scan=scan, **({"image_size": size} if size != 24 else {}))


@pytest.mark.parametrize(
    ("activation", "eos", "size"),
    [("quick_gelu", 2, 0), ("gelu", 2, 33), ("gelu", 59, 0), ("gelu_pytorch_tanh", 59, 33)],
)
def test_clip_agrees_in_every_form(activation, eos, size, perturbed, tmp_path):
    """OpenAI's, DFN's and MetaCLIP's conversions (quick_gelu, eos_token_id 2), OpenCLIP's (gelu), at any size."""
    model = perturbed(clip(activation, eos), 0.05)
    pixels, tokens = torch.randn(2, size or 24, size or 24, 3), torch.randint(0, 57, (2, 9))
    tokens[0, 6:], tokens[1, 3:] = 59, 59
    seen = model.vision_model(pixels.permute(0, 3, 1, 2), interpolate_pos_encoding=bool(size))
    theirs = {
        "seen": seen.last_hidden_state,
        "image": model.visual_projection(seen.pooler_output),
        "text": model.text_projection(model.text_model(tokens).pooler_output),
    }
    compare(model, tmp_path, theirs, pixels, tokens, **({"image_size": size} if size else {}))


def dinov2(**fields):
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=24, patch_size=8, **fields))


@pytest.mark.parametrize(
    ("fields", "size", "scan"),
    [({}, 24, False), ({"use_swiglu_ffn": True, "qkv_bias": False}, 24, True), ({"use_mask_token": False}, 40, False)],
    ids=["mlp", "swiglu", "larger"],
)
def test_dinov2_agrees_in_features_and_gradients(fields, size, scan, perturbed, tmp_path):
    model = perturbed(dinov2(**fields), 0.05)
    pixels = torch.randn(2, size, size, 3)
    seen = model(pixels.permute(0, 3, 1, 2))
    theirs = {"seen": seen.last_hidden_state, "image": seen.pooler_output}
    compare(model, tmp_path, theirs, pixels, scan=scan, **({"image_size": size} if size != 24 else {}))


@pytest.mark.parametrize("swiglu", [False, True])
def test_exported_dinov2_gives_the_same_features_in_transformers(swiglu, perturbed, saved, tmp_path):
    model = perturbed(dinov2(use_swiglu_ffn=swiglu, use_mask_token=False), 0.05)
    export_clip(tmp_path / "export", load_clip(saved(model)[0]))
    again, info = transformers.Dinov2Model.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randn(2, 3, 24, 24)
    np.testing.assert_array_equal(
        again.eval()(pixels).last_hidden_state.detach(), model(pixels).last_hidden_state.detach()
    )


def test_exported_siglip_gives_the_same_features_in_transformers(perturbed, saved, tmp_path):
    model = perturbed(siglip(), 0.05)
    weights, _ = saved(model)
    export_clip(tmp_path / "export", load_clip(weights, scan=True))
    again, info = transformers.SiglipModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    given = {"pixel_values": torch.randn(2, 3, 24, 24), "input_ids": torch.randint(0, 60, (3, 10))}
    np.testing.assert_array_equal(
        again.eval()(**given).logits_per_image.detach(), model(**given).logits_per_image.detach()
    )

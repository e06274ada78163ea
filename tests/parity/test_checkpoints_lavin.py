"""LaVIN's checkpoints by config.init: the authors' features and logits (shared/originals)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    FEATURES,
    LEARN,
    LOGITS,
    asked,
    learns_from_its_init,
    llama_folder,
    noise,
    rows_to_learn,
)
from close import assert_close
from PIL import Image
from tiny import config_of

from eim_jax.commands import exporting
from eim_jax.models.vision.clip import CLIPTextConfig, CLIPVisionConfig
from eim_jax.pretrained import (
    CLIP,
    WeightsError,
    clip_shapes,
    export_clip,
    resolve,
    torch_files,
)
from eim_jax.training import arm_model, initial, partition, setup

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")


def openai_clip(file: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    """OpenAI's CLIP as a folder in Hugging Face's form; its text tower is noise, which LaVIN never reads."""
    held = {key: x.float().numpy() for key, x in torch.load(file, weights_only=True).items() if x.ndim}
    config = CLIPVisionConfig(image_size=28, patch_size=7, width=128, layers=8, heads=2, mlp=512, joint=48)
    text = CLIPTextConfig(vocab=724, context=20, width=16, layers=1, heads=2, mlp=32, joint=48, eos_id=723)
    flat = noise(clip_shapes(config, text))

    def norm(ours, theirs):
        flat[f"visual/{ours}/scale"], flat[f"visual/{ours}/bias"] = held[f"{theirs}.weight"], held[f"{theirs}.bias"]

    flat["visual/class_embedding"] = held["visual.class_embedding"]
    flat["visual/position_embedding"] = held["visual.positional_embedding"]
    flat["visual/patch_embedding/kernel"] = held["visual.conv1.weight"].transpose(2, 3, 1, 0)
    flat["visual/projection/kernel"] = held["visual.proj"]
    norm("pre_ln", "visual.ln_pre")
    norm("post_ln", "visual.ln_post")
    for i in range(8):
        ours, theirs = f"visual/blocks_{i}", f"visual.transformer.resblocks.{i}"
        norm(f"blocks_{i}/ln_1", f"{theirs}.ln_1")
        norm(f"blocks_{i}/ln_2", f"{theirs}.ln_2")
        flat[f"{ours}/attn/qkv/kernel"] = held[f"{theirs}.attn.in_proj_weight"].T.reshape(128, 3, 128)
        flat[f"{ours}/attn/qkv/bias"] = held[f"{theirs}.attn.in_proj_bias"].reshape(3, 128)
        for part, name in (("attn/out", "attn.out_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj")):
            flat[f"{ours}/{part}/kernel"] = held[f"{theirs}.{name}.weight"].T
            flat[f"{ours}/{part}/bias"] = held[f"{theirs}.{name}.bias"]
    export_clip(place, CLIP(config, text, partition.unflatten({k: jnp.asarray(x) for k, x in flat.items()})))
    for name in resolve("miniature/clip").glob("tokenizer*"):
        (place / name.name).write_bytes(name.read_bytes())
    return place


@pytest.fixture
def lavin(shared_original, tmp_path):
    """Returns a function: settings -> (case, config whose baseline is that LaVIN)."""
    case = shared_original("lavin")

    def make(**changes):
        return case, config_of(
            "lavin7b_scienceqa",
            **{
                "towers.clip": str(openai_clip(case / "clip.pt", tmp_path / "clip")),
                "towers.lm": str(llama_folder(shared_original, tmp_path / "llama", case)),
                "arm.baseline.adapter_rank": 4,
                "arm.baseline.adapter_temperature": 5.0,
                "arm.baseline.st_hidden": 16,
                "init": str(case / "checkpoint-start.pth"),
                **changes,
            },
        )

    return make


def rows_of(ids, labels):
    """The text behind what LaVIN inserts, as our models read it: (tokens, valid, scored), padded on the right."""
    texts = []
    for row, label in zip(ids, labels, strict=True):
        seen = np.flatnonzero(row == -2)
        first = seen[-1] + 1 if len(seen) else 7  # modality, BOS, "Image: N/A" in five tokens
        texts.append((row[first:], label[first:]))
    width = max(len(text) for text, _ in texts)
    tokens, scored = np.zeros((2, len(texts), width), np.int32)
    for i, (text, label) in enumerate(texts):
        tokens[i, : len(text)], scored[i, : len(text)] = text, label
    return tokens, tokens > 0, scored > 0


def test_lavin_gives_the_authors_features_and_logits(lavin, tmp_path):
    case, config = lavin()
    # Whose class token routes the adapters inside CLIP: each picture's own, or as in their code the batch's first one's
    routing = getattr(config.arm["baseline"], "visual_routing", "sample")
    authors = np.load(case / "authors.npz")
    theirs = {"sample": np.load(case / "batch_first.npz"), "position": authors}[routing]
    inputs = setup.load(config, tmp_path, data=False)
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
    tree = partition.unflatten(params)
    pictured = authors["has_image"][:8] > 0
    seen = jax.jit(vlm.encode_image)(tree, jnp.asarray(authors["image"]))
    assert_close(np.asarray(seen)[pictured], theirs["clip_features"][pictured], FEATURES)
    mapped = vlm.connect(tree, jnp.asarray(theirs["clip_features"]))
    tokens = theirs["visual_tokens"][pictured]
    assert_close(np.asarray(mapped)[pictured], tokens, 1e-6)  # two matrix products
    visual = vlm.connect(tree, seen)
    tokens, valid, scored = rows_of(theirs["inserted_ids"], theirs["inserted_labels"])
    logits = jax.jit(vlm.token_logits)(
        tree, visual, jnp.asarray(tokens), jnp.asarray(valid), has_image=jnp.asarray(pictured)
    )
    ours = np.asarray(logits)[:2][scored[:2]]
    assert_close(ours, theirs["logits_scored_rows_0_1"], LOGITS)


def test_a_lavin_file_is_exported_read_again_and_folded(lavin, tmp_path):
    _, config = lavin()
    inputs = setup.load(config, tmp_path, data=False)
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
    given = initial.given(inputs, config.arm["baseline"], vlm, params)
    assert given == set(params) - set(inputs.towers)
    exporting.write_arm(inputs, "baseline", params, tmp_path / "out", given)
    again = dataclasses.replace(config, init=str(tmp_path / "out"))
    _, read = arm_model.start(dataclasses.replace(inputs, config=again), config.arm["baseline"])
    for path in given:
        np.testing.assert_array_equal(read[path], params[path])
    lm = partition.unflatten(params)["lm"]
    ids, one = jnp.asarray(np.arange(3, 11, dtype=np.int32)[None]), jnp.asarray([True])
    steer = vlm.lm.apply({"params": lm}, jnp.zeros((1, 2, 32)), one, method="steer")
    embeds = vlm.lm.apply({"params": lm}, ids, method="embed")
    whole = vlm.lm.apply({"params": lm}, embeds, steer=steer, method="hidden")[0]
    config, folded = vlm.lm.config.adapter.fold(vlm.lm, lm, 1)
    plain = vlm.lm.clone(config=config)
    assert_close(plain.apply({"params": folded}, embeds, method="hidden")[0], whole)


def test_training_goes_on_from_a_lavin_file(lavin, tmp_path):
    fields = LEARN | {"data.sources": (str(rows_to_learn(tmp_path)),), "data.images": str(tmp_path)}
    _, config = lavin(**fields)
    inputs = setup.load(config, tmp_path, data=False)
    own = set(arm_model.start(inputs, config.arm["baseline"])[1]) - set(inputs.towers)
    assert len(own) == 17 and learns_from_its_init(config, tmp_path) == own


def test_lavins_settings_are_compared_where_shapes_cannot(lavin, tmp_path):
    _, config = lavin()
    inputs = setup.load(dataclasses.replace(config, init=""), tmp_path, data=False)
    other = dataclasses.replace(config.arm["baseline"], adapter_temperature=10.0, adapter_rank=8)
    asked = dataclasses.replace(config, arm={"baseline": other})
    with pytest.raises(WeightsError) as error:
        arm_model.start(dataclasses.replace(inputs, config=asked), other)
    message = str(error.value)
    assert "config.arm.baseline.adapter_temperature is 10.0" in message and "set it to 5.0" in message
    assert "config.arm.baseline.adapter_rank is 8" in message and "set it to 4" in message


def test_a_lavin_file_of_another_llama_or_clip_names_the_tower_to_set(lavin, tmp_path):
    case, config = lavin()
    inputs = setup.load(dataclasses.replace(config, init=""), tmp_path, data=False)

    def refused(change) -> str:
        held = torch_files.read(case / "checkpoint-start.pth")
        change(held["model"])
        torch.save(held, tmp_path / "other.pth")
        asked = dataclasses.replace(config, init=str(tmp_path / "other.pth"))
        with pytest.raises(WeightsError) as error:
            arm_model.start(dataclasses.replace(inputs, config=asked), config.arm["baseline"])
        return str(error.value)

    def of_13b(held):  # wider, and a layer more
        for key in [key for key in held if key.startswith("module.layers.2.")]:
            held[key.replace("layers.2.", "layers.3.")] = held[key]
        held["module.adapter_modality_embedding.weight"] = torch.zeros(2, 40)

    message = refused(of_13b)
    assert "on 4 layers of width 40, and config.towers.lm has 3 of width 32: set config.towers.lm to the one" in message
    assert len(message.splitlines()) == 2  # and no list of shapes

    def of_another_clip(held):
        key = "module.backbone.visual.transformer.resblocks.0.adapter_attn.conv_A.weight"
        held[key] = torch.zeros(4, 96, 1)

    assert "on 8 layers of width 96, and config.towers.clip has 8 of width 128" in refused(of_another_clip)


def test_a_lavin_file_on_metas_llama_is_asked_about_a_picture(lavin, tmp_path):
    picture = tmp_path / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)).save(picture)
    said = asked("lavin7b_scienceqa", lavin()[1], [str(picture)], tmp_path)
    assert "LaVIN's checkpoint) fills" in said and "a photo.png" in said

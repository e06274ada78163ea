"""LLaMA-Adapter's and LaVIN's checkpoints by config.init, LLaMA's folders: the authors' logits (shared/originals)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import mains
import ml_dtypes
import numpy as np
import pytest
from checkpoint_cases import FEATURES, LOGITS, changed, clip_folder, noise
from close import assert_close
from PIL import Image
from safetensors.numpy import load_file
from tiny import config_of

from eim_jax.commands import chat, exporting
from eim_jax.config import ConfigError
from eim_jax.models.vision.clip import CLIPTextConfig, CLIPVisionConfig
from eim_jax.pretrained import (
    CLIP,
    WeightsError,
    clip_shapes,
    export_clip,
    export_lm,
    fingerprint,
    load_lm,
    resolve,
    torch_files,
)
from eim_jax.training import initial, partition, setup

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install 'eim_jax[parity]'")


def llama_folder(shared_original, place: pathlib.Path, case: pathlib.Path) -> pathlib.Path:
    """Meta's layout: a folder a size, and one tokenizer.model above them."""
    place.mkdir()
    (place / "tokenizer.model").symlink_to(shared_original("tokenizers") / "llama" / "tokenizer.model")
    (place / "7B").symlink_to(case / "7B")
    return place / "7B"


@pytest.fixture
def llama_adapter(shared_original, tmp_path):
    """(case, config whose baseline is that LLaMA-Adapter)."""
    case = shared_original("llama_adapter")
    config = config_of(
        "llama_adapter_scienceqa",
        **{
            "towers.clip": str(clip_folder(tmp_path / "adapter_clip", 12)),
            "towers.lm": str(llama_folder(shared_original, tmp_path / "adapter", case)),
            "arm.baseline.adapter_layers": 3,
            "arm.baseline.st_hidden": 16,
            "arm.baseline.st_heads": 2,
            "towers.scan": False,
            "init": str(case / "adapter.pth"),
        },
    )
    return case, config


def test_llama_adapter_gives_the_authors_logits_on_metas_own_weights(llama_adapter, tmp_path, capsys):
    case, config = llama_adapter
    inputs = setup.load(config, tmp_path, data=False)
    vlm, params = setup.start(inputs, config.arm["baseline"])
    assert "it has no st/*, which stays as it is drawn" in " ".join(capsys.readouterr().out.split())
    theirs = np.load(case / "forward.npz")
    tokens, scored = theirs["examples"][:, 1:], theirs["labels"][:, 1:] > 0
    read = vlm.lm_input(partition.unflatten(params), jnp.asarray(tokens), jnp.asarray(theirs["mask"][:, 1:] > 0))
    logits = vlm.logits(partition.unflatten(params), vlm.run_lm(partition.unflatten(params), read))
    assert_close(np.asarray(logits)[:, :-1][scored], theirs["logits_scored"], LOGITS)


def test_what_contradicts_a_llama_adapter_file_is_named_by_field(llama_adapter, tmp_path):
    case, config = llama_adapter
    inputs = setup.load(dataclasses.replace(config, init=""), tmp_path, data=False)
    arm = config.arm["baseline"]

    def refused(file, **fields) -> str:
        other = dataclasses.replace(arm, **fields)
        asked = dataclasses.replace(config, init=str(file), arm={"baseline": other})
        with pytest.raises(WeightsError) as error:
            setup.start(dataclasses.replace(inputs, config=asked), other)
        return str(error.value)

    assert "30 prompts" in refused(case / "adapter.pth", adapter_layers=2)

    def of_13b(held):
        held["adapter_query.weight"] = torch.zeros(30, 40)
        held["layers.4.attention.gate"] = torch.zeros(1, 4, 1, 1)

    other = refused(changed(case / "adapter.pth", tmp_path / "13b.pth", of_13b))
    assert "on 5 layers of width 40, and config.towers.lm has 4 of width 32: set config.towers.lm to the one" in other
    v2 = changed(
        case / "adapter.pth",
        tmp_path / "v2.pth",
        lambda held: held.update({"layers.1.attention.wq.bias": torch.ones(32)}),
    )
    assert "tunes 1 tensors of LLaMA itself" in refused(v2)
    old = changed(
        case / "adapter.pth",
        tmp_path / "old.pth",
        lambda held: held.update({k: v[:, :1] for k, v in held.items() if k.endswith("gate")}),
    )
    assert "first release of March 2023" in refused(old)
    assert "config.arm.baseline.adapter" in refused(case / "adapter.pth", adapter="lavin", adapter_rank=4)


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
    vlm, params = setup.start(inputs, config.arm["baseline"])
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
    vlm, params = setup.start(inputs, config.arm["baseline"])
    given = initial.given(inputs, config.arm["baseline"], vlm, params)
    assert given == set(params) - set(inputs.towers)
    exporting.write_arm(inputs, "baseline", params, tmp_path / "out", given)
    again = dataclasses.replace(config, init=str(tmp_path / "out"))
    _, read = setup.start(dataclasses.replace(inputs, config=again), config.arm["baseline"])
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


def test_lavins_settings_are_compared_where_shapes_cannot(lavin, tmp_path):
    _, config = lavin()
    inputs = setup.load(dataclasses.replace(config, init=""), tmp_path, data=False)
    other = dataclasses.replace(config.arm["baseline"], adapter_temperature=10.0, adapter_rank=8)
    asked = dataclasses.replace(config, arm={"baseline": other})
    with pytest.raises(WeightsError) as error:
        setup.start(dataclasses.replace(inputs, config=asked), other)
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
            setup.start(dataclasses.replace(inputs, config=asked), config.arm["baseline"])
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


def shards_of(held: dict, parts: int) -> list[dict]:
    """Meta's model parallelism: rows of wq, wk, wv, w1, w3 and output are split, columns of the others."""
    columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    split = {
        key: x.chunk(parts, 1 if key.endswith(columns) else 0) if x.ndim == 2 else [x] * parts
        for key, x in held.items()
    }
    return [{key: pieces[i].clone() for key, pieces in split.items()} for i in range(parts)]


def test_metas_shards_are_joined_and_another_model_s_are_named(shared_original, tmp_path):
    whole = shared_original("llama_adapter") / "7B"
    (tmp_path / "params.json").write_bytes((whole / "params.json").read_bytes())
    held = torch.load(whole / "consolidated.00.pth", weights_only=True)
    for i, part in enumerate(shards_of(held, 2)):
        torch.save(part, tmp_path / f"consolidated.{i:02}.pth")
    expected, found = load_lm(whole), load_lm(tmp_path)
    assert found.config == expected.config
    for path, leaf in partition.flatten(expected.params).items():
        np.testing.assert_array_equal(partition.flatten(found.params)[path], leaf)
    assert fingerprint(tmp_path) != fingerprint(whole)
    part.pop("norm.weight")
    torch.save(part, tmp_path / "consolidated.01.pth")
    with pytest.raises(WeightsError, match=r"consolidated\.01\.pth has other keys"):
        load_lm(tmp_path)


def test_old_bin_files_are_read_and_a_delta_is_named(shared_original, tmp_path):
    """Hugging Face's form of the same LLaMA, as two pytorch_model bins in bfloat16 with an index (Vicuna's)."""
    lm = load_lm(shared_original("llama_adapter") / "7B")
    export_lm(tmp_path / "hf", lm)
    theirs = {
        key: torch.from_numpy(x).bfloat16() for key, x in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(theirs)
    where = {key: f"pytorch_model-{1 + (i % 2):05}-of-00002.bin" for i, key in enumerate(names)}

    def write(change):
        for file in set(where.values()):
            torch.save({key: change(theirs[key]) for key in names if where[key] == file}, tmp_path / "hf" / file)
        index = {"metadata": {}, "weight_map": where}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    write(lambda x: x)
    found = partition.flatten(load_lm(tmp_path / "hf").params)
    for path, leaf in partition.flatten(lm.params).items():
        np.testing.assert_array_equal(found[path], np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32))
    torch.manual_seed(0)
    write(lambda x: 0.004 * torch.randn_like(x))
    with pytest.raises(WeightsError, match=r"differences to another model's weights.*apply_delta"):
        load_lm(tmp_path / "hf")


def spoken_to(monkeypatch, capsys, lines, config, image) -> str:
    """What `--mode=chat` says in a conversation of these lines."""
    typed = iter(lines)

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    decode = dataclasses.replace(config.decode, max_tokens=3)
    chat.chat(dataclasses.replace(config, decode=decode), None, "baseline", image, init=True)
    return " ".join(capsys.readouterr().out.split())


def test_a_llama_adapter_file_talks_without_a_picture_and_says_why(llama_adapter, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "a.png"
    Image.new("RGB", (30, 30)).save(picture)
    _, config = llama_adapter
    said = spoken_to(monkeypatch, capsys, ["Name a colour.", f"/image {picture}"], config, None)
    assert "was trained on text alone: it has no st/*" in said and "a new conversation" not in said
    with pytest.raises(ConfigError, match="trained on text alone"):
        spoken_to(monkeypatch, capsys, [], config, picture)


def asked(name: str, config, more: list[str], tmp_path) -> str:
    """What the README's command says to one question, by a checkpoint in place of a finished run."""
    (tmp_path / "asked.txt").write_text("What is this?\n")
    arm = ("adapter_rank", "adapter_temperature", "adapter_layers", "st_hidden", "st_heads")
    flags = [f"--config=configs/{name}.py", "--mode=chat", f"--init={config.init}", *more]
    flags += [f"--config.towers.{field}={getattr(config.towers, field)}" for field in ("clip", "lm", "scan")]
    flags += [f"--config.arm.baseline.{field}={getattr(config.arm['baseline'], field)}" for field in arm]
    process = mains.Main([*flags, "--config.decode.max_tokens=3"], tmp_path / "said.txt", stdin=tmp_path / "asked.txt")
    assert process.wait() == 0, process.said()
    return process.said()


def test_a_lavin_file_on_metas_llama_is_asked_about_a_picture(lavin, tmp_path):
    picture = tmp_path / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)).save(picture)
    said = asked("lavin7b_scienceqa", lavin()[1], [str(picture)], tmp_path)
    assert "LaVIN's checkpoint) fills" in said and "a photo.png" in said


def test_a_llama_adapter_file_on_pytorch_model_bin_is_asked(llama_adapter, shared_original, tmp_path):
    case, config = llama_adapter
    bins = tmp_path / "bins"
    export_lm(bins, load_lm(case / "7B"))
    torch.save(
        {k: torch.from_numpy(x) for k, x in load_file(bins / "model.safetensors").items()}, bins / "pytorch_model.bin"
    )
    (bins / "model.safetensors").unlink()
    (bins / "tokenizer.model").symlink_to(shared_original("tokenizers") / "llama" / "tokenizer.model")
    config = dataclasses.replace(config, towers=dataclasses.replace(config.towers, lm=str(bins)))
    said = asked("llama_adapter_scienceqa", config, [], tmp_path)
    assert "LLaMA-Adapter's checkpoint) fills" in said and "it has no st/*" in said


def v2_visual(width=16, dim=32, seen=12, blocks=2, queries=10) -> dict:
    """Tensors of noise under the names of LLaMA-Adapter V2's visual part."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"visual_query.weight": (queries, width)}
    shapes |= {"clip_proj.weight": (width, seen), "visual_proj.weight": (dim, width)}
    for i in range(blocks):
        at = f"visual_blocks.{i}"
        shapes |= {f"{at}.attn.qkv.weight": (3 * width, width), f"{at}.attn.proj.weight": (width, width)}
        shapes |= {f"{at}.mlp.fc1.weight": (4 * width, width), f"{at}.mlp.fc2.weight": (width, 4 * width)}
        shapes |= {f"{at}.{norm}.weight": (width,) for norm in ("norm1", "norm2")}
    shapes |= {"clip_proj_norm.weight": (width,), "visual_proj_norm.weight": (dim,)}
    held = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in [name for name in held if "query" not in name]:
        rows = held[name].shape[0]
        held[name.replace("weight", "bias")] = 0.3 * torch.randn(rows, generator=generator)
    return held


def v2_sees(held: dict, seen):
    """What their forward_visual makes of CLIP's features, written with torch's functions."""
    functional = torch.nn.functional

    def linear(name, x):
        return functional.linear(x, held[f"{name}.weight"], held[f"{name}.bias"])

    def norm(name, x):
        return functional.layer_norm(x, x.shape[-1:], held[f"{name}.weight"], held[f"{name}.bias"])

    image = norm("clip_proj_norm", linear("clip_proj", seen))
    x = torch.cat([held["visual_query.weight"].expand(len(seen), -1, -1), image], dim=1)
    for i in range(2):
        at, (b, n, d) = f"visual_blocks.{i}", x.shape
        q, k, v = linear(f"{at}.attn.qkv", norm(f"{at}.norm1", x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + linear(f"{at}.attn.proj", mixed)
        x = x + linear(f"{at}.mlp.fc2", functional.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", x))))
    return norm("visual_proj_norm", linear("visual_proj", x[:, :10]))


def test_llama_adapter_v2_s_visual_part_sees_as_theirs(llama_adapter, tmp_path):
    case, config = llama_adapter
    visual = v2_visual()

    def make(held):
        gates = {key: held.pop(key) for key in list(held) if key.endswith("gate")}
        held |= {f"llama.{key}": gate for key, gate in gates.items()} | visual

    file = changed(case / "adapter.pth", tmp_path / "v2.pth", make)
    inputs = setup.load(dataclasses.replace(config, init=str(file)), tmp_path, data=False)
    vlm, params = setup.start(inputs, config.arm["baseline"])
    torch.manual_seed(1)
    seen = torch.randn(2, 5, 12)
    ours = vlm.st.apply({"params": partition.unflatten(params)["st"]}, jnp.asarray(seen.numpy()))
    assert_close(ours, v2_sees(visual, seen).numpy())

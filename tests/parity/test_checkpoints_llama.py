"""LLaMA-Adapter's checkpoints by config.init: the authors' logits (shared/originals), v2's visual part."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    LEARN,
    LOGITS,
    asked,
    changed,
    clip_folder,
    learns_from_its_init,
    llama_folder,
    rows_to_learn,
)
from close import assert_close
from PIL import Image
from safetensors.numpy import load_file
from tiny import config_of

from eim_jax.commands import chat
from eim_jax.config import ConfigError
from eim_jax.pretrained import (
    WeightsError,
    export_lm,
    load_lm,
)
from eim_jax.training import arm_model, partition, setup

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")


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
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
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
            arm_model.start(dataclasses.replace(inputs, config=asked), other)
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


def test_training_goes_on_from_a_llama_adapter_file(llama_adapter, tmp_path):
    _, config = llama_adapter
    own = {"towers.clip": config.towers.clip, "towers.lm": config.towers.lm, "init": config.init}
    arm = {f"arm.baseline.{name}": getattr(config.arm["baseline"], name) for name in ("adapter_layers", "st_hidden")}
    fields = LEARN | {"data.sources": (str(rows_to_learn(tmp_path)),), "data.images": str(tmp_path)}
    fields |= {"stages.base.train": ("lm/adapter/.*",), "arm.baseline.st_heads": 2, "towers.scan": False}
    moved = learns_from_its_init(config_of("llama_adapter_scienceqa", **own, **arm, **fields), tmp_path)
    assert moved == {"lm/adapter/tokens", "lm/adapter/gate"}


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
    vlm, params = arm_model.start(inputs, config.arm["baseline"])
    torch.manual_seed(1)
    seen = torch.randn(2, 5, 12)
    ours = vlm.st.apply({"params": partition.unflatten(params)["st"]}, jnp.asarray(seen.numpy()))
    assert_close(ours, v2_sees(visual, seen).numpy())

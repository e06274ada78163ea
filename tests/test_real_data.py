"""Real files through the whole command: ScienceQA with pictures, instruction tasks, a conversation."""

import json
import os
import pathlib
import subprocess
import sys

import mains
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("base", "st", "lm", "adapter", "ie")
MODELS = {
    "lavin7b_eim_scienceqa": {},
    "llama_adapter_eim_scienceqa": {
        "arm.eim.st_hidden": 64,
        "arm.eim.st_heads": 4,
        "arm.eim.adapter_layers": 2,
        "arm.eim.prompts": 2,
        "arm.eim.prompt_hidden": 16,
    },
}


def script(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def succeed(flags, folder, typed=""):
    """What a process of `main` with these flags said, given this to read."""
    stdin = folder / "typed.txt"
    stdin.write_text(typed)
    code, said = mains.run(flags, folder / "said.txt", timeout=580, stdin=stdin)
    assert code == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def towers(tmp_path_factory, shared_data):
    """Small random towers with the real tokenizers of CLIP and of a SentencePiece LLaMA."""
    tokenizers = shared_data("tokenizers")
    out = tmp_path_factory.mktemp("towers")
    names = (f"--clip_tokenizer={tokenizers / 'clip'}", f"--lm_tokenizer={tokenizers / 'tok512'}")
    script("scripts/make_towers.py", "--size=small", "--lm=llama", *names, f"--out={out}")
    return out


def command(towers, config, workdir, fields):
    common = {
        "towers.clip": towers / "clip",
        "towers.lm": towers / "lm",
        "towers.scan": True,
        "towers.remat": "none",
        "towers.quant": "none",
        "data.max_tokens": 128,
        "data.max_tokens_text_only": 128,
        "decode.max_tokens": 8,
        "decode.batch": 6,
        "log_every": 1,
    }
    for name in STAGES:
        common |= {f"stages.{name}.steps": 2, f"stages.{name}.batch": 8}
        common |= {f"stages.{name}.warmup_epochs": 0.0, f"stages.{name}.warmup_steps": 1}
    flags = [f"--config.{field}={value}" for field, value in {**common, **fields}.items()]
    return [f"--config=configs/{config}.py", f"--workdir={workdir}", *flags]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("config", ["lavin7b_eim_scienceqa", "llama_adapter_eim_scienceqa"])
def test_the_official_scienceqa_layout_trains_and_scores_through_all_four_stages(config, towers, shared_data, tmp_path):
    data = shared_data("scienceqa_mini")
    fields = {"data.folder": data, "data.splits": "('train','val','val')", **MODELS[config]}
    succeed(command(towers, config, tmp_path / "run", fields), tmp_path)
    record = json.loads((tmp_path / "run/eim/run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["st", "lm", "adapter", "ie"]
    asked = json.loads((data / "pid_splits.json").read_text())["val"]
    file = tmp_path / "run/eim/predictions_test.json"
    predictions = json.loads(file.read_text())
    assert list(predictions["results"]) == asked and list(predictions["outputs"]) == asked
    problems = json.loads((data / "problems.json").read_text())
    assert 0 < sum(problems[id_]["image"] is not None for id_ in asked) < len(asked)  # with and without a picture
    # The scorer, run on the file that the run wrote, says what the run says.
    scorer = ("-m", "eim_jax.evaluation.metrics.scienceqa")
    said = json.loads(script(*scorer, f"--predictions={file}", f"--data={data}", "--split=val"))
    scores = json.loads((tmp_path / "run/eim/scores_test.json").read_text())["greedy"]
    assert said["Avg"] == pytest.approx(100 * scores["accuracy/Avg"])
    assert said["unparsed"] == sum(index == -1 for index in predictions["results"].values())
    assert problems[asked[0]]["choices"][0] in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_instruction_tasks_train_the_chatbot_which_then_answers_about_a_picture(towers, shared_data, tmp_path):
    sources = tuple(
        str(shared_data("instruct") / name) for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl")
    )
    fields = {
        "data.sources": repr(sources),
        "data.images": "",
        "data.mme": "",
        "arm.eim.sequence": "('lm','adapter')",
        "arm.eim.visual_adapter": False,  # no stage of text alone would train it
        "arm.eim.visual_routing": "sample",
    }
    asked = command(towers, "lavin7b_eim_chat", tmp_path / "run", fields)
    assert "trained, not scored" in succeed(asked, tmp_path)
    image = next((shared_data("coco_ccby") / "images").glob("*.jpg"))
    talk = ("--mode=chat", f"--workdir={tmp_path / 'run'}", f"--image={image}")
    lines = succeed(talk, tmp_path, "What is in the picture?\n/text\nSay hello.\n/nonsense\n/quit\n")
    assert f"image {image}" in lines.replace("\n", "") and "no image, a new conversation" in lines
    # Without a picture in the data, the losses that need one are refused before anything trains.
    fields["arm.eim.sequence"] = "('st','adapter')"
    code, said = mains.run(command(towers, "lavin7b_eim_chat", tmp_path / "other", fields), tmp_path / "refused.txt")
    assert code == 1 and "no training sample has an image, so loss_ST has no rows" in " ".join(said.split())

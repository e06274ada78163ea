"""Drawn pictures with questions in local files, and a short run on them: what a public harness is compared on."""

import json

import mains
from PIL import Image

from eim_jax.data.miniature import captioning
from eim_jax.data.miniature.chat import yes_no
from eim_jax.data.miniature.drawing import Dice

ARM = "baseline"
SIDE = 128  # pixels: VLMEvalKit enlarges what is smaller than 100


def write_rows(path, rows):
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw_questions(folder, pictures):
    """Draws pictures into a folder and returns rows in the plain form: of each a question with yes, one with no."""
    drawn, dice = captioning.load("test", 0, pictures), Dice(0, 0, 0)
    rows = []
    for number, (name, scene) in enumerate(drawn.scenes.items()):
        file = folder / f"{name}.png"
        drawn.images[number].resize((SIDE, SIDE), Image.Resampling.NEAREST).save(file)
        for answer in (True, False):
            asked = yes_no("existence", scene, answer, dice)
            rows.append({"image": file.name, "question": asked.instruction, "answer": asked.response})
    return rows


def train(folder, steps, batch=8):
    """Trains an arm on `questions.jsonl` of a folder; returns the work directory."""
    workdir = folder / "run"
    few = {"steps": steps, "batch": batch, "warmup_steps": 1, "warmup_epochs": 0.0}
    code, said = mains.run(
        [
            *("--config=configs/vqa.py", f"--workdir={workdir}", f"--config.data.images={folder}"),
            f"--config.data.sources=('{folder / 'questions.jsonl'}',)",
            *("--config.towers.clip=miniature/clip", "--config.towers.lm=miniature/llama"),
            *("--config.data.template=plain", "--config.data.eval_share=0.2", "--config.decode.max_tokens=8"),
            *(
                f"--config.arms=('{ARM}',)",
                f"--config.arm.{ARM}.sequence=('tune',)",
                f"--config.arm.{ARM}.st_hidden=32",
                "--config.eval.every_epochs=0",
            ),
            *("--config.checkpoint.keep=last", "--config.checkpoint.metric=", "--config.decode.batch=8"),
            *(f"--config.stages.tune.{name}={value}" for name, value in few.items()),
        ],
        folder / "trained.txt",
    )
    assert code == 0, said[-3000:]
    return workdir


def own_scores(workdir, rows, folder):
    """What `--mode=eval` gives of other rows: their exact match, and each answer in the rows' order."""
    write_rows(folder / "own.jsonl", rows)
    flags = ["--mode=eval", f"--workdir={workdir}", f"--config.data.eval_sources=('{folder / 'own.jsonl'}',)"]
    code, said = mains.run(flags, folder / "evaluated.txt")
    assert code == 0, said[-3000:]
    [scores] = (workdir / ARM / "evals").glob("*/scores_test.json")
    said = json.loads((scores.parent / "predictions_test.json").read_text())["outputs"]
    return json.loads(scores.read_text())["greedy"]["exact_match"], [said[f"own/{i}/0"] for i in range(len(rows))]

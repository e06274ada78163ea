"""lmms-eval as its authors publish it: its command line finds a run, asks it, and scores it as `--mode=eval` does."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval in an environment of its own: make harness")

from local_task import ARM, draw_questions, own_scores, train, write_rows

TASK = """
task: own_pictures
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_visual: !function own_pictures.pictures
doc_to_text: !function own_pictures.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false, until: ["\\n\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
"""
FUNCTIONS = """
from PIL import Image


def pictures(row):
    return [Image.open(FOLDER + "/" + row["image"]).convert("RGB")]


def question(row):
    return row["question"]
"""


@pytest.mark.slow
def test_the_command_line_of_lmms_eval_scores_a_run_as_the_run_scores_itself(tmp_path):
    rows = draw_questions(tmp_path, 24)
    write_rows(tmp_path / "questions.jsonl", rows)
    workdir = train(tmp_path, 20)
    asked = rows[:13]
    score, said = own_scores(workdir, asked, tmp_path)
    assert len(set(said)) > 1  # pictures and questions are told apart: an order that got lost would be seen

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_rows(tmp_path / "rows.jsonl", asked)
    (tasks / "own_pictures.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    (tasks / "own_pictures.py").write_text(FUNCTIONS.replace("FOLDER", repr(str(tmp_path))))
    command = [sys.executable, "-m", "lmms_eval", "--model", "eim_jax", "--model_args", f"workdir={workdir},arm={ARM}"]
    command += ["--tasks", "own_pictures", "--include_path", tasks, "--output_path", tmp_path / "out", "--log_samples"]
    own = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    [result] = (tmp_path / "out").rglob("*_results.json")
    [samples] = (tmp_path / "out").rglob("*_samples_own_pictures.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == said
    assert json.loads(result.read_text())["results"]["own_pictures"]["exact_match,none"] == pytest.approx(score)

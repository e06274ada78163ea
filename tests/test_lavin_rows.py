"""LaVIN's all_data.json as training data: its prompts to the last space, its pictures from two folders."""

import json

import numpy as np
import pytest
from PIL import Image

from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.instruct import load_instruct


def draw(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    return file


def row(qid, image=None, source=None, **changes):
    return {
        "instruction": f"Instruction: Question {qid}? \nResponse:", "answer": "Yes. ", "image": image,
        "image_source": source, "qid": qid, "options": None, **changes,
    }  # fmt: skip


@pytest.fixture
def mixed(tmp_path):
    """(all_data.json, COCO's folder, ScienceQA's folder) with a row of text, one of COCO and one of ScienceQA."""
    draw(tmp_path / "coco" / "COCO_train2014_000000000009.png", 1)
    draw(tmp_path / "sqa" / "17" / "image.png", 2)
    rows = [
        row("alpaca_0"),
        row("gpt4_0", "000000000009.png", "mscoco"),
        row("17", "image.png", "sqa", options=["a", "b"]),
    ]
    file = tmp_path / "all_data.json"
    file.write_text(json.dumps({"all": rows}, indent=1))
    return file, tmp_path / "coco", tmp_path / "sqa"


@pytest.mark.parametrize("indent", [None, 1])
def test_prompts_stay_as_they_are_and_pictures_come_from_both_folders(mixed, indent):
    file, coco, sqa = mixed
    rows = json.loads(file.read_text())["all"]
    file.write_text(json.dumps({"all": rows}, indent=indent))
    split, report = load_instruct([file], coco, scienceqa_images=sqa)
    assert [s.id for s in split.samples] == ["all_data/alpaca_0/0", "all_data/gpt4_0/0", "all_data/17/0"]
    assert [s.instruction for s in split.samples] == [r["instruction"] for r in rows]
    assert {s.response for s in split.samples} == {"Yes. "} and not report.notes
    drawn = (coco / "COCO_train2014_000000000009.png", sqa / "17" / "image.png")
    for sample, picture in zip(split.samples[1:], drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(split.images[sample.image]), np.asarray(Image.open(picture)))
    assert split.samples[0].image is None


def test_lavins_own_rows_keep_their_prompts_and_answers(shared_original, tmp_path):
    source = shared_original("prompts") / "instruct.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for one in rows:  # what the folder's makers put beside LaVIN's own keys
        one.pop("source"), one.pop("llama_adapter_prompt", None)
    for number, image in enumerate(sorted({r["image"] for r in rows} - {None})):
        draw(tmp_path / "coco" / f"COCO_train2014_{image}", number)
    file = tmp_path / "all_data.json"
    file.write_text(json.dumps({"all": rows}))
    with pytest.raises(BadDataError, match=r'alpaca_4.*"answer" is empty'):
        load_instruct([file], tmp_path / "coco")
    split, _ = load_instruct([file], tmp_path / "coco", on_bad="drop")
    kept = [r for r in rows if r["answer"]]
    assert [(s.instruction, s.response) for s in split.samples] == [(r["instruction"], r["answer"]) for r in kept]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_source": "flickr", "image": "a.jpg"}, 'neither "mscoco" nor "sqa"'),
        ({"image_source": "sqa", "image": "image.png", "qid": None}, '"qid" is missing'),
        ({"image_source": "sqa", "image": "image.png", "qid": "404"}, "no such file"),
        ({"image_source": "mscoco", "image": "no.jpg"}, "no such file"),
        ({"image": 3}, '"image" must be the name'),
        ({"instruction": "<image> What?\nResponse:"}, "the marker <image>"),
        ({"answer": " "}, '"answer" is empty'),
        ({"history": [["a", "b"]]}, "history"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(mixed, change, problem):
    file, coco, sqa = mixed
    file.write_text(json.dumps({"all": [row("ok"), row("bad") | change]}))
    with pytest.raises(BadDataError) as error:
        load_instruct([file], coco, scienceqa_images=sqa)
    assert problem in str(error.value)


def test_what_the_file_needs_and_what_is_not_read_is_said(mixed, tmp_path):
    file, coco, sqa = mixed
    with pytest.raises(ValueError, match=r"config\.data\.scienceqa_images"):
        load_instruct([file], coco)
    with pytest.raises(FileNotFoundError, match="no image folder"):
        load_instruct([file], coco, scienceqa_images=tmp_path / "nowhere")
    file.write_text(json.dumps({"all": [], "test": []}))
    with pytest.raises(ValueError, match=r"beside \"all\" it holds 'test'"):
        load_instruct([file], coco, scienceqa_images=sqa)
    file.write_text(json.dumps({"all": [row("1", extra=1)]}))
    assert load_instruct([file], None).report.notes == ("all_data.json: keys that are not read: 'extra' (1 rows)",)

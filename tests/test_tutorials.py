"""The tutorials are followed: their own commands and code, in their order, on a few photos, with few steps."""

import contextlib
import csv
import functools
import io
import json
import os
import re
import shlex

import docs_text as docs
import mains
import pytest
from PIL import Image
from test_examples import example

import eim_jax

PAGES = docs.ROOT / "docs" / "tutorials"
PHOTOS = 10
FEW = {"steps": 2, "warmup_steps": 1, "warmup_epochs": 0.0, "batch": 4}
SHORT = ["--config.decode.methods=('greedy',)", "--config.decode.max_tokens=5", "--config.decode.java=False"]


def fences(page):
    """(language, text) of each block, in order."""
    return [(found["kind"], found["text"]) for found in docs.FENCE.finditer(docs.text(PAGES / page))]


def commands(page):
    """The words of each command line."""
    text = "".join(text for kind, text in fences(page) if kind == "sh").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


def few(*stages):
    return [f"--config.stages.{stage}.{name}={value}" for stage in stages for name, value in FEW.items()] + SHORT


class Follower:
    """Follows a page in a folder: `eim_jax` commands as processes, Python blocks one after the other."""

    def __init__(self, folder):
        self.folder, self.names, self.number = folder, {"__name__": "page"}, 0

    def command(self, words, further=(), typed=""):
        assert words[0] == "eim_jax"
        self.number += 1
        stdin = self.folder / "typed.txt"
        stdin.write_text(typed)
        before = functools.partial(os.chdir, self.folder)
        run = mains.Main([*words[1:], *further], self.folder / f"said{self.number}.txt", stdin, before)
        assert run.wait() == 0, run.said()[-3000:]
        return run.said()

    def python(self, text):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.chdir(self.folder):
            exec(compile(text, "a tutorial", "exec"), self.names)
        return said.getvalue()


@pytest.fixture
def follower(tmp_path):
    return Follower(tmp_path)


@pytest.fixture
def captions(shared_data):
    """COCO's captions of a few photos, and their folder."""
    folder = shared_data("coco_ccby")
    known = json.loads((folder / "captions.json").read_text())
    images = known["images"][:PHOTOS]
    ids = {image["id"] for image in images}
    return {"images": images, "annotations": [a for a in known["annotations"] if a["image_id"] in ids]}, folder


def take(captions, out):
    """Copies the photos, smaller, into a folder."""
    out.mkdir()
    for image in captions[0]["images"]:
        photo = Image.open(captions[1] / "images" / image["file_name"])
        photo.reduce(4).save(out / image["file_name"])


@pytest.mark.parametrize("page", ["photos.md", "vqa.md"])
def test_the_second_pass_differs_from_the_first_by_its_towers_and_what_they_need(page):
    one, other = (words for words in commands(page) if not any(word.startswith("--mode") for word in words))
    own = [word for word in one if word not in other]
    assert "--workdir=runs/first" in own and "--config.towers.clip=miniature/clip" in own
    needed = r"--(workdir|config\.(towers\.|data\.template|stages\.\w+\.(epochs|lr)=|eval\.every_epochs)).*"
    assert all(re.fullmatch(needed, word) for word in own)
    assert [word for word in other if word not in one and not word.startswith("--workdir")] == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_own_photos_in_ten_minutes(follower, captions):
    folder = follower.folder
    take(captions, folder / "photos")
    first = {a["image_id"]: a["caption"] for a in captions[0]["annotations"]}
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        rows.writerows([image["file_name"], first[image["id"]]] for image in captions[0]["images"])
    make, use = (text for kind, text in fences("photos.md") if kind == "python")
    assert follower.python(make) == f"{PHOTOS} captions of {PHOTOS} photos\n"
    train, caption, _ = commands("photos.md")
    small = ["--config.arm.eim.st_hidden=32", "--config.arm.eim.prompt_hidden=16", "--config.log_every=1"]
    said = follower.command(train, [*few("st", "lm", "ie"), *small])
    assert "report.html" in said
    follower.command(caption)
    written = json.loads((folder / "runs/first/captions.json").read_text())
    assert len(written) == PHOTOS and (folder / "runs/first/report.html").exists()
    use = use.replace("000000000785.jpg", captions[0]["images"][0]["file_name"])
    assert follower.python(use).splitlines()[-1] == str([written[0]["caption"]])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_vqa_set_with_lora(follower, captions):
    take(captions, follower.folder / "pictures")
    rows = example("questions_from_captions").questions(captions[0])
    (follower.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [json.loads(line) for kind, text in fences("vqa.md") if kind == "json" for line in text.splitlines()]
    assert all(row in rows for row in shown)
    train, chat, export, _ = commands("vqa.md")
    small = ["--config.arm.baseline.st_hidden=32", "--config.eval.train=4", "--config.eval.every_epochs=0.75"]
    said = follower.command(train, [*few("align", "tune"), *small])
    assert "low-rank terms (LoRA)" in said and "eval/exact_match" in said
    picture = captions[0]["images"][0]["file_name"]
    chat = [word.replace("000000000785.jpg", picture) for word in chat]
    question = "Is there a person in the picture?"
    said = follower.command(chat, typed=f"{question}\n")
    answer = eim_jax.load(follower.folder / "runs/first").ask(follower.folder / "pictures" / picture, question)
    assert answer and f"> {answer}" in said.splitlines()
    follower.command(export)
    assert (follower.folder / "answers/lora/lm/adapter_model.safetensors").exists()
    assert (follower.folder / "answers/trained.safetensors").exists()


def test_the_losses_page_prints_what_it_says(follower):
    said, number = "", re.compile(r"-?\d+\.\d+")
    for kind, text in fences("losses.md"):
        if kind == "python":
            said += follower.python(text)
        elif kind == "text":
            assert number.sub("0", said) == number.sub("0", text)
            found, claimed = (list(map(float, number.findall(one))) for one in (said, text))
            assert found == pytest.approx(claimed, abs=0.05)
            said = ""
    assert said == ""


def test_readers_see_every_tutorial():
    listed = docs.text(PAGES / "index.md")
    pages = {page.name for page in PAGES.glob("*.md")} - {"index.md"}
    assert pages and all(f"({page})" in listed for page in pages)

"""The gallery: captions fall into the group that they belong to by the scene, and the page shows the first of each."""

import json

import numpy as np
import pytest
from PIL import Image

from eim_jax.configs import miniature
from eim_jax.data.miniature import captioning
from eim_jax.data.miniature.drawing import Scene, Thing
from scripts import gallery_page

WRONG = {("red", "diamond"), ("black", "ring")}


def naming(pairs):
    return "there is " + " and ".join(f"a {colour} {shape}" for colour, shape in sorted(pairs)) + "."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page's text and folder, of a run whose captions are right by a known pattern; and that pattern."""
    tmp_path, split = tmp_path_factory.mktemp("gallery"), captioning.load("test")
    right = {"baseline": lambda i: i % 4 in (0, 2), "eim": lambda i: i % 4 in (0, 1)}
    for arm, is_right in right.items():
        said = [
            {
                "image_id": key,
                "caption": naming(scene.pairs if is_right(i) else {("red", "diamond"), ("black", "ring")}),
            }
            for i, (key, scene) in enumerate(split.scenes.items())
        ]
        (tmp_path / "run" / arm).mkdir(parents=True)
        (tmp_path / "run" / arm / "predictions_test.json").write_text(json.dumps(said))
    config = miniature.get_config()
    run = {
        "config": config.to_dict(),
        "command": "python -m eim_jax.main --config=configs/miniature.py --workdir=/home/somebody/run",
        "machine": {"cpu_cores": 2},
        "versions": {"jax": "0.10.2"},
        "started": "2026-01-02T03:04:05+00:00",
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    (tmp_path / "docs" / "results").mkdir(parents=True)
    gallery_page.main([str(tmp_path / "run"), f"--out={tmp_path / 'docs'}"])
    return (tmp_path / "docs/results/gallery.md").read_text(), tmp_path / "docs", split


def test_a_verdict_says_what_is_wrong_and_what_is_left_out():
    things = (("red", "star", 0), ("blue", "ring", 1))
    scene = Scene(tuple(Thing(shape, colour, column=column) for colour, shape, column in things))
    assert gallery_page.verdict("a red star beside a blue hoop.", scene) == "✓"
    assert gallery_page.verdict("a red star and a green box", scene) == "wrong: green square; left out: blue ring"
    assert gallery_page.verdict("some other shapes", scene) == "left out: blue ring, red star"


def test_each_picture_stands_in_the_group_of_its_captions(written):
    page, _, split = written
    ids = list(split.scenes)
    sections = page.split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == list(gallery_page.GROUPS.values())
    for place, section in enumerate(sections):
        rows = [line for line in section.splitlines() if line.startswith("| ![")]
        assert [line.split("]")[0].removeprefix("| ![") for line in rows] == ids[place::4][: gallery_page.EACH]
        ticks = [[cell.endswith("*✓*") for cell in line.strip("| ").split(" | ")[1:3]] for line in rows]
        assert ticks == [[place in (0, 2), place in (0, 1)]] * len(rows)
        new = [int(line.split("]")[0].rpartition("-")[2]) % 2 == 1 for line in rows]  # every second test scene
        assert ["*new pair*" in line for line in rows] == new
    assert "| 400 test pictures | |" in page and page.count("| 100 |\n") == 4
    assert "(seed 0), 2026-01-02, 2 CPU cores, jax 0.10.2" in page and "somebody" not in page


def test_the_pictures_are_the_scenes_enlarged(written):
    page, docs, split = written
    shown = {file.stem for file in (docs / "assets/gallery").glob("*.png")}
    assert shown == set(list(split.scenes)[: 4 * gallery_page.EACH])
    assert all(f"(../assets/gallery/{key}.png)" in page for key in shown)
    key = list(split.scenes)[3]
    found = np.asarray(Image.open(docs / "assets/gallery" / f"{key}.png").convert("RGB"))
    assert (found[:: gallery_page.SCALE, 1 :: gallery_page.SCALE] == split.pixels[3]).all()


def test_what_is_no_run_of_the_miniature_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no run of the miniature"):
        gallery_page.main([str(tmp_path)])

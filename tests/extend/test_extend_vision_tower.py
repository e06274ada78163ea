"""A family of vision towers added from here: the example of the docs reads a folder that CLIP's reader refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from eim_jax.models.vision import VISION_TOWERS, TextTower, VisionTower
from eim_jax.pretrained import WeightsError, clip_config, load_clip, resolve

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "vision_towers.md"


@pytest.fixture
def folder(tmp_path):
    """CLIP's miniature under another model_type and another name for the joint space's width."""
    shutil.copytree(resolve("miniature/clip"), tmp_path / "tower")
    file = tmp_path / "tower" / "config.json"
    theirs = json.loads(file.read_text())
    theirs |= {"model_type": "clip_like", "joint_dim": theirs.pop("projection_dim")}
    file.write_text(json.dumps(theirs))
    return tmp_path / "tower"


def test_the_example_of_the_docs_reads_a_folder_of_its_own(folder, monkeypatch):
    with pytest.raises(WeightsError, match="model_type is 'clip_like'; the vision tower is a 'clip' or"):
        clip_config(folder)
    monkeypatch.setitem(VISION_TOWERS, "clip_like", None)  # so that what the example puts there is taken out again
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S).group(1), {})
    ours, theirs = load_clip("miniature/clip"), load_clip(folder)
    assert theirs.vision.model_type == "clip_like" and theirs.vision.joint == ours.vision.joint
    for one, other in ((ours.params["visual"], theirs.params["visual"]), (ours.params["text"], theirs.params["text"])):
        np.testing.assert_array_equal(one["projection"]["kernel"], other["projection"]["kernel"])


@pytest.mark.parametrize("family", VISION_TOWERS.values(), ids=VISION_TOWERS.keys())
def test_the_modules_of_every_family_play_their_roles(family):
    vision, text = next(iter(family.published.values()))
    tower = family.build(vision)
    assert isinstance(tower, VisionTower)
    assert tower.features == family.features and vision.model_type == family.model_type
    assert (text is None) == (family.build_text is None) == (vision.joint == 0)
    if text is not None:
        assert isinstance(family.build_text(text), TextTower) and vision.joint == text.joint

"""Claims: pictures are made as the folder's file says, or it is refused by its field; oracle: transformers."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from eim_jax.config import from_config_dict
from eim_jax.configs import miniature
from eim_jax.pretrained import WeightsError, clip_config, image_processor, resolve
from eim_jax.training import setup
from eim_jax.utils.images import CLIP_MEAN, clip_preprocess, normalise

HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}


@pytest.fixture
def folder(tmp_path):
    """Returns a function: the miniature's CLIP with this preprocessor_config.json and processor_config.json."""
    shutil.copy(resolve("miniature/clip") / "config.json", tmp_path)
    usual = json.loads((resolve("miniature/clip") / "preprocessor_config.json").read_text())

    def write(plain=None, processor=None, usual=usual):
        if plain is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps({**usual, **plain}))
        if processor is not None:
            (tmp_path / "processor_config.json").write_text(json.dumps(processor))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "fields",
    [
        HALF,
        {"image_mean": 0.5, "image_std": 0.5},
        {"do_normalize": False},
        {**HALF, "do_rescale": False},
        {**HALF, "do_rescale": False, "do_normalize": False},
        {**HALF, "rescale_factor": 1 / 127.5},
        {"size": 32, "crop_size": 32},
        {"size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_pixels_are_those_of_transformers_on_the_same_folder(folder, fields, nested):
    usual = json.loads((resolve("miniature/clip") / "preprocessor_config.json").read_text())
    # The nested one wins, so that what stands in the other file must not count.
    place = folder({"image_mean": [0, 0, 0]}, {"image_processor": {**usual, **fields}}) if nested else folder(fields)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 57, 3), np.uint8))
    expected = CLIPImageProcessorPil.from_pretrained(place)(picture, return_tensors="np")["pixel_values"][0]
    fit = "stretch" if "height" in str(fields.get("size")) else "crop"
    vision, _ = clip_config(place)
    found = image_processor(place)
    found.check(vision.image_size, fit)
    assert (vision.mean, vision.std) == (found.mean, found.std)
    pixels = jnp.asarray(clip_preprocess(picture, vision.image_size, fit)[None])
    ours = np.moveaxis(np.asarray(normalise(pixels, vision.mean, vision.std)[0]), 2, 0)
    # clip_preprocess rounds to one grey level, which is 1 / 255 before it is divided by the standard deviation.
    np.testing.assert_allclose(ours, expected, atol=1.01 / 255 / min(found.std))
    assert str(found.file).endswith("/processor_config.json" if nested else "/preprocessor_config.json")


def test_the_statistics_and_their_file_are_said(folder):
    assert re.search(r"mean \(0\.481455, .*\), from CLIP: the folder has no pre", image_processor(folder()).describe())
    assert clip_config(folder())[0].mean == CLIP_MEAN
    text = image_processor(folder(HALF)).describe()
    assert text.startswith("mean (0.5, 0.4, 0.3) and standard deviation (0.5, 0.25, 0.2), from ")
    assert text.endswith("/preprocessor_config.json")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"resample": 1}, r"resample 1 is not supported, only 2 \(bilinear\) and 3 \(bicubic\)"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_normalize": "no"}, "do_normalize is 'no'"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0\.5, 0\.5\], not one number for each"),
        ({"image_mean": ["0", 0, 0]}, "image_mean"),
        ({"image_mean": [float("nan"), 10**400, 0]}, "image_mean"),
        ({"rescale_factor": 10**400}, "rescale_factor"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std .* must be above 0"),
        ({"rescale_factor": "1"}, "rescale_factor is '1'"),
        ({"size": {"shortest_edge": "32"}}, "size is"),
        ({"crop_size": -1}, "crop_size is -1"),
        ({"image_processor_type": "ViTImageProcessor", "resample": None}, "'ViTImageProcessor' has .* for .*resample"),
    ],
)
def test_what_is_not_done_here_is_refused_by_file_and_field(folder, fields, match):
    with pytest.raises(WeightsError, match=rf"/preprocessor_config\.json: .*{match}"):
        clip_config(folder(fields))
    (folder() / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=rf"/processor_config\.json: .*{match}"):
        clip_config(folder(processor={"image_processor": {"image_mean": [0.5] * 3, **fields}}))


def test_a_nested_processor_that_is_none_is_named(folder):
    with pytest.raises(WeightsError, match=r"processor_config\.json: image_processor is 'CLIP', not an object"):
        clip_config(folder(processor={"image_processor": "CLIP"}))
    without = {"processor_class": "CLIPProcessor", "image_processor": None}
    assert image_processor(folder(HALF, processor=without)).mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("fields", "stretch", "match"),
    [
        ({"size": {"height": 32, "width": 32}}, True, "size .* set config.data.fit=stretch"),
        ({"do_center_crop": False}, True, "do_center_crop is false"),
        ({"size": {"shortest_edge": 24}}, True, r"size \{'shortest_edge': 24\} is not the tower's image_size, 32"),
        ({"size": {"height": 40, "width": 40}}, False, "size .* is not the tower's image_size, 32"),
        ({"crop_size": {"height": 24, "width": 24}}, False, "crop_size .* is not the tower's image_size, 32"),
    ],
)
def test_pictures_that_the_runs_fit_would_make_otherwise_are_refused(folder, fields, stretch, match):
    found = image_processor(folder(fields))
    with pytest.raises(WeightsError, match=rf"preprocessor_config\.json: {match}"):
        found.check(32, "crop")
    if stretch:
        found.check(32, "stretch")
    else:
        with pytest.raises(WeightsError, match="is not the tower's image_size"):
            found.check(32, "stretch")


def test_a_run_refuses_what_its_fit_contradicts_and_its_log_names_statistics_and_file(folder, tmp_path, capsys):
    config = from_config_dict(miniature.get_config())
    config = dataclasses.replace(config, towers=dataclasses.replace(config.towers, clip=str(tmp_path)))
    folder({"size": {"height": 32, "width": 32}})
    with pytest.raises(WeightsError, match=r"set config\.data\.fit=stretch"):
        setup.load(config, tmp_path, data=False)
    shutil.copytree(resolve("miniature/clip"), tmp_path, dirs_exist_ok=True)
    folder(HALF)
    setup.load(config, tmp_path, data=False)
    statistics = "mean (0.5, 0.4, 0.3) and standard deviation (0.5, 0.25, 0.2)"
    assert f"normalised by {statistics}, from {tmp_path}/preprocessor_config.json" in capsys.readouterr().out

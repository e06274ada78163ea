"""Claims about decoding, CLIP's crop and normalisation; oracles: transformers' processor, NumPy and closed forms."""

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from eim_jax.utils.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    clip_preprocess,
    load_rgb,
    normalise,
    to_rgb,
)


def gradient(width, height):
    """A picture in which every pixel is different enough for an off-by-one to show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x * 7 + y * 13) % 256], -1).astype(
        np.uint8
    )


def official(picture, size):
    """transformers' crop before rescaling and normalising."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    pixels = processor(picture, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(pixels, 0, -1).astype(int)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    "shape", [(640, 427), (427, 640), (33, 32), (31, 97), (225, 224), (1000, 17), (5, 5), (224, 224)]
)
def test_crop_equals_transformers_on_odd_sizes(shape, size):
    picture = Image.fromarray(gradient(*shape))
    ours = clip_preprocess(picture, size)
    assert ours.shape == (size, size, 3) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - official(picture, size)).max() <= 1


@pytest.mark.parametrize("shape", [(640, 427), (31, 97), (224, 224), (5, 5)])
def test_stretch_equals_transformers_resize_to_both_sides(shape):
    """Without a crop and without keeping the aspect ratio (LaVIN)."""
    picture = Image.fromarray(gradient(*shape))
    processor = CLIPImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, do_rescale=False, do_normalize=False
    )
    expected = np.moveaxis(processor(picture, return_tensors="np")["pixel_values"][0], 0, -1).astype(int)
    ours = clip_preprocess(picture, 224, fit="stretch")
    assert ours.shape == (224, 224, 3) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - expected).max() <= 1


def test_stretch_keeps_the_borders_that_the_crop_cuts_off():
    picture = Image.fromarray(gradient(400, 100))
    stretched, cropped = (clip_preprocess(picture, 50, fit=fit)[..., 0] for fit in ("stretch", "crop"))
    assert stretched.min() < 8 and stretched.max() > 247
    assert cropped.min() > 90 and cropped.max() < 165


def test_crop_equals_transformers_on_real_photos(shared_data):
    for file in sorted((shared_data("coco_ccby") / "images").glob("*.jpg"))[:24]:
        ours = clip_preprocess(load_rgb(file), 224).astype(int)
        with Image.open(file) as picture:
            assert np.abs(ours - official(picture.convert("RGB"), 224)).max() <= 1, file.name


def test_normalised_pixels_equal_transformers():
    picture = Image.fromarray(gradient(50, 41))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = np.moveaxis(processor(picture, return_tensors="np")["pixel_values"][0], 0, -1)
    ours = jax.jit(normalise)(clip_preprocess(picture, 32)[None])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[0], expected, atol=1.01 / 255 / min(CLIP_STD))  # one grey level


@pytest.mark.parametrize(("mean", "std"), [(CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD)])
def test_normalise_is_the_formula_in_float64(mean, std):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalise(jax.numpy.asarray(images), mean, std), expected, atol=1e-5)


def test_imagenet_statistics_are_the_published_ones():
    """As transformers holds them for models that were trained with them."""
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def save(tmp_path, picture, name, **options):
    picture.save(tmp_path / name, **options)
    return np.asarray(load_rgb(tmp_path / name))


def test_grey_palette_and_bilevel_become_rgb(tmp_path):
    ramp = gradient(20, 10)[..., 0]
    np.testing.assert_array_equal(save(tmp_path, Image.fromarray(ramp), "l.png"), np.repeat(ramp[..., None], 3, -1))
    palette = Image.fromarray(gradient(20, 10)).quantize(256)
    np.testing.assert_array_equal(save(tmp_path, palette, "p.png"), np.asarray(palette.convert("RGB")))
    two = Image.fromarray((ramp > 100).astype(np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(save(tmp_path, two, "1.png")[..., 1], (ramp > 100) * 255)


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    values = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    found = save(tmp_path, Image.fromarray(values), "deep.png")
    np.testing.assert_array_equal(found, np.repeat((values // 256).astype(np.uint8)[..., None], 3, -1))


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200  # red with alpha 255, 51, 0
    rgba[0, :, 3] = (255, 51, 0)
    found = save(tmp_path, Image.fromarray(rgba), "a.png")[0].astype(int)
    alpha = np.array([[1.0], [0.2], [0.0]])
    np.testing.assert_allclose(found, alpha * [[200, 0, 0]] + (1 - alpha) * 255, atol=1)
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    np.testing.assert_array_equal(save(tmp_path, grey, "la.png")[0, :, 0], [10, 255])
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 70, 80, 90])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(save(tmp_path, palette, "t.png", transparency=0)[0], [[255, 255, 255], [70, 80, 90]])


def test_cmyk_jpeg_has_its_colours(tmp_path):
    picture = Image.new("RGB", (32, 32), (200, 40, 90)).convert("CMYK")
    found = save(tmp_path, picture, "c.jpg", quality=95)
    np.testing.assert_allclose(found.reshape(-1, 3).mean(0), (200, 40, 90), atol=4)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_undone(tmp_path, orientation, turn):
    stored = gradient(9, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(save(tmp_path, Image.fromarray(stored), "e.png", exif=exif), turn(stored))


def test_pictures_without_an_8_bit_meaning_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(ValueError, match=r"outside 0\.\.65535"):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, np.int32)))


def test_crop_refuses_what_is_not_rgb():
    with pytest.raises(ValueError, match="not L"):
        clip_preprocess(Image.new("L", (9, 9)), 4)


def test_unknown_fits_are_refused():
    with pytest.raises(ValueError, match="'pad' is not one of"):
        clip_preprocess(Image.new("RGB", (9, 9)), 4, fit="pad")

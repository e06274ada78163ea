"""From a picture file to CLIP's input: RGB, CLIP's resize and crop on the host, normalisation on the device."""

import io
import os
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps

from eim_jax.utils.picture_files import open_picture
from eim_jax.utils.thin_images import MANY_PIXELS, resized_piece

# CLIP's pixel statistics (openai/CLIP, clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# ImageNet's, which LaVIN uses.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FITS = ("crop", "stretch")  # how a picture becomes a square
BICUBIC = 3  # PIL's number
RESAMPLING = {2: "bilinear", BICUBIC: "bicubic"}  # PIL's numbers of the filters that are offered

# Above this PIL warns of a decompression bomb; such a picture takes over 250 MB once decoded.
MAX_PIXELS = 89_478_485
MAX_SIDE = 1_000_000  # a line of so many pixels is no picture, and resizing it takes a gigabyte


class Fit(NamedTuple):
    """How a picture becomes a square; a plain "crop" or "stretch" stands for the one with the other fields' defaults.

    Attributes:
      how: a name in FITS.
      margin: of "crop": so many times the square's side is the resized picture's short side.
      resample: PIL's number of the filter, a key of RESAMPLING.
    """

    how: str = "crop"
    margin: float = 1.0
    resample: int = BICUBIC

    def __str__(self) -> str:
        """Its name, with what is not usual about it."""
        wider = [] if self.margin == 1 else [f"{self.margin:g} times the side"]
        other = [] if self.resample == BICUBIC else [RESAMPLING[self.resample]]
        return ", ".join([self.how, *wider, *other])


def load_rgb(path: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """Returns the picture in `path`, or in a file's bytes, decoded in full, upright, in mode RGB.

    Errors: OSError (missing, truncated), ValueError (no picture in a known format, too many pixels, no 8-bit meaning).
    """
    with open_picture(path) as picture:
        check_size(picture)
        return to_rgb(picture)


def check_size(picture: Image.Image) -> None:
    """Raises ValueError for a picture without pixels, or with so many that decoding it would exhaust memory."""
    width, height = picture.size
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels ({width} x {height})")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"it is {width} x {height}, a side of more than {MAX_SIDE} pixels; crop it")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it is {width} x {height}, more than {MAX_PIXELS} pixels (a decompression bomb?); shrink it")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Returns the picture in mode RGB, turned upright by its EXIF orientation.

    Transparent pixels are laid on white, as a web page shows them (dropping alpha would reveal hidden colours). 16 bits
    keep their high byte. A picture of more than 8 bits that never uses its highest bit holds 10, 12 or 14 bits, or is
    dark: no file says which, so it is a ValueError, as are floating-point pictures, which have no agreed range.
    """
    deep = _is_deep(picture)
    scaled = picture.format == "PPM"  # PIL brings it to 16 bits by the largest value that its header names
    picture = ImageOps.exif_transpose(picture)
    if deep and picture.mode in ("RGB", "RGBA", "LA"):  # PIL has kept the high bytes
        colours = picture.getchannel("L") if picture.mode == "LA" else picture.convert("RGB")
        extremes = np.asarray(colours.getextrema()).reshape(-1, 2)
        _check_range(int(extremes[:, 1].max()), 8)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        grey = np.asarray(picture)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError(f"mode {picture.mode} holds values outside 0..65535; save it with 8 or 16 bits a channel")
        if not scaled and grey.any():
            _check_range(int(grey.max()), 16)
        return Image.fromarray((grey.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers without an agreed range; save it with 8 bits a channel")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        if picture.mode == "La":  # PIL converts premultiplied grey only to LA
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _is_deep(picture: Image.Image) -> bool:
    """Whether the file holds 16 bits a channel, as PIL's decoders are told before the pixels are read."""
    tiles = getattr(picture, "tile", ())
    return any(";16" in str(tile[3]) for tile in tiles)


def _check_range(largest: int, bits: int) -> None:
    if largest < 1 << (bits - 1):
        used = f"its largest value needs {largest.bit_length() + 16 - bits} of 16 bits"
        raise ValueError(f"{used}, so what is white in it is not known; save it with 8 bits a channel")


def clip_preprocess(picture: Image.Image, size: int, fit: str | Fit = "crop") -> UInt8[np.ndarray, "size size 3"]:
    """Returns a square of an RGB picture, resized bicubically, or as `fit` says.

    "crop" is CLIP's, short side to `size`, then the centre square: the same numbers as transformers'
    CLIPImageProcessorPil before rescaling (to 1 grey level); source: openai/CLIP. "stretch" is SigLIP's and LaVIN's,
    which keeps the whole picture and not its aspect ratio.

    Errors: ValueError for a picture that is not RGB, or another `fit`.
    """
    if picture.mode != "RGB":
        raise ValueError(f"clip_preprocess takes mode RGB, not {picture.mode}: call to_rgb first")
    how, margin, resample = Fit(fit) if isinstance(fit, str) else fit
    if how not in FITS:
        raise ValueError(f"fit {how!r} is not one of {FITS}")
    if how == "stretch":
        return np.array(picture.resize((size, size), Image.Resampling(resample)), np.uint8)
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    edge = round(size * margin)
    scaled = int(edge * long / short)
    new_width, new_height = (edge, scaled) if width <= height else (scaled, edge)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_width * new_height > MANY_PIXELS:
        return resized_piece(picture, (new_width, new_height), left, top, size, resample)
    if (new_width, new_height) != (width, height):
        picture = picture.resize((new_width, new_height), Image.Resampling(resample))
    return np.array(picture.crop((left, top, left + size, top + size)), np.uint8)


def normalise(
    images: UInt8[Array, "b h w 3"],
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Float[Array, "b h w 3"]:
    """Returns f32 (images / 255 - mean) / std, channel by channel; runs on the device inside the jitted step."""
    mean_row = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, 3)
    std_row = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, 3)
    return (images.astype(jnp.float32) / 255.0 - mean_row) / std_row

"""Picture files of every format that is read, damaged."""

import functools
import io
import pathlib

import numpy as np
from PIL import Image, ImageOps

from eim_jax.data.image_checks import file_problem
from eim_jax.utils.images import MAX_PIXELS, MAX_SIDE, clip_preprocess, load_rgb

from .engine import Format

KINDS = {
    "JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "GIF": ("P", "L"),
    "BMP": ("RGB", "L"), "WEBP": ("RGB", "RGBA"), "TIFF": ("RGB", "L", "I;16", "F", "CMYK"), "PPM": ("RGB", "L"),
    "AVIF": ("RGB",),
}  # fmt: skip


@functools.cache
def _files():
    files, rng = {}, np.random.default_rng(0)
    Image.init()
    for kind, modes in KINDS.items():
        if kind not in Image.SAVE:  # this PIL was built without it
            continue
        for mode in modes:
            grey = Image.fromarray(rng.integers(0, 256, (14, 18), np.uint8))
            colours = Image.fromarray(rng.integers(0, 256, (14, 18, 3), np.uint8))
            made = Image.fromarray(rng.integers(0, 65536, (14, 18), np.uint16)) if mode == "I;16" else None
            made = made or (grey if mode in ("L", "1", "LA", "F") else colours).convert(mode)
            content, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = 6
            more = {"exif": exif} if (kind, mode) == ("JPEG", "L") else {}
            made.save(content, kind, **more)
            files[f"{mode.replace(';', '')}.{kind.lower()}"] = content.getvalue()
    return files


def _read(folder: pathlib.Path):
    """Every file: the check's word, and the picture or the loader's."""
    found = {}
    for file in sorted(folder.iterdir()):
        try:
            picture = load_rgb(file)
        except (ValueError, OSError) as error:
            picture = error
        except Exception as error:  # PIL's decoders; a source of pictures names file and id
            picture = error
        found[file.name] = (file_problem(file), picture)
    return found


def _check(folder: pathlib.Path, found):
    for name, (problem, picture) in found.items():
        if isinstance(picture, BaseException):
            assert problem is not None, f"the check lets pass what cannot be loaded: {picture!r}"
            assert problem.strip() and not problem.startswith("<"), f"no words: {problem}"
            continue
        assert problem is None, f"the check refuses what can be loaded: {problem}"
        width, height = picture.size
        assert picture.mode == "RGB" and 0 < width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE
        with Image.open(folder / name) as plain:
            deep = "16" in str(plain.tile)
            plain = ImageOps.exif_transpose(plain)
            assert plain.size == picture.size, "another size"
            if plain.mode in ("RGB", "L") and "transparency" not in plain.info and not deep:
                assert np.array_equal(np.asarray(plain.convert("RGB")), np.asarray(picture)), "other pixels"
        for fit in ("crop", "stretch"):
            assert clip_preprocess(picture, 8, fit).shape == (8, 8, 3)


def _one(files):
    """One picture of a kind, changed."""
    from hypothesis import strategies as st

    from .mutations import changed

    return st.sampled_from(sorted(files)).flatmap(lambda name: changed({name: files[name]}))


FORMATS = (Format("pictures", _files, _read, _check, quick=80, change=_one),)

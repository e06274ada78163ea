"""Which picture files are read: a list of formats, what they are recognised by, and the names of those that are not."""

import io
import os

from PIL import Image

# PIL knows some fifty formats, among them ones that start an external program (EPS: Ghostscript). Only these are tried.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")

# What a folder's pictures may be called; a file without any suffix is looked into.
SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".avif",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".jp2",
        ".j2k",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    }
)

_HEAD = 512  # bytes by which a format is recognised
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the picture: run `git lfs pull` where it came from"),
    (b"%!PS", "PostScript (EPS), which an external program would have to draw"),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS), which an external program would have to draw"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"SIMPLE  =", "FITS"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x89HDF", "HDF5"),
)


class UnknownPictureError(ValueError):
    """A file is no picture in one of FORMATS; the message says what it is."""


def open_picture(source: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """Opens a picture file, or a file's bytes, in one of FORMATS; pixels are not read yet.

    Raises:
      UnknownPictureError: it is in none of them; what it is instead is named where its first bytes say so.
      OSError: it cannot be read, or its header is damaged.
    """
    try:
        return Image.open(source, formats=_readable())
    except Image.UnidentifiedImageError:
        raise UnknownPictureError(f"not a picture in a known format{_what(source)}") from None


def _readable() -> list[str]:
    """Those of FORMATS that this PIL was built with: it knows no other names."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _what(source: str | os.PathLike[str] | io.BytesIO) -> str:
    """What a file seems to be by its first bytes, as the end of a message."""
    if isinstance(source, io.BytesIO):
        head = source.getvalue()[:_HEAD]
    else:
        with open(source, "rb") as file:
            head = file.read(_HEAD)
    return f": it is {found}" if (found := _named(head)) else f" ({', '.join(FORMATS)})"


def _named(head: bytes) -> str:
    for start, name in _MAGIC:
        if head.startswith(start):
            return name
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _HEIC:
            return "HEIC, which is not read: convert it to JPEG"
        if brand in (b"avif", b"avis"):
            return "AVIF that this Pillow cannot read: install one that can, or convert it to JPEG"
        return f"a file of the kind {brand.decode('latin-1').strip()!r} (a video?)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page (a failed download?)"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "SVG, a drawing without pixels: export it as PNG"
    if b"/annex/objects/" in head[:200]:
        return "a git-annex pointer in place of the picture: run `git annex get`"
    return ""

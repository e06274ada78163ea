"""A picture of a request: the bytes inside a data URL, decoded under the loader's own limits. Nothing is fetched."""

import base64
import binascii
import io

import numpy as np
from jaxtyping import UInt8

from eim_jax.serving.errors import RequestError
from eim_jax.utils.images import Fit, clip_preprocess, load_rgb

_HEAD = "data:"


def picture_bytes(url: str, where: str) -> bytes:
    """Returns what a data URL holds.

    Args:
      url: "data:image/png;base64,...".
      where: it stands in the request.

    Raises:
      RequestError: it is another URL, which is not fetched, or not base64.
    """
    if url[: len(_HEAD)].lower() != _HEAD:
        kind = url.partition(":")[0][:20] if ":" in url else "a path"
        raise RequestError(
            f"{where}: pictures come inside the request, as data:image/jpeg;base64,...; this is {kind!r}, and nothing "
            "is fetched from other machines or read from files",
            param=where,
            code="invalid_image_url",
        )
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(f"{where}: a data URL with base64 is needed", param=where, code="invalid_base64_image")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        message = f"{where}: the picture is no base64: {error}"
        raise RequestError(message, param=where, code="invalid_base64_image") from None


def crop(data: bytes, where: str, size: int, fit: Fit | str) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the square that the vision tower reads of a picture file's bytes.

    Args:
      data: the file.
      where: it stands in the request.
      size: the square's side in pixels.
      fit: how pictures become squares, as in training.

    Raises:
      RequestError: it is no picture in a known format, damaged, or has too many pixels.
    """
    try:
        return clip_preprocess(load_rgb(io.BytesIO(data)), size, fit)
    except Exception as error:  # PIL's decoders raise many types on damaged files; each of them means "unusable"
        reason = str(error) or type(error).__name__
        message = f"{where}: the picture cannot be read: {reason}"
        raise RequestError(message, param=where, code="invalid_image") from error

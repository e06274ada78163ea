"""Pieces of a bicubic or bilinear resize, with PIL's numbers: only what a crop keeps is computed.

PIL resizes the whole of a picture, also where a crop follows: 1 x 65,000 pixels with the short side at 224 would be
224 x 14,560,000, ten GB. Here one output row after the other reads the source rows that its weights reach.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

MANY_PIXELS = 1 << 22  # of a resized picture, above which only the piece that is kept is computed
_BITS = 32 - 8 - 2  # of PIL's fixed-point weights (Resample.c, PRECISION_BITS)


def resized_piece(
    picture: Image.Image, new: tuple[int, int], left: int, top: int, size: int, resample: int = Image.Resampling.BICUBIC
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns `size` x `size` pixels, from (left, top) on, of an RGB picture resized to `new` (width, height).

    The digits are those of `picture.resize(new, resample).crop((left, top, left + size, top + size))`, which rounds to
    8 bits between its two passes: across first, but where a tall picture shrinks down first. The longer side is resized
    here, the shorter one by PIL.
    """
    width, height = picture.size
    method = Image.Resampling(resample)
    if width > height:
        columns = [_weights(width, new[0], left + column, method) for column in range(size)]
        cuts = [np.asarray(picture.crop((at, 0, at + len(weights), height))) for at, weights in columns]
        lines = [_weighted(cut.swapaxes(0, 1), weights) for cut, (_, weights) in zip(cuts, columns, strict=True)]
        down = Image.fromarray(np.stack(lines, axis=1)).resize((size, new[1]), method)
        return np.array(down.crop((0, top, size, top + size)), np.uint8)

    def across(piece: Image.Image) -> Image.Image:
        wide = piece.resize((new[0], piece.height), method)
        return wide.crop((left, 0, left + size, piece.height))

    rows, down_first = [], new[1] < height
    for row in range(size):
        start, weights = _weights(height, new[1], top + row, method)
        piece = picture.crop((0, start, width, start + len(weights)))
        rows.append(_weighted(np.asarray(piece if down_first else across(piece)), weights))
    found = np.stack(rows)
    return np.array(across(Image.fromarray(found)), np.uint8) if down_first else found


def _weights(source: int, target: int, place: int, method: Image.Resampling) -> tuple[int, Int[np.ndarray, "k"]]:
    """The first source pixel that an output pixel reads, and the weights from there on, in PIL's fixed point."""
    scale = source / target
    stretched = max(scale, 1.0)
    reach, curve = _CURVES[method]
    support, centre = reach * stretched, (place + 0.5) * scale
    start = max(int(centre - support + 0.5), 0)
    stop = min(int(centre + support + 0.5), source)
    weights = curve((np.arange(start, stop) - centre + 0.5) * (1.0 / stretched))
    total = np.cumsum(weights)[-1]  # added up in order, as PIL does
    weights = weights / total
    return start, np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)


def _bicubic(x: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, np.abs(x)
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_CURVES = {
    Image.Resampling.BICUBIC: (2.0, _bicubic),
    Image.Resampling.BILINEAR: (1.0, lambda x: np.maximum(1.0 - np.abs(x), 0.0)),
}  # how far a filter reaches, and its weights


def _weighted(lines: UInt8[np.ndarray, "k n 3"], weights: Int[np.ndarray, "k"]) -> UInt8[np.ndarray, "n 3"]:
    total = np.tensordot(weights, lines.astype(np.int64), axes=1) + (1 << (_BITS - 1))
    return np.clip(total >> _BITS, 0, 255).astype(np.uint8)

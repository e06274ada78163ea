"""A vision tower's position embeddings for pictures of another size, as transformers' `interpolate_pos_encoding`."""

import numpy as np
from jaxtyping import Float


def interpolated(table: Float[np.ndarray, "n v"], side: int, new: int, has_cls: bool) -> Float[np.ndarray, "m v"]:
    """Returns a table of `side` x `side` positions as one of `new` x `new`.

    Bicubic with pixels as areas and the border repeated, without smoothing where the grid shrinks: PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`.

    Args:
      table: one row a position, row by row of the grid.
      side: of the grid that it has.
      new: of the grid that is wanted.
      has_cls: its first row belongs to no patch, and stays as it is.
    """
    first = int(has_cls)
    grid = table[first:].astype(np.float64).reshape(side, side, -1)
    weights = _weights(side, new)
    patches = np.einsum("ir,jc,rcv->ijv", weights, weights, grid, optimize=True)
    return np.concatenate([table[:first], patches.reshape(new * new, -1).astype(table.dtype)])


def _weights(side: int, new: int) -> Float[np.ndarray, "new side"]:
    """How much of each old place a new one takes: Keys' cubic with a = -0.75, PyTorch's."""
    a = -0.75
    found = np.zeros((new, side))
    for place in range(new):
        at = (place + 0.5) * side / new - 0.5
        below = int(np.floor(at))
        for neighbour in range(below - 1, below + 3):
            x = abs(at - neighbour)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            found[place, min(max(neighbour, 0), side - 1)] += near if x <= 1 else far
    return found

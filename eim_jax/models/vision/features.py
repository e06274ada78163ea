"""Which of a vision tower's tokens the ST receives (config.arm.*.features)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FEATURES = ("full", "cls", "grid", "first")
GRID = 7  # patches a side that "grid" leaves: [CLS] and 49 of them are EIM's 50 tokens


def takes_all(features: str, tokens: int) -> bool:
    """Returns whether a choice leaves all of a tower's tokens as they are: `select` of so many, [CLS] and a square.

    >>> takes_all("grid", 50), takes_all("grid", 257), takes_all("cls", 50)
    (True, False, False)
    """
    return features == "full" or (features in ("grid", "first") and tokens <= 1 + GRID**2)


def select(seen: Float[Array, "b n v"], features: str) -> Float[Array, "b m v"]:
    """Returns the visual tokens that go to the ST.

    Args:
      seen: [CLS] and the patches, row by row of a square grid.
      features: "full" all of them; "cls" [CLS] alone; "grid" [CLS] and the patches average-pooled to 7 x 7 (bins as
        torch.nn.AdaptiveAvgPool2d's; a grid of at most 7 x 7 stays); "first" the first 50 tokens, or all if fewer.

    Raises:
      ValueError: an unknown name, or "grid" of patches that form no square.
    """
    if features not in FEATURES:
        raise ValueError(f"features {features!r} is not one of {FEATURES}")
    if features != "grid":
        return seen[:, : {"full": None, "cls": 1, "first": 1 + GRID**2}[features]]
    return jnp.concatenate([seen[:, :1], grid(seen[:, 1:])], axis=1)


def grid(patches: Float[Array, "b n v"]) -> Float[Array, "b m v"]:
    """Returns patches, row by row of a square grid, average-pooled to 7 x 7; a grid of at most 7 x 7 stays.

    Raises:
      ValueError: they form no square.
    """
    b, n, v = patches.shape
    side = math.isqrt(n)
    if side**2 != n:
        raise ValueError(f"features 'grid' needs a square of patches, not {n} of them")
    if side <= GRID:
        return patches
    # Bin i holds rows floor(i side / 7) up to ceil((i + 1) side / 7): neighbours overlap where 7 does not divide side.
    start, stop = np.arange(GRID) * side // GRID, -(-np.arange(1, GRID + 1) * side // GRID)
    row = np.arange(side)
    inside = (row >= start[:, None]) & (row < stop[:, None])
    bins = jnp.asarray(inside / inside.sum(1, keepdims=True), jnp.float32)
    square = patches.reshape(b, side, side, v).astype(jnp.float32)
    pooled = jnp.einsum("ir,jc,brcv->bijv", bins, bins, square, precision="highest")
    return pooled.reshape(b, GRID**2, v).astype(patches.dtype)

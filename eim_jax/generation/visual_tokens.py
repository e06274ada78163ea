"""The images of a split through CLIP and the ST, each once: what every text about them is generated from."""

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from eim_jax.data.loader import eval_images
from eim_jax.data.samples import Split
from eim_jax.models.vlm import VLM
from eim_jax.parallel.processes import fetch, own_rows, place_rows
from eim_jax.parallel.sharding import parts_of
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress


class VisualTokens(NamedTuple):
    """The ST's output for some images of a split.

    Attributes:
      tokens: k images' visual tokens.
      place: image row -> its place in `tokens`; the key None is "no image".
    """

    tokens: Float[np.ndarray, "k m d"]
    place: dict[int | None, int]

    def of(self, images: Sequence[int | None]) -> tuple[Float[np.ndarray, "b m d"], Bool[np.ndarray, "b"]]:
        """Returns the visual tokens of these images, and which of them are images."""
        shown = np.array([image is not None for image in images], bool)
        return self.tokens[[self.place[image] for image in images]], shown


def encode_images(
    inputs: Inputs, vlm: VLM, params: Flat, split: Split, images: Sequence[int | None], *, quiet: bool = False
) -> VisualTokens:
    """Encodes every image that occurs in `images`, once.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      split: holds the images.
      images: rows of `split.images`, None for text alone.
      quiet: shows no progress.
    """
    rows = list(dict.fromkeys(images))
    tree = tree_of(params, "visual/", "st/")
    found, batch, size = [], rounded(inputs.config.decode.batch, inputs.mesh), vlm.visual.config.image_size
    with progress_or_quiet(quiet, f"looking at {split.name} images", len(rows), "images") as advance:
        options = {"fit": inputs.fit, "threads": inputs.config.data.threads}
        wanted = np.array([-1 if row is None else row for row in rows], np.int32)
        wanted[~np.resize(own_rows(inputs.mesh, batch), len(wanted))] = -1  # other processes decode their own
        for at, (_, pixels) in enumerate(eval_images(split, batch, size, rows=wanted.tolist(), **options)):
            real = min(batch, len(rows) - at * batch)
            pictured = np.zeros(len(pixels), bool)
            pictured[:real] = [row is not None for row in rows[at * batch :][:real]]
            found.append(fetch(connect_images(vlm, tree, *place_rows(inputs.mesh, [pixels, pictured])))[:real])
            advance(real)
    return VisualTokens(np.concatenate(found), {row: place for place, row in enumerate(rows)})


def rounded(rows: int, mesh: Mesh) -> int:
    """Returns `rows`, rounded up to what the mesh's data axes divide."""
    return rows + -rows % parts_of(mesh)


def tree_of(params: Flat, *under: str) -> dict:
    """Returns the parameters under these paths, or all, as the tree that the towers take."""
    return partition.unflatten({path: leaf for path, leaf in params.items() if not under or path.startswith(under)})


def progress_or_quiet(quiet: bool, *words):
    """Returns a progress line as a context that gives `advance`; with `quiet` one that shows nothing."""
    return contextlib.nullcontext(lambda _: None) if quiet else progress(*words)


# Parameters are arguments: closed over, they would be compiled into the program as constants.
@functools.partial(jax.jit, static_argnums=0)
def connect_images(vlm, params, images, has_image):
    """Returns the ST's output [b m d] for uint8 crops [b h w 3].

    Args:
      vlm: the model.
      params: the nested tree of its parameters, of which "visual" and "st" are read.
      images: the crops.
      has_image: which rows are pictures [b].
    """
    return vlm.connect(params, vlm.encode_image(params, images, has_image=has_image))

"""What a language model reads for a batch of texts and images, and how the slots before the texts are laid out."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.adapters.adapter import Steering


class LMInput(NamedTuple):
    """Everything a language model reads for a batch of rows; slots that are not `valid` are never seen."""

    embeds: Float[Array, "b s d"]
    valid: Bool[Array, "b s"]
    positions: Int[Array, "b s"]
    steer: Steering | None = None  # what the adapter changes inside the LM
    newest: Int[Array, "b"] | None = None  # the position after which a generated token stands; None: the last one's

    @property
    def last_position(self) -> Int[Array, "b"]:
        """The position after which a row's first generated token stands."""
        return self.positions[:, -1] if self.newest is None else self.newest


class Before(NamedTuple):
    """The s slots before the texts: BOS, then an image's marker and visual tokens, or in other rows that of no image.

    Both kinds of rows end in the last slot, so that the marker of no image stands where others have visual tokens.
    """

    ids: Int[Array, "b i"]  # of the slots that hold a word in some row, the last `shared` of s included
    valid: Bool[Array, "b s"]  # which of them a row reads
    shared: int  # slots that hold a word in some rows and a visual token in others: the last ones

    def embeds(
        self, words: Float[Array, "b _ d"], visual: Float[Array, "b m d"], pictured: Bool[Array, "b"]
    ) -> Float[Array, "b _ d"]:
        """Returns the embeddings of `ids` and of the texts behind them with the visual tokens put between."""
        texts, first, apart = self.ids.shape[1], self.ids.shape[1] - self.shared, visual.shape[1] - self.shared
        visual = visual.astype(words.dtype)
        either = jnp.where(pictured[:, None, None], visual[:, apart:], words[:, first:texts])
        return jnp.concatenate([words[:, :first], visual[:, :apart], either, words[:, texts:]], axis=1)


def before_texts(
    bos: int | None,
    with_image: tuple[int, ...],
    without_image: tuple[int, ...],
    visual: int,
    pictured: Bool[Array, "b"],
) -> Before:
    """Lays out the slots before a batch of texts, as many as the longer kind of row needs.

    Args:
      bos: the token before everything, or None.
      with_image: the ids before an image's visual tokens.
      without_image: the ids that stand for no image.
      visual: number of visual tokens; 0 where they enter elsewhere.
      pictured: which rows have an image.

    >>> found = before_texts(1, (5, 6), (5, 7, 8), 2, jnp.array([True, False]))
    >>> found.ids.tolist(), found.valid.astype(int).tolist()
    ([[1, 5, 6, 0, 0], [1, 0, 5, 7, 8]], [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
    """
    start = () if bos is None else (bos,)
    slots, shared = max(len(with_image) + visual, len(without_image)), min(visual, len(without_image))
    words = slots - visual + shared  # slots that hold a word in some row
    image = (*start, *(0,) * (slots - visual - len(with_image)), *with_image, *(0,) * shared)
    text = (*start, *(0,) * (words - len(without_image)), *without_image)
    ids = jnp.where(pictured[:, None], jnp.asarray(image, jnp.int32)[None], jnp.asarray(text, jnp.int32)[None])
    hidden = jnp.where(pictured, slots - visual - len(with_image), slots - len(without_image))
    valid = jnp.arange(slots)[None] >= hidden[:, None]
    return Before(ids, jnp.pad(valid, ((0, 0), (len(start), 0)), constant_values=True), shared)

"""The batch that every stage reads, and the legend of axis letters.

b batch | n visual tokens ([CLS] + patches) | v CLIP width | j joint CLIP width | m ST output tokens | d LM width |
t text tokens | V vocabulary | N queue rows (training samples)
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt8

from eim_jax.models.packing import Packing

READINGS = ("image", "text")  # an image with its text, or the text alone


class Batch(NamedTuple):
    """One batch of samples; a field that the stage does not need is None.

    `index` is the sample's row in every queue: it travels with the sample through shuffling, sharding and resuming.
    """

    index: Int[Array, "b"]
    tokens: Int[Array, "b t"] | None = None  # instruction + response + EOS, padded on the right with 0
    valid: Bool[Array, "b t"] | None = None  # a real token, not padding
    supervised: Bool[Array, "b t"] | None = None  # counted by loss_base: response + EOS
    image: UInt8[Array, "b h w 3"] | None = None  # resized and cropped as CLIP does; normalised on the device
    features: Float[Array, "b n v"] | None = None  # cached `see` of a frozen CLIP
    has_image: Bool[Array, "b"] | None = None  # False: a text-only row, masked out of loss_IE and loss_ST
    before: Int[Array, "b k"] | None = None  # rows at this place of the k batches before; -1: there was none
    # Where several samples share a row of slots, by what the LM reads (READINGS); None: each has a row of its own.
    packing: dict[str, Packing] | None = None

    def packed(self, reading: str) -> Packing | None:
        """Returns where the samples lie while the LM reads this; None: each in a row of its own."""
        return None if self.packing is None else self.packing.get(reading)

    def read(self, field: str) -> Any:
        """Returns a field that has to be there.

        Raises:
          ValueError: it is None: the stage's losses do not say that they need it.
        """
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"the batch holds no {field!r}: the loss that reads it has to name it in its `needs`")
        return value

"""What a queue's keys are made from: CLIP's texts, the LM's texts, or images.

`inputs` is a run's `training.setup.Inputs`; `row` is also asked of a plan's, which hold no data.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.config import ConfigError
from eim_jax.data import rows
from eim_jax.losses.kinds import KeySource
from eim_jax.models.vision import text_family


def _clip_texts(inputs: Any) -> np.ndarray:
    # Imported where samples are read: a step's program alone needs neither tokenizers nor a data loader.
    from eim_jax.data import tokenize

    captions, text = [sample.caption or sample.response for sample in inputs.train.samples], inputs.clip.text
    encode = tokenize.encode_padded if text_family(inputs.clip.vision, text).pads else tokenize.encode_clip
    return encode(captions, inputs.clip_tokenizer, text.context)


def _described(inputs: Any) -> str:
    text = inputs.clip.text
    length = "padded to" if text_family(inputs.clip.vision, text).pads else "at most"
    return f"{inputs.fingerprints['clip_tokenizer']}, {length} {text.context} tokens"


def _clip_lengths(inputs: Any, tokens: np.ndarray) -> np.ndarray | None:
    """Up to [EOS], behind which a causal tower looks at nothing; a tower that reads its padding reads whole rows."""
    if text_family(inputs.clip.vision, inputs.clip.text).pads:
        return None
    return (tokens == inputs.clip_tokenizer.eos_token_id).argmax(axis=1) + 1


CLIP_TEXTS = KeySource(
    tower="text",
    fields=_clip_texts,
    row=lambda inputs: jax.ShapeDtypeStruct((1, inputs.clip.text.context), jnp.int32),
    described=_described,
    lengths=_clip_lengths,
    size=lambda inputs: inputs.clip.text.context * inputs.clip.text.width,
)  # the caption (where there is none, the response) as the text tower's tokens [N s]

LM_TEXTS = KeySource(
    tower="lm",
    fields=lambda inputs: (inputs.encoded.tokens, inputs.encoded.valid),
    row=lambda inputs: tuple(
        jax.ShapeDtypeStruct((1, rows.widest(inputs.config.data)), dtype) for dtype in (jnp.int32, jnp.bool_)
    ),
    described=lambda inputs: f"{inputs.fingerprints['lm_tokenizer']}, {rows.described(inputs.config.data)}",
    lengths=lambda inputs, texts: texts[1].sum(axis=1),
    size=lambda inputs: rows.widest(inputs.config.data) * inputs.lm.config.width,
)  # instruction, response and EOS as the LM's tokens [N t], and which of them are no padding, bool [N t]


class Crops:
    """Each sample's image as CLIP reads it, uint8 [N h w 3], decoded when rows are asked for."""

    dtype = np.dtype(np.uint8)

    def __init__(self, inputs: Any):
        self._split, self._data, self._fit = inputs.train, inputs.config.data, inputs.fit
        without = [sample.id for sample in self._split.samples if sample.image is None]
        if without:
            raise ConfigError(
                f"a queue keyed from images needs one for each sample: {len(without):,} have none, the first is "
                f"{without[0]!r}"
            )
        self._images = np.array([sample.image for sample in self._split.samples], np.int32)
        self.shape = (len(self._split), *_image(inputs))

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """The crops of these samples [... h w 3]."""
        from eim_jax.data.loader import eval_images

        found, wanted = self._images[numbers], self._images[numbers].ravel()
        options = {"rows": wanted.tolist(), "fit": self._fit, "threads": self._data.threads}
        [(_, crops)] = eval_images(self._split, len(wanted), self.shape[1], **options)
        return crops.reshape(*found.shape, *self.shape[1:])


def _image(inputs: Any) -> tuple[int, int, int]:
    size = inputs.clip.vision.image_size
    return size, size, 3


IMAGES = KeySource(
    tower="clip",
    fields=Crops,
    row=lambda inputs: jax.ShapeDtypeStruct((1, *_image(inputs)), jnp.uint8),
    described=lambda inputs: f"images, {inputs.fit}, {inputs.clip.vision.image_size} pixels",
    size=lambda inputs: inputs.clip.vision.tokens * inputs.clip.vision.width,
)  # the sample's image as CLIP's crop, uint8 [N h w 3]

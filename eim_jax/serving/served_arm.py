"""An arm as a server uses it: groups of any size through few compiled programs.

Groups are padded to a few sizes (1, 4, 16, ... rows) and texts to a few widths (16, 32, ... tokens), so that what is
compiled does not depend on who asks what.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from eim_jax.config import ConfigError
from eim_jax.data import rows, tokenize
from eim_jax.data.samples import NoImages, Sample, Split
from eim_jax.generation.batched_inference import decoding, likelihood_of, period_id, read_inputs
from eim_jax.generation.decode_state import Decoded, stops
from eim_jax.generation.open_batch import OpenBatch
from eim_jax.generation.sampler import continue_text
from eim_jax.generation.visual_tokens import connect_images, rounded, tree_of
from eim_jax.models.lm_input import LMInput
from eim_jax.models.vlm import VLM
from eim_jax.parallel.processes import fetch, place_rows
from eim_jax.serving.conversation import captions
from eim_jax.serving.errors import RequestError
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs

_NARROWEST, _SIZES = 16, 4  # tokens of the first width; each size of a group is so many times the one before


class ServedArm:
    """A trained arm's programs, on the device; all methods are called by one thread.

    Args:
      name: the arm's.
      inputs: the run's; `config.decode.batch` texts are decoded at once.
      vlm: the model.
      params: its parameters.

    Attributes:
      most: most tokens of an answer; fewer where the LM's context ends.
      longest_prompt: in tokens.
      context: of the LM.
      eos: the token that ends an answer, None where the model was not taught one.
      rows: texts decoded at once.
      sizes: of groups, for each of which programs are compiled.

    Raises:
      ConfigError: the run's texts leave the LM's context no room to answer.
    """

    def __init__(self, name: str, inputs: Inputs, vlm: VLM, params: Flat) -> None:
        self.name, self.inputs, self.vlm = name, inputs, vlm
        self.tree = tree_of(params)
        self._generating = vlm.in_generation(inputs.config.decode)
        data, settings, self.tokenizer = inputs.config.data, inputs.config.decode, inputs.lm_tokenizer
        self.rows = rounded(settings.batch, inputs.mesh)
        self.sizes = _steps(1, self.rows, _SIZES, inputs.mesh)
        self.eos, self._period = rows.end_id(data, self.tokenizer), period_id(self.tokenizer)
        size = vlm.visual.config.image_size
        pixels, shown = np.zeros((1, size, size, 3), np.uint8), np.ones(1, bool)
        self._visual = jax.eval_shape(functools.partial(connect_images, vlm), self.tree, pixels, shown)
        # A run that captions has no prompts: their width is 0.
        least = int(self.asks)
        before, self.context = self._slots(least) - least, vlm.lm.config.context
        decode = decoding(inputs, self._generating, "greedy", before + least)
        self.most = decode.max_tokens
        longest = max(rows.limit(data, pictured=True), rows.limit(data, pictured=False))
        self.longest_prompt = min(longest, self.context - before - 1) if self.asks else 0
        self._before, self._widths = before, [0, *_steps(_NARROWEST, self.longest_prompt, 2)] if self.asks else [0]
        self.prefix = self._slots(self.longest_prompt)
        if decode.stop_at_period and self._period is None:
            raise ConfigError("config.decode.stop_at_period: the LM's vocabulary has no token '.'")
        self.ends = stops(decode, self.eos, self._period)

    @property
    def asks(self) -> bool:
        """Whether the run's texts follow a prompt."""
        return not captions(self.inputs.config.data)

    def open_batch(self) -> OpenBatch:
        """Returns a batch of free places."""
        lm, params = self._generating.lm, self.tree["lm"]
        options = {"rows": self.rows, "prefix": self.prefix, "most": self.most, "ends": self.ends}
        return OpenBatch(lm, params, **options, mesh=self.inputs.mesh)

    def see(self, crops: Sequence[UInt8[np.ndarray, "h w 3"] | None]) -> Float[np.ndarray, "b m d"]:
        """Returns the visual tokens of pictures; those of None are zeros, which nothing sees.

        Args:
          crops: as the vision tower reads them.
        """
        found = np.zeros((len(crops), *self._visual.shape[1:]), self._visual.dtype)
        there = [i for i, crop in enumerate(crops) if crop is not None]
        adapter = self.vlm.visual.config.adapter
        # Where a picture's tokens depend on those beside it, each is looked at alone.
        together = 1 if adapter is not None and adapter.mixes_rows else self.rows
        for start in range(0, len(there), together):
            part = there[start : start + together]
            pixels = np.zeros((self.padded(len(part)), *crops[part[0]].shape), np.uint8)
            pixels[: len(part)] = [crops[i] for i in part]
            shown = np.arange(len(pixels)) < len(part)
            seen = connect_images(self.vlm, self.tree, *place_rows(self.inputs.mesh, [pixels, shown]))
            found[part] = np.asarray(fetch(seen))[: len(part)]
        return found

    def read(
        self, crops: Sequence[UInt8[np.ndarray, "h w 3"] | None], prompts: Sequence[Sequence[int]], room: int = 0
    ) -> LMInput:
        """Returns what the LM reads for a group of pictures and prompts, padded to a size and a width.

        Args:
          crops: pictures, None for none.
          prompts: their ids.
          room: slots that padding must leave in the LM's context.
        """
        width = self._width(longest := max(map(len, prompts)))
        width = longest if self._before + width + room > self.context else width
        return read_inputs(self._generating, self.tree, *self._placed(self.see(crops), crops, prompts, width))

    def beams(self, read: LMInput) -> Decoded:
        """Returns the run's beam search over a group, as NumPy arrays."""
        config = decoding(self.inputs, self._generating, "beam", read.valid.shape[1])
        ends = {"eos_id": self.eos, "period_id": self._period}
        lm, params = self._generating.lm, self.tree["lm"]
        (index,) = place_rows(self.inputs.mesh, [np.arange(len(read.valid))])
        return fetch(continue_text(lm, params, read, config, **ends, mesh=self.inputs.mesh, index=index))

    def likelihood(self, crop: UInt8[np.ndarray, "h w 3"] | None, prompt: str, text: str) -> tuple[float, int]:
        """Computes how likely a text is after a picture and a prompt.

        Args:
          crop: the picture, None for none.
          prompt: "" for none.
          text: the answer or caption.

        Returns:
          its mean negative log-likelihood in nats a token, the end token included where the run was taught one, and the
          number of tokens.

        Raises:
          RequestError: the text has no tokens, or is longer than the run's rows.
        """
        data = self.inputs.config.data
        if not text.strip():
            raise RequestError("text is empty: give the answer or caption to be scored", param="text")
        split = Split("asked", (Sample("text", None, prompt, text),), NoImages((), (), ""))
        longest = rows.limit(data, crop is not None)
        try:
            options = {"seam": data.seam, "cut": data.cut}
            encoded = tokenize.encode_split(split, self.tokenizer, longest, data.eos, **options)
        except ValueError as error:
            raise RequestError(f"text: {error}", param="text") from error
        if encoded.truncated:
            message = f"the text with its prompt is longer than the {longest:,} tokens of this run's rows"
            raise RequestError(message, param="text", code="context_length_exceeded")
        size, width = self.padded(1), self._width(encoded.tokens.shape[1])
        tokens, valid, supervised = (_pad(part, size, width) for part in encoded[:3])
        shown = np.full(size, crop is not None)
        visual = np.repeat(self.see([crop]), size, axis=0)
        placed = place_rows(self.inputs.mesh, [visual, shown, tokens, valid, supervised])
        total, count = fetch(likelihood_of(self.vlm, self.tree, *placed))
        if not count[0]:
            raise RequestError("text: it has no token that this run supervises", param="text")
        return -float(total[0]) / int(count[0]), int(count[0])

    def padded(self, count: int) -> int:
        """Returns the size of group that holds so many rows."""
        return next(size for size in self.sizes if size >= count)

    def _placed(self, visual, crops, prompts, width: int):
        size = self.padded(len(prompts))
        tokens, valid = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
        # Padding is the last row once more: of nothing at all a row could not be read.
        at = np.minimum(np.arange(size), len(prompts) - 1)
        shown = np.array([crop is not None for crop in crops])
        return place_rows(self.inputs.mesh, [visual[at], shown[at], tokens[at], valid[at]])

    def _width(self, length: int) -> int:
        return next((width for width in self._widths if width >= length), length)

    def _slots(self, width: int) -> int:
        """Slots that the LM's input of a prompt of this width takes."""
        tokens, valid = np.zeros((1, width), np.int32), np.ones((1, width), bool)
        read = functools.partial(read_inputs, self._generating)
        return jax.eval_shape(read, self.tree, self._visual, np.ones(1, bool), tokens, valid).valid.shape[1]


def _steps(first: int, last: int, times: int, mesh=None) -> list[int]:
    """first, first * times, ... up to and with `last`; rounded up to what the mesh divides."""
    found = []
    while first < last:
        found.append(first)
        first *= times
    found.append(last)
    return sorted({rounded(size, mesh) for size in found} if mesh is not None else set(found))


def _pad(part: np.ndarray, size: int, width: int) -> np.ndarray:
    """[1 t] as [size width]: the row again and again, padded on the right."""
    row = np.zeros((1, width), part.dtype)
    row[:, : part.shape[1]] = part
    return np.repeat(row, size, axis=0)

"""What a trained model says about pictures and texts: visual tokens, generated text, likelihoods of given text.

A picture is encoded once, whatever is asked about it: `encode_images` returns the visual tokens, which
`generate_text` and `likelihoods` pick by image row. A caption is a response to an empty prompt.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from eim_jax.config import ConfigError
from eim_jax.data import tokenize
from eim_jax.data.batch_order import best_widths
from eim_jax.data.loader import eval_images
from eim_jax.data.samples import Split
from eim_jax.generation.continuous import continue_all
from eim_jax.generation.sampler import DecodeConfig, Decoded, continue_text, texts
from eim_jax.models.vlm import VLM, LMInput
from eim_jax.parallel.processes import fetch, own_rows, place_rows
from eim_jax.parallel.sharding import parts_of
from eim_jax.training import partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress

GROUPS = 4  # continuous batches: this part of the rows is exchanged at a time
BUCKETS = 4  # lengths to which texts are padded, at most


class VisualTokens(NamedTuple):
    """The ST's output for some image rows of a split, and each one's place in it; None stands for no image."""

    tokens: Float[np.ndarray, "k m d"]
    place: dict[int | None, int]

    def of(self, images: Sequence[int | None]) -> tuple[Float[np.ndarray, "b m d"], Bool[np.ndarray, "b"]]:
        """Returns the visual tokens of these images, and which of them are images."""
        shown = np.array([image is not None for image in images], bool)
        return self.tokens[[self.place[image] for image in images]], shown


def encode_images(
    inputs: Inputs, vlm: VLM, params: Flat, split: Split, images: Sequence[int | None], *, quiet: bool = False
) -> VisualTokens:
    """Looks once at every image that occurs in `images` (rows of `split.images`, or None for text only)."""
    rows = list(dict.fromkeys(images))
    tree = _tree(params, "visual/", "st/")
    found, batch, size = [], rounded(inputs.config.decode.batch, inputs.mesh), vlm.visual.config.image_size
    with _progress(quiet, f"looking at {split.name} images", len(rows), "images") as advance:
        options = {"fit": inputs.config.data.fit, "threads": inputs.config.data.threads}
        wanted = np.array([-1 if row is None else row for row in rows], np.int32)
        wanted[~np.resize(own_rows(inputs.mesh, batch), len(wanted))] = -1  # other processes decode their own
        for at, (_, pixels) in enumerate(eval_images(split, batch, size, rows=wanted.tolist(), **options)):
            real = min(batch, len(rows) - at * batch)
            found.append(fetch(_connect(vlm, tree, *place_rows(inputs.mesh, [pixels])))[:real])
            advance(real)
    return VisualTokens(np.concatenate(found), {row: place for place, row in enumerate(rows)})


def generate_text(
    inputs: Inputs,
    vlm: VLM,
    params: Flat,
    seen: VisualTokens,
    images: Sequence[int | None],
    prompts: Sequence[str],
    method: str,
    label: str,
    *,
    quiet: bool = False,
) -> list[str]:
    """The text that the model says after each image and prompt (either may be absent: None, ""), by `method`.

    Raises ConfigError when the prompts leave the LM's context no room.
    """
    tree, settings = _tree(params), inputs.config.decode
    tokens, valid = tokenize.encode_prompts(prompts, inputs.lm_tokenizer, inputs.config.data.max_tokens)
    lengths, batch = valid.sum(1), rounded(settings.batch, inputs.mesh)
    # Whole batches, not continuous ones: few rows; an image's beams, which share their steps; several processes, which
    # would read back every group's state.
    few = len(images) <= batch or method == "beam" or jax.process_count() > 1

    def read(rows: Int[np.ndarray, "b"], width: int) -> LMInput:
        visual = seen.of([images[row] for row in rows])
        return _read(vlm, tree, *place_rows(inputs.mesh, [*visual, tokens[rows, :width], valid[rows, :width]]))

    size = batch if few else rounded(-(-batch // GROUPS), inputs.mesh)
    groups = ((rows, real, read(rows, width)) for rows, real, width in _batches(lengths, size, batch))
    one = (*seen.of(images[:1]), tokens[:1], valid[:1])
    longest = jax.eval_shape(functools.partial(_read, vlm), tree, *one).valid.shape[1]
    config = decoding(inputs, vlm, method, longest)
    ends = {"eos_id": inputs.lm_tokenizer.eos_token_id, "period_id": _period_id(inputs.lm_tokenizer)}
    options = {**ends, "mesh": inputs.mesh}
    found = [""] * len(images)
    with _progress(quiet, label, len(images), "rows") as advance:
        if few:
            for rows, real, prefix in groups:
                (index,) = place_rows(inputs.mesh, [rows])
                said = continue_text(vlm.lm, tree["lm"], prefix, config, **options, index=index)
                for row, words in zip(rows[:real], texts(fetch(said), inputs.lm_tokenizer), strict=False):
                    found[row] = words
                advance(real)
        else:
            coming = ((np.where(np.arange(size) < real, rows, -1), prefix) for rows, real, prefix in groups)
            for row, said in continue_all(vlm.lm, tree["lm"], coming, config, rows=batch, prefix=longest, **options):
                [found[row]] = texts(Decoded(*(np.asarray(a)[None] for a in said)), inputs.lm_tokenizer)
                advance(1)
    return found


def decoding(inputs: Inputs, vlm: VLM, method: str, read: int) -> DecodeConfig:
    """The config's decoding after `read` tokens: fewer new ones than it allows where the LM's context ends."""
    settings, room = inputs.config.decode, vlm.lm.config.context - read
    if room < 1:
        raise ConfigError(
            f"config.data.max_tokens={inputs.config.data.max_tokens} with what precedes the text leaves the LM's "
            f"context of {vlm.lm.config.context} no room to answer: lower it"
        )
    return DecodeConfig(
        method=method,
        beams=settings.beams,
        max_tokens=min(settings.max_tokens, room),
        stop_at_period=settings.stop_at_period,
        top_p=settings.top_p,
        temperature=settings.temperature,
        seed=inputs.config.seed,
    )


def likelihoods(
    inputs: Inputs,
    vlm: VLM,
    params: Flat,
    seen: VisualTokens,
    images: Sequence[int | None],
    encoded: tokenize.Encoded,
    label: str,
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """The log-likelihood in nats of each row's supervised tokens, given its image, and their number; float64."""
    tree, found = _tree(params), np.zeros((2, len(images)))
    batch = rounded(inputs.config.decode.batch, inputs.mesh)
    with progress(label, len(images), "rows") as advance:
        for rows, real, width in _batches(encoded.valid.sum(1), batch, batch):
            words = (getattr(encoded, name)[rows, :width] for name in ("tokens", "valid", "supervised"))
            visual = seen.of([images[row] for row in rows])
            pair = _likelihood(vlm, tree, *place_rows(inputs.mesh, [*visual, *words]))
            found[:, rows[:real]] = np.asarray(fetch(pair), np.float64)[:, :real]
            advance(real)
    return found[0], found[1]


def pick(encoded: tokenize.Encoded, rows: Sequence[int]) -> tokenize.Encoded:
    """The encoded texts of these rows."""
    return encoded._replace(**{name: getattr(encoded, name)[rows] for name in ("tokens", "valid", "supervised")})


def rounded(rows: int, mesh: Mesh) -> int:
    """The fewest rows from `rows` on that the mesh's data axes divide."""
    return rows + -rows % parts_of(mesh)


def _batches(lengths: Int[np.ndarray, "N"], size: int, batch: int) -> Iterator[tuple[Int[np.ndarray, "b"], int, int]]:
    """(rows, how many of them are not filling, width): every row once, `size` at a time, cut to their bucket's width.

    Rows of similar length are together, in as many buckets as have four batches each, so that there are few programs
    and few fillings. A bucket's last batch repeats its last row.
    """
    widths = best_widths(lengths, int(lengths.max(initial=0)), max(1, min(BUCKETS, len(lengths) // (4 * batch))))
    bucket = np.searchsorted(widths, lengths)
    for i, width in enumerate(widths):
        rows = np.flatnonzero(bucket == i)
        for begin in range(0, len(rows), size):
            at = np.minimum(np.arange(begin, begin + size), len(rows) - 1)
            yield rows[at], min(size, len(rows) - begin), width


def _tree(params: Flat, *under: str) -> dict:
    """The parameters under these paths, or all, as the tree that the towers take."""
    return partition.unflatten({path: leaf for path, leaf in params.items() if not under or path.startswith(under)})


def _progress(quiet: bool, *words):
    return contextlib.nullcontext(lambda _: None) if quiet else progress(*words)


def _period_id(tokenizer) -> int | None:
    """The id of the token "." (13 in GPT-2's vocabulary)."""
    found = tokenizer.convert_tokens_to_ids(".")
    return None if found == tokenizer.unk_token_id else found


# Parameters are arguments: closed over, they would be compiled into the program as constants.
@functools.partial(jax.jit, static_argnums=0)
def _connect(vlm, params, images):
    return vlm.connect(params, vlm.encode_image(params, images))


@functools.partial(jax.jit, static_argnums=0)
def _read(vlm, params, visual, has_image, tokens, valid):
    """What the LM reads before it has said anything."""
    return vlm.lm_input(params, tokens, valid, visual=visual, has_image=has_image)


@functools.partial(jax.jit, static_argnums=0)
def _likelihood(vlm, params, visual, has_image, tokens, valid, supervised):
    """Log-likelihood of each row's supervised tokens, and their number."""
    logits = vlm.token_logits(params, visual, tokens, valid, has_image=has_image)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(supervised, chosen, 0.0).sum(1), supervised.sum(1)

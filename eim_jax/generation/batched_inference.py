"""Any number of texts from a trained model, in batches over the mesh: generated ones, and the likelihood of given ones.

An image is encoded once, whatever is asked about it: `visual_tokens.encode_images` returns the visual tokens, which
`generate_text` and `likelihoods` pick by image row. A caption is a response to an empty prompt.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from eim_jax.config import ConfigError
from eim_jax.data import tokenize
from eim_jax.data.batch_order import best_widths
from eim_jax.data.rows import end_id, limit
from eim_jax.generation.continuous import continue_all
from eim_jax.generation.sampler import DecodeConfig, Decoded, continue_text, texts
from eim_jax.generation.visual_tokens import VisualTokens, progress_or_quiet, rounded, tree_of
from eim_jax.models.lm_input import LMInput
from eim_jax.models.vlm import VLM
from eim_jax.parallel.processes import fetch, place_rows
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress

GROUPS = 4  # continuous batching: a group that waits for free places is a batch divided by this
BUCKETS = 4  # lengths to which texts are padded, at most


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
    """Generates the text that follows each image and prompt.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      seen: the visual tokens of `images`.
      images: an image row for each text, None for no image.
      prompts: as many, "" for none.
      method: "greedy", "beam" or "nucleus".
      label: of the progress line.
      quiet: shows no progress.

    Raises:
      ConfigError: the prompts leave the LM's context no room.
    """
    vlm = vlm.in_generation(inputs.config.decode)
    tree, tokenizer = tree_of(params), inputs.lm_tokenizer
    data = inputs.config.data
    longest_text = [limit(data, image is not None) for image in images]
    tokens, valid = tokenize.encode_prompts(prompts, tokenizer, longest_text, data.seam)
    batch = rounded(inputs.config.decode.batch, inputs.mesh)

    def read(rows: Int[np.ndarray, "b"], width: int) -> LMInput:
        visual = seen.of([images[row] for row in rows])
        return read_inputs(vlm, tree, *place_rows(inputs.mesh, [*visual, tokens[rows, :width], valid[rows, :width]]))

    # Whole batches in place of continuous batching: for few rows; for beams, since those of an image take their steps
    # together; for several processes, each of which would have to fetch the state after every group.
    whole = len(images) <= batch or method == "beam" or jax.process_count() > 1
    size = batch if whole else rounded(-(-batch // GROUPS), inputs.mesh)
    groups = ((rows, real, read(rows, width)) for rows, real, width in _batches(valid.sum(1), size, batch))
    one = (*seen.of(images[:1]), tokens[:1], valid[:1])
    longest = jax.eval_shape(functools.partial(read_inputs, vlm), tree, *one).valid.shape[1]
    config = decoding(inputs, vlm, method, longest)
    ends = {"eos_id": end_id(data, tokenizer), "period_id": period_id(tokenizer), "mesh": inputs.mesh}
    if whole:
        decoded = _decode_whole(vlm.lm, tree["lm"], groups, config, **ends)
    else:
        coming = ((np.where(np.arange(size) < real, rows, -1), prefix) for rows, real, prefix in groups)
        decoded = continue_all(vlm.lm, tree["lm"], coming, config, rows=batch, prefix=longest, **ends)
    found = [""] * len(images)
    with progress_or_quiet(quiet, label, len(images), "rows") as advance:
        for row, said in decoded:
            [found[row]] = texts(Decoded(*(np.asarray(field)[None] for field in said)), tokenizer)
            advance(1)
    return found


def _decode_whole(lm, params, groups, config: DecodeConfig, *, mesh: Mesh, **ends) -> Iterator[tuple[int, Decoded]]:
    """Yields what `continue_all` does, batch after batch."""
    for rows, real, prefix in groups:
        (index,) = place_rows(mesh, [rows])
        said = fetch(continue_text(lm, params, prefix, config, **ends, mesh=mesh, index=index))
        for place, row in enumerate(rows[:real]):
            yield int(row), Decoded(*(field[place] for field in said))


def decoding(inputs: Inputs, vlm: VLM, method: str, read: int) -> DecodeConfig:
    """Returns the config's decoding after `read` tokens: fewer new ones than it allows where the LM's context ends.

    Args:
      inputs: the run's.
      vlm: the model.
      method: "greedy", "beam" or "nucleus".
      read: tokens before the first new one.

    Raises:
      ConfigError: there is no room for one.
    """
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
    """Computes how likely given texts are after their images.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      seen: the visual tokens of `images`.
      images: an image row for each text, None for no image.
      encoded: the texts.
      label: of the progress line.

    Returns:
      the log-likelihood in nats of each text's supervised tokens, and the number of these; float64.
    """
    tree, found = tree_of(params), np.zeros((2, len(images)))
    batch = rounded(inputs.config.decode.batch, inputs.mesh)
    with progress(label, len(images), "rows") as advance:
        for rows, real, width in _batches(encoded.valid.sum(1), batch, batch):
            words = (getattr(encoded, name)[rows, :width] for name in ("tokens", "valid", "supervised"))
            visual = seen.of([images[row] for row in rows])
            pair = likelihood_of(vlm, tree, *place_rows(inputs.mesh, [*visual, *words]))
            found[:, rows[:real]] = np.asarray(fetch(pair), np.float64)[:, :real]
            advance(real)
    return found[0], found[1]


def pick(encoded: tokenize.Encoded, rows: Sequence[int]) -> tokenize.Encoded:
    """Returns the encoded texts of these rows."""
    return encoded._replace(**{name: getattr(encoded, name)[rows] for name in ("tokens", "valid", "supervised")})


def _batches(lengths: Int[np.ndarray, "N"], size: int, batch: int) -> Iterator[tuple[Int[np.ndarray, "b"], int, int]]:
    """Yields (rows, how many of them are no padding, width): every row once, `size` at a time.

    Texts of similar length are put together and padded to a common width, their bucket's. There are at most BUCKETS of
    them, and no more than have four batches each: every width is one more program to compile. A bucket's last batch is
    padded with its last row.
    """
    widths = best_widths(lengths, int(lengths.max(initial=0)), max(1, min(BUCKETS, len(lengths) // (4 * batch))))
    bucket = np.searchsorted(widths, lengths)
    for i, width in enumerate(widths):
        rows = np.flatnonzero(bucket == i)
        for begin in range(0, len(rows), size):
            at = np.minimum(np.arange(begin, begin + size), len(rows) - 1)
            yield rows[at], min(size, len(rows) - begin), width


def period_id(tokenizer) -> int | None:
    """Returns the id of the token "." (13 in GPT-2's vocabulary)."""
    found = tokenizer.convert_tokens_to_ids(".")
    return None if found == tokenizer.unk_token_id else found


# Parameters are arguments: closed over, they would be compiled into the program as constants.
@functools.partial(jax.jit, static_argnums=0)
def read_inputs(vlm, params, visual, has_image, tokens, valid):
    """Returns what the LM reads before the first new token.

    Args:
      vlm: the model, as it generates text (`VLM.in_generation`).
      params: the nested tree of its parameters.
      visual: the ST's output [b m d].
      has_image: which rows have one [b].
      tokens: the prompts, padded on the right [b t].
      valid: which of them are no padding.
    """
    return vlm.lm_input(params, tokens, valid, visual=visual, has_image=has_image, generating=True)


@functools.partial(jax.jit, static_argnums=0)
def likelihood_of(vlm, params, visual, has_image, tokens, valid, supervised):
    """Returns the log-likelihood of each row's supervised tokens in nats, and their number.

    Args:
      vlm: the model.
      params: the nested tree of its parameters.
      visual: the ST's output [b m d].
      has_image: which rows have one [b].
      tokens: prompts with their texts, padded on the right [b t].
      valid: which of them are no padding.
      supervised: which of them are the texts'.
    """
    logits = vlm.token_logits(params, visual, tokens, valid, has_image=has_image)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(supervised, chosen, 0.0).sum(1), supervised.sum(1)

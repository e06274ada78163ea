"""From texts to token arrays: the LM's rows as data/rows.py makes them, and CLIP's text input for the queue K_t."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from eim_jax.data import rows
from eim_jax.data.conversation import TOKENIZER
from eim_jax.data.samples import Split
from eim_jax.pretrained.tokenizer import load_tokenizer as load_tokenizer
from eim_jax.utils.console import console, progress

_LONG = 50_000  # texts from which on a progress bar is worth its lines
_CHUNK = 16_384  # samples that are lists of numbers at once


class Encoded(NamedTuple):
    """The LM's input of a split; row i is sample i. t is the longest row."""

    tokens: Int[np.ndarray, "N t"]  # instruction + response + EOS, padded on the right with 0
    valid: Bool[np.ndarray, "N t"]  # a real token, not padding
    supervised: Bool[np.ndarray, "N t"]  # what lies behind the instruction: response (+ EOS)
    truncated: int = 0  # samples that were longer than max_tokens

    @classmethod
    def of(cls, ids: np.ndarray, lengths: np.ndarray, start: np.ndarray, stop: np.ndarray, truncated: int) -> "Encoded":
        """Returns rows whose ids stand one after the other in `ids`; those of [start, stop) in a row are supervised."""
        tokens, valid = _padded(ids, lengths, 0)
        columns = np.arange(tokens.shape[1], dtype=np.int32)[None]
        return cls(tokens, valid, (columns >= start[:, None]) & (columns < stop[:, None]), truncated)

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns (ids, lengths, start, stop), which `of` takes; a row without a supervised token has 0, 0."""
        start = self.supervised.argmax(axis=1).astype(np.int32) if self.tokens.size else np.zeros(0, np.int32)
        stop = start + self.supervised.sum(axis=1, dtype=np.int32)
        return self.tokens[self.valid], self.valid.sum(axis=1, dtype=np.int32), start, stop


def encode_split(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    eos: bool,
    *,
    seam: str = "one_string",
    cut: str = "balanced",
    text_only: int = 0,
) -> Encoded:
    """Returns the tokens of every sample: instruction, response and EOS as data/rows.py joins and cuts them.

    Args:
      split: whose samples are encoded.
      tokenizer: the LM's.
      max_tokens: the longest row: instruction, response, and EOS where it is supervised.
      eos: whether EOS is supervised; it is there in any case, since K_b and loss_LM read the LM at it.
      seam: how instruction and response are joined, one of rows.SEAMS, or by the tokenizer's chat template.
      cut: what too long a row loses, "balanced" or "end" (rows.fit).
      text_only: the longest row of a sample without a picture, where that is more.

    Returns:
      Arrays of shape [N, t], row i for sample i; t is the longest row.

    Raises:
      ValueError: `max_tokens` is too small, the tokenizer has no EOS, some responses have no token (they would teach
        nothing): their ids are listed; or `cut` leaves no row a supervised token.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}: needs room for a response token and EOS")
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
    samples, parts, empty = split.samples, [], []
    with _progress(f"tokenising {split.name}", len(samples)) as advance:
        # A part at a time: lists of numbers take ten times the memory of arrays.
        for first in range(0, max(len(samples), 1), _CHUNK):
            some = samples[first : first + _CHUNK]
            prompts, answers = [sample.instruction for sample in some], [sample.response for sample in some]
            try:
                whole = rows.whole_rows(prompts, answers, tokenizer, seam, f"tokenising {split.name}")
            except rows.RowError as error:
                raise ValueError(f"split {split.name!r}: sample {some[error.row].id}: {error}") from error
            end = rows.end_of(tokenizer, seam)  # only now: a template's error has named its sample
            empty += [sample.id for sample, row in zip(some, whole, strict=True) if row.start == len(row.ids)]
            longest = [max(max_tokens, text_only) if sample.image is None else max_tokens for sample in some]
            found = [
                rows.fit(row, most, end, eos=eos, seam=seam, cut=cut) for row, most in zip(whole, longest, strict=True)
            ]
            ids = np.array([token for row in found for token in row.ids], np.int32)
            numbers = np.array([(len(row.ids), row.start, row.stop, row.cut) for row in found], np.int32)
            parts.append((ids, numbers.reshape(-1, 4)))
            advance(len(some))
    _check_responses(split, empty)
    ids, numbers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    lengths, start, stop, truncated = numbers.T
    encoded = Encoded.of(ids, lengths, start, stop, int(truncated.sum()))
    note_cut(split, encoded, max_tokens)
    return encoded


def note_cut(split: Split, encoded: Encoded, max_tokens: int) -> None:
    """Says how many samples were cut, and how many of them to nothing that teaches.

    Raises:
      ValueError: all of them.
    """
    truncated, total = encoded.truncated, len(encoded.tokens)
    bare = total - int(encoded.supervised.any(axis=1).sum())
    if truncated:
        console.print(f"{split.name}: {truncated:,} of {total:,} samples cut to {max_tokens} tokens")
    if bare:
        said = f"{split.name}: cut at their end, {bare:,} of {total:,} samples keep no token of their response"
        if bare == total:
            raise ValueError(f"{said}: raise config.data.max_tokens, or set config.data.cut='balanced'")
        console.print(f"{said}: they teach nothing", soft_wrap=True)


def _progress(label: str, count: int) -> Any:
    return progress(label, count, "texts") if count >= _LONG else contextlib.nullcontext(lambda _: None)


def _check_responses(split: Split, empty: Sequence[str]) -> None:
    if empty:
        ids = ", ".join(empty[:20]) + (", ..." if len(empty) > 20 else "")
        raise ValueError(
            f"split {split.name!r}: {len(empty)} samples have a response without tokens, so nothing would be "
            f"supervised: ids {ids}. Give them a response or remove them."
        )


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int | Sequence[int], seam: str = ""
) -> tuple[Int[np.ndarray, "N t"], Bool[np.ndarray, "N t"]]:
    """Returns the instructions to be answered as (tokens, valid); too long a one keeps its end, next to the answer.

    Args:
      prompts: one a row, "" for none.
      tokenizer: the LM's.
      max_tokens: the longest row, of all or of each.
      seam: the run's.
    """
    distinct = list(dict.fromkeys(prompts))
    ids = dict(zip(distinct, rows.prompt_ids(distinct, tokenizer, seam), strict=True))
    longest = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    found = [ids[prompt][max(len(ids[prompt]) - most, 0) :] for prompt, most in zip(prompts, longest, strict=True)]
    cut = sum(len(ids[prompt]) > len(row) for prompt, row in zip(prompts, found, strict=True))
    if cut:
        console.print(f"{cut:,} of {len(found):,} prompts cut to their last {max(longest)} tokens")
    return _pad(found, 0)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: int, name: str) -> None:
    """Raises ValueError when the tokenizer of `name` gives ids that its weights (of `vocab` embeddings) do not have."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab:
        raise ValueError(
            f"{name}: its tokenizer gives ids up to {highest}, but its weights have {vocab} embeddings: "
            "the tokenizer files are another model's"
        )


def encode_clip(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int = 77) -> Int[np.ndarray, "N s"]:
    """Returns CLIP's text input: BOS, the text, EOS; then the tokenizer's pad id (0 if it has none).

    A text is cut to `context` tokens with EOS kept, and the log says how many were. s is the longest row: CLIP's text
    tower is causal and reads the first EOS, so shorter rows give the same features as rows padded to `context`.
    """
    if context < 2:
        raise ValueError(f"context is {context}: needs room for BOS and EOS")
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if bos is None or eos is None:
        raise ValueError("CLIP's tokenizer needs a BOS and an EOS token: this one is another model's")
    found = rows.ids_of(texts, tokenizer, "tokenising for CLIP")
    cut = sum(len(ids) > context - 2 for ids in found)
    if cut:
        console.print(f"{cut:,} of {len(found):,} texts cut to the {context} tokens that CLIP's text tower reads")
    return _pad([[bos, *ids[: context - 2], eos] for ids in found], 0 if pad is None else pad)[0]


def encode_padded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int) -> Int[np.ndarray, "N s"]:
    """Returns a text tower's input as its tokenizer frames a text (SigLIP's puts EOS behind), padded to `context`.

    Padding is part of what such a tower reads: it sees all places and takes the last one's feature. A text is cut to
    what the frame leaves, and the log says how many were.

    Raises:
      ValueError: the tokenizer has no padding token, or `context` no room for its frame.
    """
    alone, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), None)
    if before is None or tokenizer.pad_token_id is None:
        raise ValueError("the text tower's tokenizer has no padding token, or changes a text that it frames")
    start, end = whole[:before], whole[before + len(alone) :]
    room = context - len(start) - len(end)
    if room < 1:
        raise ValueError(f"context is {context}: needs room for more than {len(start) + len(end)} special tokens")
    found = rows.ids_of(texts, tokenizer, "tokenising captions")
    cut = sum(len(ids) > room for ids in found)
    if cut:
        console.print(f"{cut:,} of {len(found):,} texts cut to the {context} tokens that the text tower reads")
    tokens = np.full((len(found), context), tokenizer.pad_token_id, np.int32)
    for row, ids in zip(tokens, found, strict=True):
        framed = [*start, *ids[:room], *end]
        if tokenizer.padding_side == "left":
            row[context - len(framed) :] = framed
        else:
            row[: len(framed)] = framed
    return tokens


def fingerprint(tokenizer: PreTrainedTokenizerBase, seam: str = "") -> str:
    """Returns the sha256 over what decides the ids: vocabulary, merges, normalisation, splitting, special tokens.

    So does the chat template, where the seam is its.
    """
    content: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items()), "special": tokenizer.special_tokens_map}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        content["backend"] = {part: backend.get(part) for part in ("model", "normalizer", "pre_tokenizer")}
    else:
        content["class"] = type(tokenizer).__name__
    if seam == TOKENIZER:
        content["chat_template"] = tokenizer.get_chat_template()
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _pad(lists: Sequence[Sequence[int]], fill: int) -> tuple[Int[np.ndarray, "N t"], Bool[np.ndarray, "N t"]]:
    """Returns rows of unequal length as one array, padded on the right, and which entries are real."""
    lengths = np.fromiter((len(row) for row in lists), np.int32, len(lists))
    ids = np.fromiter((token for row in lists for token in row), np.int32, int(lengths.sum()))
    return _padded(ids, lengths, fill)


def _padded(
    ids: Int[np.ndarray, "total"], lengths: Int[np.ndarray, "N"], fill: int
) -> tuple[Int[np.ndarray, "N t"], Bool[np.ndarray, "N t"]]:
    """The same of rows that stand one after the other."""
    valid = np.arange(lengths.max(initial=0), dtype=np.int32)[None] < lengths[:, None]
    tokens = np.full(valid.shape, fill, np.int32)
    tokens[valid] = ids
    return tokens, valid

"""From texts to token arrays: the LM's input built from token segments, and CLIP's text input for the queue K_t."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from eim_jax.data.samples import Split
from eim_jax.pretrained.tokenizer import load_tokenizer as load_tokenizer
from eim_jax.utils.console import console, progress

_CHUNK = 8192  # texts given to the tokenizer at once
_LONG = 50_000  # texts from which on a progress bar is worth its lines (about two seconds)


class Encoded(NamedTuple):
    """The LM's input of a split; row i is sample i. t is the longest row, at most `max_tokens`."""

    tokens: Int[np.ndarray, "N t"]  # instruction + response + EOS, padded on the right with 0
    valid: Bool[np.ndarray, "N t"]  # a real token, not padding
    supervised: Bool[np.ndarray, "N t"]  # response (+ EOS)
    truncated: int = 0  # samples that were longer than max_tokens


def encode_split(split: Split, tokenizer: PreTrainedTokenizerBase, max_tokens: int, eos: bool) -> Encoded:
    """Returns the tokens of every sample: instruction ids, then response ids, then EOS, which `eos` supervises.

    EOS is there in any case: K_b and loss_LM read the LM at it. ClipCap's loss_base leaves it out.

    The two texts are tokenised apart and joined as ids, so the supervised part is exact by construction (no prefix is
    ever tokenised again). Too long a sample loses the end of its response first (EOS is kept), down to a quarter of
    `max_tokens`, then the start of its instruction: the answer stands first in a response, and next to the
    instruction's end. Special tokens written in a text are read as plain text.

    Args:
      split: whose samples are encoded.
      tokenizer: the LM's.
      max_tokens: the longest row, instruction, response and EOS together.
      eos: whether EOS is supervised.

    Returns:
      Arrays of shape [N, t], row i for sample i; t is the longest row.

    Raises:
      ValueError: `max_tokens` is too small, the tokenizer has no EOS, or some responses have no token (they would teach
        nothing): their ids are listed.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}: needs room for a response token and EOS")
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
    responses = _tokenise([sample.response for sample in split.samples], tokenizer, f"tokenising {split.name}")
    empty = [sample.id for sample, ids in zip(split.samples, responses, strict=True) if not ids]
    if empty:
        ids = ", ".join(empty[:20]) + (", ..." if len(empty) > 20 else "")
        raise ValueError(
            f"split {split.name!r}: {len(empty)} samples have a response without tokens, so nothing would be "
            f"supervised: ids {ids}. Give them a response or remove them."
        )
    distinct = list(dict.fromkeys(sample.instruction for sample in split.samples))  # often one prompt for all
    instruction_of = dict(zip(distinct, _tokenise(distinct, tokenizer, "tokenising instructions"), strict=True))

    ending = [tokenizer.eos_token_id]
    rows, before, truncated = [], [], 0
    for sample, response in zip(split.samples, responses, strict=True):
        instruction = instruction_of[sample.instruction]
        truncated += len(instruction) + len(response) + len(ending) > max_tokens
        least = max(max_tokens - len(instruction), max_tokens // 4, 2)
        response = response[: least - len(ending)] + ending
        room = max_tokens - len(response)
        instruction = instruction[max(len(instruction) - room, 0) :]
        rows.append(instruction + response)
        before.append(len(instruction))
    if truncated:
        console.print(f"{split.name}: {truncated:,} of {len(rows):,} samples cut to {max_tokens} tokens")
    tokens, valid = _pad(rows, 0)
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    supervised = valid & (columns[None] >= np.asarray(before, np.int32)[:, None])
    if not eos:
        supervised &= columns[None] < valid.sum(1, keepdims=True) - 1
    return Encoded(tokens, valid, supervised, truncated)


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[Int[np.ndarray, "N t"], Bool[np.ndarray, "N t"]]:
    """Returns the instructions to be answered as (tokens, valid); too long a one keeps its end, as in encode_split."""
    distinct = list(dict.fromkeys(prompts))
    ids = dict(zip(distinct, _tokenise(distinct, tokenizer, "tokenising prompts"), strict=True))
    rows = [ids[prompt][max(len(ids[prompt]) - max_tokens, 0) :] for prompt in prompts]
    cut = sum(len(ids[prompt]) > max_tokens for prompt in prompts)
    if cut:
        console.print(f"{cut:,} of {len(rows):,} prompts cut to their last {max_tokens} tokens")
    return _pad(rows, 0)


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
    found = _tokenise(texts, tokenizer, "tokenising for CLIP")
    cut = sum(len(ids) > context - 2 for ids in found)
    if cut:
        console.print(f"{cut:,} of {len(found):,} texts cut to the {context} tokens that CLIP's text tower reads")
    rows = [[bos, *ids[: context - 2], eos] for ids in found]
    return _pad(rows, 0 if pad is None else pad)[0]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the sha256 over what decides the ids: vocabulary, merges, normalisation, splitting, special tokens."""
    content: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items()), "special": tokenizer.special_tokens_map}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        content["backend"] = {part: backend.get(part) for part in ("model", "normalizer", "pre_tokenizer")}
    else:
        content["class"] = type(tokenizer).__name__
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, label: str) -> list[list[int]]:
    """Returns the ids of each text alone, without special tokens, through the tokenizer's batch path."""

    def ids_of(chunk: Sequence[str]) -> list[list[int]]:
        return tokenizer(
            list(chunk),
            add_special_tokens=False,
            split_special_tokens=True,  # "<|endoftext|>" in a caption is text, not the end
            return_attention_mask=False,
            verbose=False,  # long texts are cut, and counted, by the caller
        )["input_ids"]

    if len(texts) < _LONG:
        return ids_of(texts) if texts else []
    found: list[list[int]] = []
    with progress(label, len(texts), "texts") as advance:
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            found.extend(ids_of(chunk))
            advance(len(chunk))
    return found


def _pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int[np.ndarray, "N t"], Bool[np.ndarray, "N t"]]:
    """Returns rows of unequal length as one array, padded on the right, and which entries are real."""
    lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
    valid = np.arange(lengths.max(initial=0), dtype=np.int32)[None] < lengths[:, None]
    tokens = np.full(valid.shape, fill, np.int32)
    tokens[valid] = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
    return tokens, valid

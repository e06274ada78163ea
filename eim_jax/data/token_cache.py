"""The tokens of a large split, kept in a folder of the cache: a later start reads them instead of tokenising again."""

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from eim_jax.data import tokenize
from eim_jax.data.samples import Split
from eim_jax.data.tokenize import Encoded
from eim_jax.parallel import processes
from eim_jax.parallel.lock import held
from eim_jax.utils.console import console
from eim_jax.utils.files import Damaged, DiskFull, check_seal, new_folder, read_json, read_rows, seal

_LEAST = 20_000  # samples; fewer are tokenised in a second
_VERSION = 1  # raised when the same settings give other tokens, or the files another form
_ARRAYS = ("ids", "lengths", "start", "stop")


def cached_split(
    cache: Path,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    max_tokens: int,
    eos: bool,
    **options: Any,
) -> Encoded:
    """Returns what `tokenize.encode_split` does, read from `cache`/tokens where an earlier start left it there.

    The folder's name is a hash of all that decides the tokens: the split's fingerprint, the tokenizer's, the version of
    the library that runs it, and the settings. Splits of fewer than 20,000 samples are tokenised anew.

    Args:
      cache: the folder that keeps what need not be found out twice.
      split: whose samples are encoded.
      tokenizer: the LM's.
      fingerprint: of the tokenizer, as `tokenize.fingerprint` gives it with the seam.
      max_tokens: as `encode_split` takes it.
      eos: as `encode_split` takes it.
      **options: as `encode_split` takes them.

    Raises:
      As `encode_split`.
      DiskFull: naming the folder.
    """
    if len(split) < _LEAST:
        return tokenize.encode_split(split, tokenizer, max_tokens, eos, **options)
    facts = {
        "version": _VERSION,
        "data": split.fingerprint(),
        "tokenizer": fingerprint,
        "tokenizers": [metadata.version(name) for name in ("tokenizers", "transformers")],
        "settings": {"max_tokens": max_tokens, "eos": eos, **options},
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / "tokens" / f"{split.name}-{name}"
    found = _read(folder, len(split))
    if found is not None:
        tokenize.note_cut(split, found, max_tokens)
        return found
    encoded = tokenize.encode_split(split, tokenizer, max_tokens, eos, **options)
    if processes.is_first():
        _write(folder, encoded)
    return encoded


def _read(folder: Path, count: int) -> Encoded | None:
    """The tokens of a whole folder; None where there is none, or it is no longer what was written."""
    if not folder.is_dir():
        return None
    try:
        check_seal(folder, folder)
        truncated = read_json(folder / "note.json", {"truncated": int})["truncated"]
        ids, lengths, start, stop = (np.array(read_rows(folder / f"{name}.npy", folder)) for name in _ARRAYS)
        if not len(lengths) == len(start) == len(stop) == count or lengths.sum() != len(ids):
            raise Damaged(folder, "its files are not of one split", folder)
    except (Damaged, OSError):
        console.print(f"{folder} is damaged: tokenising again", soft_wrap=True)
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)
        return None
    return Encoded.of(ids, lengths, start, stop, truncated)


def _write(folder: Path, encoded: Encoded) -> None:
    """Writes the folder whole or not at all; one that may not be written is no reason to stop."""
    arrays = dict(zip(_ARRAYS, encoded.parts(), strict=True))
    try:
        with held(folder, wait=True):
            if folder.exists():  # by a run that shares the cache
                return
            with new_folder(folder) as fresh:
                for name, array in arrays.items():
                    np.save(fresh / f"{name}.npy", array)
                (fresh / "note.json").write_text(json.dumps({"truncated": encoded.truncated}))
                seal(fresh)
    except DiskFull:
        raise
    except OSError as error:
        console.print(f"the tokens are not kept: {error}", soft_wrap=True)

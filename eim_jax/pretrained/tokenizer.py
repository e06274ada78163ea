"""A tower's tokenizer from its folder: where tokenizer.json exists, the ids are that file's."""

import functools
import os
import pathlib
import re
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eim_jax.models.hugging_face import WeightsError
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.json_files import read_json

# What may stand in tokenizer_config.json and special_tokens_map.json and decides ids.
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_NAMES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "vocab.json")
# tokenizer.json's parts, which the format fixes.
_PARTS = {
    "model": dict,
    "added_tokens": list,
    "normalizer": (dict, type(None)),
    "pre_tokenizer": (dict, type(None)),
    "post_processor": (dict, type(None)),
    "decoder": (dict, type(None)),
}
# What tokenizer_config.json says besides, as far as it is used.
_SETTINGS = {
    "tokenizer_class": (str,),
    "added_tokens_decoder": (dict,),
    "model_max_length": (int, float),
    "clean_up_tokenization_spaces": (bool,),
    "padding_side": (str,),
    "truncation_side": (str,),
    "chat_template": (str, list),
}
_START = "starts_with_bos"  # ours, in a tokenizer's settings
_WITH_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_LOWERCASING = ("Siglip2Tokenizer",)  # classes that lower-case, whatever tokenizer.json has
_JSON_NAMES = {
    **{dict: "an object", list: "a list", str: "a text", type(None): "null"},
    **{bool: "true or false", int: "a whole number", float: "a number"},
}


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a tower.

    Args:
      path: a local folder, "miniature/...", or a hub id.

    Returns:
      The tokenizer, as transformers gives it; where there is a tokenizer.json, with that file's normalizer,
      pre-tokenizer, model and added tokens.

    Raises:
      ValueError: there is none, or one of its files is broken; the message names the file, or the path and the files
        that a folder needs.
    """
    place = resolve(path)
    if (place / "params.json").is_file() and not (place / "tokenizer.model").is_file():
        place = place.parent  # Meta gives one tokenizer.model out for the folders of all sizes
    _check_files(place)
    own = _own(place / "tokenizer.json")
    alone = (place / "tokenizer.model").is_file() and not list(place.glob("tokenizer*.json"))
    try:
        if alone:  # AutoTokenizer would read the pieces, but without SentencePiece's leading space: other ids, no error
            return _with_start(LlamaTokenizer.from_pretrained(place), place)
        named = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for files that it does not understand
        read = [name for name in _NAMES if (place / name).is_file()]
        said = f"transformers says of {', '.join(read)}: " if read else ""
        raise ValueError(
            f"no tokenizer in {path}: {said}{error or type(error).__name__}. A folder needs tokenizer.json, "
            "tokenizer.model, or vocab.json with merges.txt."
        ) from error
    return _with_start(named if own is None else _with_special_tokens(own, named), place)


def _own(file: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a tokenizer.json; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no kind of its own for a file that it cannot read
        raise WeightsError(f"{file} is none that the tokenizers library reads ({error}); download it again") from error


def _with_special_tokens(own: Tokenizer, named: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of a tokenizer.json, with the special tokens and settings of the class that the folder names.

    transformers builds GPT2Tokenizer, CLIPTokenizer, LlamaTokenizer and others from the file's vocabulary with a
    normalizer and a splitter of its own: a file that splits otherwise (SmolLM's, digit by digit) would get other ids.
    SigLIP 2's class lower-cases what its files, Gemma's, do not: its text tower was trained so.
    """
    if type(named).__name__ in _LOWERCASING:
        own.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([own.normalizer] if own.normalizer else [])])
    own.no_truncation()
    own.no_padding()
    settings = ("model_max_length", "clean_up_tokenization_spaces", "padding_side", "truncation_side", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        name_or_path=named.name_or_path,
        **({"extra_special_tokens": extra} if (extra := list(named.extra_special_tokens)) else {}),
        **{name: getattr(named, name) for name in SPECIAL if getattr(named, name) is not None},
        **{name: getattr(named, name) for name in settings if getattr(named, name, None) is not None},
        **{name: value for name, value in named.init_kwargs.items() if name == "seam"},  # ours, see data/rows.py
    )


def _with_start(tokenizer: PreTrainedTokenizerBase, place: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer with a note of whether its texts start with BOS.

    By tokenizer_config.json's `add_bos_token`, else if its ids do, else if it is of a class that adds BOS unless told
    otherwise: transformers 5 no longer does that for every folder of LLaMA's.
    """
    file = place / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {"tokenizer_class": type(tokenizer).__name__}
    stated = config.get(_START, config.get("add_bos_token"))
    if not isinstance(stated, bool):
        bos = tokenizer.bos_token_id
        added = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
        stated = added or str(config.get("tokenizer_class")).removesuffix("Fast") in _WITH_BOS
    tokenizer.init_kwargs[_START] = stated  # saved with an exported tokenizer, which names another class
    return tokenizer


def bos_id(tokenizer: Any) -> int | None:
    """Returns the token that a text starts with; None where it starts without one (GPT-2's, SmolLM2's, Qwen's).

    Args:
      tokenizer: of `load_tokenizer`; or a plan's stand-in, whose ids tell; or None.
    """
    if tokenizer is None or tokenizer.bos_token_id is None:
        return None
    said = getattr(tokenizer, "init_kwargs", {}).get(_START)
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] if said is None else said
    return tokenizer.bos_token_id if starts else None


@functools.lru_cache(maxsize=16)
def _eos_id(place: pathlib.Path, state: tuple) -> int | None:
    return load_tokenizer(place).eos_token_id


def eos_id(directory: pathlib.Path) -> int | None:
    """Returns the id that a folder's tokenizer ends a text with; None where there is no tokenizer, or no such token."""
    files = [f for name in ("tokenizer*", "special_tokens_map.json", "vocab.json") for f in directory.glob(name)]
    if not any(f.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for f in files):
        return None
    return _eos_id(directory, tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(files)))


def _check_files(place: pathlib.Path) -> None:
    """Raises WeightsError for a JSON file of the tokenizer with a field of a type that the format does not have."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (place / name).is_file():
            continue
        content = read_json(place / name)
        for field in SPECIAL:
            token = content.get(field)
            if not (token is None or _is_text(token) or _has_content(token)):
                raise WeightsError(
                    f"{place / name}: {field} is {token!a:.80}, not a text or an object with a text as its content"
                )
        for field, kinds in _SETTINGS.items():
            _check_type(place / name, content, field, (*kinds, type(None)))
        for key, token in (content.get("added_tokens_decoder") or {}).items():
            if not (key.isdecimal() and _has_content(token)):
                raise WeightsError(
                    f"{place / name}: added_tokens_decoder.{key} is {token!r:.80}; an id with an object "
                    "that has a text as its content is needed"
                )
    if (place / "tokenizer.json").is_file():
        content = read_json(place / "tokenizer.json")
        for field, kinds in _PARTS.items():
            if field == "model" or field in content:
                _check_type(place / "tokenizer.json", content, field, kinds)
        if isinstance(vocab := content["model"].get("vocab"), dict):  # SentencePiece's is a list, whose places are ids
            _check_ids(place / "tokenizer.json", vocab)
    if (place / "vocab.json").is_file():
        _check_ids(place / "vocab.json", read_json(place / "vocab.json"))


def _check_ids(file: pathlib.Path, vocab: dict) -> None:
    """Raises WeightsError for a piece whose id is none, or another's: libraries differ in which they keep."""
    pieces: dict[int, str] = {}
    for piece, number in vocab.items():
        if type(number) is not int or number < 0:
            raise WeightsError(f"{file}: {piece!a:.80} is {number!a:.80}, not an id (0, 1, ...)")
        if number in pieces:
            raise WeightsError(f"{file}: {pieces[number]!a:.80} and {piece!a:.80} have one id, {number}")
        pieces[number] = piece


def _has_content(token: object) -> bool:
    return isinstance(token, dict) and _is_text(token.get("content"))


def _is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold: half of an emoji, which JSON can state, is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _check_type(file: pathlib.Path, content: dict, field: str, kinds) -> None:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    value = content.get(field)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_JSON_NAMES[kind] for kind in kinds)
        raise WeightsError(f"{file}: {field} is {content.get(field)!r:.80}, not {wanted}")

"""What lies beside a tower's weights: its tokenizer, and how its pictures are made."""

import functools
import json
import pathlib

import numpy as np
import tokenizers

from eim_jax.pretrained.image_processor import image_processor
from eim_jax.pretrained.tokenizer import eos_id, load_tokenizer
from eim_jax.utils.images import CLIP_MEAN, CLIP_STD

from .engine import Format
from .plain import as_json, json_of
from .towers import MINIATURE, _clip

WORDS = ("a red cube", "Two balls, 12 of them!", "naïve  dög 😀 <|endoftext|>", "")


@functools.cache
def _processor():
    """The two files that say how a tower's pictures are made; the nested one wins."""
    plain = json.loads(_clip()["preprocessor_config.json"])
    nested = {**plain, "image_mean": [0.5, 0.25, 0.125], "rescale_factor": 1 / 255}
    return {
        "processor_config.json": as_json({"processor_class": "CLIPProcessor", "image_processor": nested}),
        "preprocessor_config.json": as_json(plain),
    }


def _read_processor(folder: pathlib.Path):
    found = image_processor(folder)
    found.check(8, "crop")
    return found


def _check_processor(folder: pathlib.Path, found):
    nested, plain, said = folder / "processor_config.json", folder / "preprocessor_config.json", None
    if nested.is_file():
        said = json_of(nested).get("image_processor")
    if said is None:
        said = json_of(plain) if plain.is_file() else {}
    said = {key: value for key, value in said.items() if value is not None}
    assert found.resample == said.get("resample", 3), "another filter than the file's"
    assert said.get("do_resize", True) is True, "another way to resize was passed over"
    grey = np.arange(256)
    wanted = grey * (said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0)
    for channel in range(3):
        ours = (grey / 255 - found.mean[channel]) / found.std[channel]
        theirs = wanted
        if said.get("do_normalize", True):
            mean, std = (_channel(said.get(key, value), channel) for key, value in _STATISTICS.items())
            theirs = (wanted - mean) / std
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max(), err_msg="other pixels")


_STATISTICS = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}


def _channel(values, channel: int) -> float:
    return values if isinstance(values, int | float) else values[channel]


@functools.cache
def _tokenizer(name):
    """The miniature's tokenizer with a vocabulary of its first pieces, so that changes reach the other fields."""
    files = {file.name: file.read_bytes() for file in sorted((MINIATURE / name).glob("tokenizer*"))}
    return files


def _read_tokenizer(folder: pathlib.Path):
    found = load_tokenizer(folder)
    return found, [found(text, add_special_tokens=False)["input_ids"] for text in WORDS], eos_id(folder)


def _check_tokenizer(folder: pathlib.Path, found):
    tokenizer, ids, end = found
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_truncation()
    own.no_padding()
    wanted = [own.encode(text, add_special_tokens=False).ids for text in WORDS]
    said = json_of(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    added = set(tokenizer.get_vocab()) - set(own.get_vocab())  # special tokens that the config alone names
    if not added:
        assert ids == wanted, f"ids {ids} for {wanted}"
    token = said.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and token in own.get_vocab():
        assert end == own.token_to_id(token), f"EOS {end} for {token!r}"


FORMATS = (
    Format("processor", _processor, _read_processor, _check_processor, quick=60),
    Format("tokenizer-gpt2", functools.partial(_tokenizer, "gpt2"), _read_tokenizer, _check_tokenizer, quick=25),
    Format("tokenizer-llama", functools.partial(_tokenizer, "llama"), _read_tokenizer, _check_tokenizer, quick=25),
)

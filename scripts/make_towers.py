"""Writes randomly initialised towers as Hugging Face directories: for trials and timings where no weights are at hand.

python scripts/make_towers.py --size=full --clip_tokenizer=DIR --lm_tokenizer=DIR --out=towers
writes towers/clip and towers/lm, which --config.towers.clip and --config.towers.lm take. Sizes: "full" is ViT-B/32 and
GPT-2 small; "small" is a few million parameters at 64 pixels, with --lm=llama a small LLaMA.
"""

import argparse
import dataclasses
import gzip
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer, CLIPTokenizer, GPT2Tokenizer, LlamaTokenizer

from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.pretrained import CLIP, LM, export_clip, export_lm

VISION = {
    "full": CLIPVisionConfig(),
    "small": CLIPVisionConfig(image_size=64, patch_size=16, width=128, layers=4, heads=4, mlp=512, joint=128),
}
TEXT = {
    "full": CLIPTextConfig(),
    "small": CLIPTextConfig(width=128, layers=2, heads=4, mlp=512, joint=128),
}
LANGUAGE = {
    "full": GPT2Config(),
    "small": GPT2Config(context=128, width=192, layers=4, heads=4),
}
LLAMA = {"small": LlamaConfig(context=1024, width=192, layers=4, heads=6, kv_heads=3, mlp=512)}


def main() -> None:
    """Draws, exports, and copies the tokenisers' files beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(VISION), required=True)
    parser.add_argument(
        "--clip_tokenizer", type=Path, required=True, help="folder with CLIP's files, Hugging Face's or OpenAI's"
    )
    parser.add_argument(
        "--lm_tokenizer", type=Path, required=True, help="folder of the LM's: Hugging Face's, OpenAI's, a .model"
    )
    parser.add_argument("--lm", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vision, text = VISION[arguments.size], TEXT[arguments.size]
    words = lm_tokenizer(arguments.lm_tokenizer)
    if arguments.lm == "gpt2":
        language = LANGUAGE[arguments.size]
        module = GPT2(language)
    else:
        language = dataclasses.replace(LLAMA[arguments.size], vocab=len(words))
        module = Llama(language)
    keys = jax.random.split(jax.random.key(arguments.seed), 3)
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    tokens = jnp.zeros((1, 2), jnp.int32)
    visual = jax.jit(CLIPVision(vision).init)(keys[0], pixels)["params"]
    captions = jax.jit(CLIPText(text).init)(keys[1], tokens)["params"]
    export_clip(arguments.out / "clip", CLIP(vision, text, {"visual": visual, "text": captions}))
    export_lm(arguments.out / "lm", LM(language, jax.jit(module.init)(keys[2], tokens)["params"]))
    clip_tokenizer(arguments.clip_tokenizer).save_pretrained(arguments.out / "clip")
    words.save_pretrained(arguments.out / "lm")
    for folder, expected in (("clip", text.vocab), ("lm", language.vocab)):
        found = AutoTokenizer.from_pretrained(arguments.out / folder)
        if len(found) != expected:
            raise SystemExit(f"{folder}: the tokenizer has {len(found)} ids, the tower {expected}")
        print(f"{arguments.out / folder}: {len(found):,} token ids")


def clip_tokenizer(folder: Path):
    """CLIP's tokenizer from Hugging Face files, or from OpenAI's bpe_simple_vocab_16e6.txt.gz."""
    packed = folder / "bpe_simple_vocab_16e6.txt.gz"
    if not packed.exists():
        return AutoTokenizer.from_pretrained(folder)
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])


def lm_tokenizer(folder: Path):
    """The LM's tokenizer: Hugging Face files, OpenAI's encoder.json and vocab.bpe, or one SentencePiece .model."""
    pieces = list(folder.glob("*.model"))
    if len(pieces) == 1:
        with tempfile.TemporaryDirectory() as place:
            shutil.copy(pieces[0], Path(place) / "tokenizer.model")
            return LlamaTokenizer.from_pretrained(place)
    if not (folder / "encoder.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    vocab = json.loads((folder / "encoder.json").read_text())
    merges = (folder / "vocab.bpe").read_text().split("\n")[1:-1]
    return GPT2Tokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, printable bytes first (the order of CLIP's vocabulary)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


if __name__ == "__main__":
    main()

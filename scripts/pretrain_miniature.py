"""Pretrains the towers that ship with the package: a small CLIP by contrast, a GPT-2 and a LLaMA by language modelling.

    python scripts/pretrain_miniature.py                 # all of it; writes eim_jax/data/miniature/towers/
    python scripts/pretrain_miniature.py --only gpt2 --out /tmp/towers

What was measured is printed and kept beside the weights in pretrain.json. A tower that misses its gate is not written.
"""

import argparse
import json
import math
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import miniature_corpus
import miniature_gates
import miniature_llama
import miniature_scenes
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eim_jax.data.datasets import scienceqa
from eim_jax.data.miniature import captioning, qa
from eim_jax.data.tokenize import encode_clip
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.pretrained import CLIP, LM, export_clip, export_lm, load_clip, load_lm
from eim_jax.utils.images import normalise

OUT = pathlib.Path(captioning.__file__).parent / "towers"
SEED = 0
DOCUMENTS = 60_000
CONTEXT = 32  # CLIP's text tokens
# Gates: bounds (lowest, highest) without which a tower is not shipped. Guessing names scores below 0.1 in F1.
GATES = {
    "clip": {"patches_shape_colour_f1": (0.8, 1.0), "retrieval_top1_of_200": (0.5, 1.0)},
    "gpt2": {"caption_perplexity": (1.0, 6.0)},
    "llama": {"caption_perplexity": (1.0, 6.0), "text_question_accuracy": (0.6, 1.0)},
}


def tokenizer(documents: list[str], *, clip: bool, out: pathlib.Path) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE, in which every common word is one token and any text has some, and saves it.

    CLIP's lower-cases, and has BOS and EOS (also the padding) as its last two ids; GPT-2's has EOS as its last.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]) if clip else normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=clip)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(documents, trainer)
    end = "<|endoftext|>"
    if clip:
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end, "model_max_length": CONTEXT}
        bpe.add_special_tokens(["<|startoftext|>", end])
    else:
        special = {"bos_token": end, "eos_token": end}
        bpe.add_special_tokens([end])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special)
    fast.save_pretrained(out)
    return fast


def optimise(
    name: str,
    loss: Callable,
    params: dict,
    batches: Callable[[int], tuple],
    *,
    steps: int,
    lr: float,
    log: list[dict],
) -> dict:
    """Runs AdamW, warm-up and cosine decay on `loss(params, *batch) -> (loss, accuracy)`; appends means to `log`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 5), steps, 0.02 * lr)
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decayed))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, *batch):
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, values

    recent, start = [], time.perf_counter()
    for i in range(steps):
        params, state, values = step(params, state, *batches(i))
        recent.append(values)
        if (i + 1) % 100 == 0 or i + 1 == steps:
            mean = np.mean([[float(v) for v in pair] for pair in recent], axis=0)
            recent = []
            log.append(
                {
                    "step": i + 1,
                    "loss": round(float(mean[0]), 4),
                    "accuracy": round(float(mean[1]), 4),
                    "seconds": round(time.perf_counter() - start),
                }
            )
            print(name, log[-1], flush=True)
    return params


def pretrain_gpt2(out: pathlib.Path, documents: list[str], steps: int) -> dict:
    """Trains the language model on documents packed to 96 tokens; returns what was measured."""
    tok = tokenizer(documents, clip=False, out=out)
    config = GPT2Config(vocab=len(tok), context=96, width=128, layers=4, heads=4)
    model = GPT2(config)
    ids = tok(documents, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    # One stream, cut anywhere: as for GPT-2, a text may start at any position.
    stream = np.array([token for row in ids for token in (*row, tok.eos_token_id)], np.int32)
    rng = np.random.default_rng(SEED)

    def batch(_: int) -> tuple[np.ndarray]:
        starts = rng.integers(len(stream) - config.context - 1, size=16)
        return (stream[starts[:, None] + np.arange(config.context + 1)],)

    def loss(params, tokens):
        logits, targets = model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return nll.mean(), (logits.argmax(-1) == targets).mean()

    params = model.init(jax.random.key(SEED), jnp.zeros((1, 1), jnp.int32))["params"]
    log: list[dict] = []
    params = optimise("gpt2", loss, params, batch, steps=steps, lr=2e-3, log=log)
    export_lm(out, LM(config, half(params)))

    lm, tok = load_lm(out), AutoTokenizer.from_pretrained(out)
    held_out = [miniature_corpus.text(captioning.dice("pretrain", SEED, 10**8 + i, 4)) for i in range(500)]
    captions = [texts[0] for texts in captioning.load("val").references.values()]
    measured = {
        "caption_perplexity": perplexity(lm, tok, captions),
        "held_out_perplexity": perplexity(lm, tok, held_out),
        "parameters": size(lm.params),
        "vocabulary": len(tok),
        "training_tokens": steps * 16 * config.context,
    }
    return {"measured": measured, "log": log}


def perplexity(lm: LM, tok, texts: list[str]) -> float:
    """Returns exp(mean nll a token, EOS included) of single texts that start at position 0 after a BOS (or an EOS)."""
    total, count = 0.0, 0
    model = (GPT2 if isinstance(lm.config, GPT2Config) else Llama)(lm.config)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": lm.params}, tokens)))
    for text in texts:
        row = [tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"], tok.eos_token_id]
        row = row[: lm.config.context]
        padded = np.zeros((1, lm.config.context), np.int32)
        padded[0, : len(row)] = row
        scores = np.asarray(forward(padded))[0]
        total -= scores[np.arange(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    return round(math.exp(total / count), 3)


def pretrain_llama(out: pathlib.Path, documents: list[str], drills: int, steps: int) -> dict:
    """Trains the LLaMA on drills, then on lessons, each row filled up with documents; returns what was measured."""
    draw = captioning.dice
    phases = [
        ([miniature_corpus.drill(draw("pretrain", SEED, i, 5)) for i in range(drills * 32)], 48, 32),
        ([miniature_corpus.lesson(draw("pretrain", SEED, i, 6)) for i in range((steps - drills) * 20)], 80, 20),
    ]
    tok = miniature_llama.tokenizer(
        [lesson for lessons, _, _ in phases for lesson in lessons[:10_000]], documents[:20_000], out
    )
    config = LlamaConfig(vocab=len(tok), context=160, width=128, layers=4, heads=4, kv_heads=2, mlp=352)
    model = Llama(config)
    batches = []
    for lessons, length, size_ in phases:
        rows = miniature_llama.lesson_rows(lessons, documents, tok, length)
        batches += [tuple(part[i : i + size_] for part in rows) for i in range(0, len(lessons), size_)]

    def loss(params, tokens, weights):
        logits, targets, weights = model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:], weights[:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        letters = weights == miniature_llama.LETTER
        right = ((logits.argmax(-1) == targets) & letters).sum() / jnp.maximum(letters.sum(), 1)
        return (nll * weights).sum() / weights.sum(), right

    params = miniature_llama.looking_back(model.init(jax.random.key(SEED), jnp.zeros((1, 1), jnp.int32))["params"])
    log: list[dict] = []
    params = optimise("llama", loss, params, batches.__getitem__, steps=steps, lr=3e-3, log=log)
    export_lm(out, LM(config, half(params)))
    measured = measure_llama(out)
    measured["training_tokens"] = int(sum((tokens > 0).sum() for tokens, _ in batches))
    return {"measured": measured, "log": log}


def measure_llama(path: str | pathlib.Path) -> dict:
    """Returns a LLaMA's perplexities, and its accuracy on validation questions without pictures.

    An answer is the likeliest of the question's letters after "The answer is".
    """
    lm, tok = load_lm(path), AutoTokenizer.from_pretrained(path)
    forward = jax.jit(Llama(lm.config).apply)
    held_out = [miniature_corpus.text(captioning.dice("pretrain", SEED, 10**8 + i, 4)) for i in range(500)]
    captions = [texts[0] for texts in captioning.load("val").references.values()]
    problems = [p for p in qa.load("val", problems=1200).problems.values() if p.image is None]
    right: dict[str, list[bool]] = {}
    letters = [tok(f" {letter}", add_special_tokens=False)["input_ids"][0] for letter in "ABCDE"]
    for problem in problems:
        texts = (scienceqa.prompt(problem)[0], "The answer is")
        row = [
            tok.bos_token_id,
            *(token for text in texts for token in tok(text, add_special_tokens=False)["input_ids"]),
        ]
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(row)] = row
        scores = np.asarray(forward({"params": lm.params}, padded))[0, len(row) - 1, letters[: len(problem.choices)]]
        right.setdefault("memory" if not problem.hint else problem.category, []).append(
            scores.argmax() == problem.answer
        )
    every = [answer for answers in right.values() for answer in answers]
    return {
        "caption_perplexity": perplexity(lm, tok, captions),
        "held_out_perplexity": perplexity(lm, tok, held_out),
        "text_question_accuracy": round(float(np.mean(every)), 3),
        "text_question_accuracy_by_category": {name: round(float(np.mean(x)), 3) for name, x in sorted(right.items())},
        "parameters": size(lm.params),
        "vocabulary": len(tok),
    }


def pretrain_clip(out: pathlib.Path, documents: list[str], steps: int, scenes: int, batch_size: int) -> dict:
    """Trains both CLIP towers by the symmetric contrastive loss; returns what was measured."""
    tok = tokenizer(documents, clip=True, out=out)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, width=96, layers=4, heads=3, mlp=384, joint=64)
    text = CLIPTextConfig(
        vocab=len(tok), context=CONTEXT, width=96, layers=2, heads=3, mlp=384, joint=64, eos_id=tok.eos_token_id
    )
    visual, textual = CLIPVision(vision), CLIPText(text)
    start = time.perf_counter()
    # One and two things first, then up to four.
    pools = []
    for counts, number, first in (
        (((1, 1), (2, 1)), scenes // 4, 0),
        (((1, 1), (2, 4), (3, 4), (4, 3)), scenes, 10**7),
    ):
        found = miniature_scenes.scenes(number, counts, SEED, first)
        captions = miniature_scenes.descriptions(found, SEED, 3, first)
        tokens = encode_clip([caption for three in captions for caption in three], tok, CONTEXT)
        pools.append((miniature_scenes.pictures(found, SEED, first), tokens.reshape(len(found), 3, -1)))
    print(f"{sum(len(p[0]) for p in pools)} scenes drawn in {time.perf_counter() - start:.0f} s", flush=True)
    rng = np.random.default_rng(SEED)
    group = miniature_scenes.GROUP

    def batch(i: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, tokens = pools[i > steps // 5]
        chosen = rng.choice(len(pixels) // group, batch_size // group, replace=False)
        rows = (chosen[:, None] * group + np.arange(group)).ravel()
        return pixels[rows], tokens[rows, rng.integers(3, size=len(rows))]

    def features(params, pixels, tokens):
        image = visual.apply({"params": params["visual"]}, normalise(pixels, vision.mean, vision.std))[1]
        caption = textual.apply({"params": params["text"]}, tokens)
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, caption))

    def loss(params, pixels, tokens):
        image, caption = features(params, pixels, tokens)
        logits = jnp.exp(jnp.minimum(params["scale"], math.log(100.0))) * image @ caption.T
        labels = jnp.arange(len(logits))
        xent = optax.softmax_cross_entropy_with_integer_labels
        return (xent(logits, labels).mean() + xent(logits.T, labels).mean()) / 2, (logits.argmax(1) == labels).mean()

    keys = jax.random.split(jax.random.key(SEED))
    params = {
        "visual": visual.init(keys[0], jnp.zeros((1, 32, 32, 3)))["params"],
        "text": textual.init(keys[1], jnp.zeros((1, CONTEXT), jnp.int32))["params"],
        "scale": jnp.array(math.log(1 / 0.07)),
    }
    log: list[dict] = []
    params = optimise("clip", loss, params, batch, steps=steps, lr=1e-3, log=log)
    scale = float(params.pop("scale"))
    export_clip(out, CLIP(vision, text, half(params), scale))
    return {"measured": measure_clip(out), "log": log}


def measure_clip(path: str | pathlib.Path) -> dict:
    """Probes a CLIP on the downstream task's scenes (fitted on train, scored on val; test stays unseen)."""
    clip, tok = load_clip(path), AutoTokenizer.from_pretrained(path)
    train, val = captioning.load("train"), captioning.load("val")

    @jax.jit
    def look(pixels):
        images = normalise(pixels, clip.vision.mean, clip.vision.std)
        return CLIPVision(clip.vision).apply({"params": clip.params["visual"]}, images)

    @jax.jit
    def read(tokens):
        return CLIPText(clip.text).apply({"params": clip.params["text"]}, tokens)

    seen = [miniature_gates.in_batches(lambda p: look(p)[0], split.pixels) for split in (train, val)]
    image = miniature_gates.in_batches(lambda p: look(p)[1], val.pixels)
    captions = encode_clip([texts[0] for texts in val.references.values()], tok, clip.text.context)
    measured = {"parameters": size(clip.params), "vocabulary": len(tok), "logit_scale": round(clip.logit_scale, 3)}
    probes = {
        "patches": [miniature_gates.cell_patches(s) for s in seen],
        "cls": [s[:, 0] for s in seen],
        "pixels": [
            split.pixels.reshape(-1, 2, 16, 2, 16, 3).swapaxes(2, 3).reshape(-1, 4, 768) for split in (train, val)
        ],
    }
    for name, (fitted, scored) in probes.items():
        for key, value in miniature_gates.probe(
            train, fitted.astype(np.float64), val, scored.astype(np.float64)
        ).items():
            if key in ("shape_colour_f1", "shape_f1", "colour_f1", "shape_colour_f1_held_out"):
                measured[f"{name}_{key}"] = round(value, 3)
    measured["retrieval_top1_of_200"] = round(miniature_gates.retrieval(image, np.asarray(read(captions))), 3)
    return measured


def half(params: dict) -> dict:
    """Returns the weights in float16, as they ship."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)


def size(params: dict) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    """Runs what the command line asks for, checks the gates and writes pretrain.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--only", choices=("clip", "gpt2", "llama"))
    parser.add_argument("--clip_steps", type=int, default=2500)
    parser.add_argument("--clip_scenes", type=int, default=32_000)
    parser.add_argument("--clip_batch", type=int, default=128)
    parser.add_argument("--gpt2_steps", type=int, default=800)
    parser.add_argument("--llama_drills", type=int, default=150)
    parser.add_argument("--llama_steps", type=int, default=1800)
    args = parser.parse_args()

    record_file = args.out / "pretrain.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    documents = [miniature_corpus.text(captioning.dice("pretrain", SEED, i, 4)) for i in range(DOCUMENTS)]
    for tower in ("clip", "gpt2", "llama") if args.only is None else (args.only,):
        with tempfile.TemporaryDirectory() as folder:
            start, place = time.perf_counter(), pathlib.Path(folder)
            if tower == "gpt2":
                found = pretrain_gpt2(place, documents, args.gpt2_steps)
            elif tower == "llama":
                found = pretrain_llama(place, documents, args.llama_drills, args.llama_steps)
            else:
                found = pretrain_clip(place, documents, args.clip_steps, args.clip_scenes, args.clip_batch)
            record[tower] = {**found, "seconds": round(time.perf_counter() - start)}
            print(tower, json.dumps(found["measured"], indent=2), flush=True)
            for name, (lowest, highest) in GATES[tower].items():
                if not lowest <= found["measured"][name] <= highest:
                    raise SystemExit(f"{tower} is not shipped: {name} is not within {lowest} ... {highest}")
            shutil.copytree(place, args.out / tower, dirs_exist_ok=True)
        record_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

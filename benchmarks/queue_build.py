"""Building K_t by length against whole rows: seconds of cores a key, and how far the keys are apart.

python benchmarks/queue_build.py --captions=FILE --tokenizer=FOLDER [--rows=64] [--repeats=2]
CLIP's text tower in ViT-B/32's shape, random weights. All captions are tokenised and put in order as for a queue of
theirs; each width's program then runs on real rows, and the time of all steps is summed from these. Whole rows are as
long as the longest text. Seconds are of cores, which other programs on the machine lengthen little.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pairs import machine

from eim_jax.data import tokenize
from eim_jax.losses.queue_steps import plan_steps
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig


def main() -> None:
    """Prints a row for each width, the ratio, and the distance of the keys."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=Path, required=True, help="a file in COCO's form")
    parser.add_argument("--tokenizer", required=True, help="CLIP's")
    parser.add_argument("--rows", type=int, default=64, help="at a time, at their longest; a run takes 256")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    texts = [note["caption"] for note in json.loads(options.captions.read_text())["annotations"]]
    tokenizer = tokenize.load_tokenizer(options.tokenizer)
    tokens, tower = tokenize.encode_clip(texts, tokenizer), CLIPText(CLIPTextConfig())
    lengths = (tokens == tokenizer.eos_token_id).argmax(axis=1) + 1
    params = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    encode = partial(jax.jit(tower.apply), params)
    count, longest = tokens.shape
    plan = plan_steps(count, 1, options.rows, lengths, longest)
    print(machine("jax"))
    print(f"{count:,} texts of {lengths.mean():.1f} tokens on average, {longest} at most\n")
    print("| slots | rows | steps | seconds of cores a step | ms a key |\n|---|---|---|---|---|")
    spread = np.random.default_rng(0).permutation(count)[: options.rows]  # of any length
    whole, before = _run(encode, tokens[spread], options.repeats)
    steps = -(-count // options.rows)
    print(f"| {longest}, whole rows | {options.rows} | {steps:,} | {whole:.2f} | {1e3 * whole / options.rows:.1f} |")
    total = 0.0
    keys = np.zeros_like(before)
    for width in sorted({step.width for step in plan.steps}):
        mine = [step for step in plan.steps if step.width == width]
        rows = plan.places(mine[0])[0].copy()
        mask = (lengths[spread] <= width) & ~keys.any(axis=1)  # those that no shorter width held
        rows[: mask.sum()] = spread[mask]
        seconds, found = _run(encode, tokens[rows, :width], options.repeats)
        keys[mask] = found[: mask.sum()]
        total += len(mine) * seconds
        print(
            f"| {width} | {len(rows)} | {len(mine):,} | {seconds:.2f} | {1e3 * seconds / len(rows):.1f} |", flush=True
        )
    by_rows = steps * whole
    print(f"\nall keys: {by_rows:,.0f} s in whole rows, {total:,.0f} s by length: {by_rows / total:.2f} times less")
    apart = np.linalg.norm(keys - before, axis=1) / np.linalg.norm(before, axis=1)
    print(f"keys of {len(spread)} texts: {apart.max():.1e} of their length apart at most")


def _run(encode, tokens: np.ndarray, repeats: int) -> tuple[float, np.ndarray]:
    """Least seconds of cores of a step that was compiled before, and its keys."""
    inputs, found = jnp.asarray(tokens), []
    keys = np.asarray(encode(inputs))
    for _ in range(repeats):
        begun = time.process_time()
        jax.block_until_ready(encode(inputs))
        found.append(time.process_time() - begun)
    return min(found), keys


if __name__ == "__main__":
    main()

"""Texts of varied length: continuous batches against whole batches, on a small GPT-2, in pairs.

python benchmarks/continuous.py [--texts 256] [--rows 32] [--tokens 64] [--width 256] [--layers 4] [--repeats 5]
Random weights and a vocabulary of 32 make a text end with probability 1/32 at each token, as far as --tokens. Both
sides sample the same texts, which is checked.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from pairs import machine

from eim_jax.generation.continuous import continue_all
from eim_jax.generation.sampler import DecodeConfig, continue_text
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.lm_input import LMInput

PREFIX, VOCAB, GROUPS = 10, 32, (8, 4, 2)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in {"texts": 256, "rows": 32, "tokens": 64, "width": 256, "layers": 4, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    n, rows = options.texts, options.rows
    assert n % rows == 0 and rows % max(GROUPS) == 0

    lm = GPT2(GPT2Config(vocab=VOCAB, context=128, width=options.width, layers=options.layers, heads=4))
    params = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    embeds = jax.random.normal(jax.random.key(1), (n, PREFIX, options.width))
    valid = jnp.ones((n, PREFIX), bool)
    read = LMInput(embeds, valid, jnp.cumsum(valid, axis=1) - 1)
    config = DecodeConfig("nucleus", max_tokens=options.tokens, top_p=1.0)

    def groups(size: int) -> list:
        parts = np.arange(n).reshape(-1, size)
        return [(part, jax.tree.map(lambda a, part=part: a[part], read)) for part in parts]

    def whole(batches) -> list[list[int]]:
        found = []
        for index, part in batches:
            said = jax.device_get(continue_text(lm, params, part, config, eos_id=0, index=jnp.asarray(index)))
            found += [t[:k].tolist() for t, k in zip(said.tokens, said.length, strict=True)]
        return found

    def continuous(batches) -> list[list[int]]:
        said = dict(continue_all(lm, params, batches, config, rows=rows, prefix=PREFIX, eos_id=0))
        return [said[i].tokens[: said[i].length].tolist() for i in range(n)]

    def seconds(work, batches) -> float:
        start = time.perf_counter()
        work(batches)
        return time.perf_counter() - start

    plain = groups(rows)
    texts = whole(plain)
    lengths = np.array([len(words) for words in texts]) + 1
    longest = lengths.reshape(-1, rows).max(1)
    print(f"## Continuous batches: {n} texts, {rows} rows, GPT-2 of {options.layers} x {options.width}, float32\n")
    print(machine("jax", "flax"))
    print(f"Command: {' '.join(['python', *sys.argv])}; {options.repeats} interleaved pairs, medians.")
    print(
        f"Tokens a text: mean {lengths.mean():.1f}, longest {lengths.max()}, a batch's longest {longest.mean():.1f}.\n"
    )
    print("| rows exchanged at a time | whole batches s | continuous s | whole / continuous |\n|---|---|---|---|")
    for part in GROUPS:
        coming = groups(rows // part)
        assert continuous(coming) == texts
        times = [(seconds(whole, plain), seconds(continuous, coming)) for _ in range(options.repeats)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        print(f"| {rows // part} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

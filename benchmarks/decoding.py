"""Time per caption of greedy and beam search: eim_jax against transformers' generate on GPT-2 small, same shapes.

python benchmarks/decoding.py [--batch 8] [--prefix 10] [--tokens 20] [--beams 5] [--repeats 5]
Both sides start from the same visual embeddings, use a key-value cache and generate exactly --tokens tokens.
"""

import argparse

import gemm_rates
import jax
import jax.numpy as jnp
import numpy as np
import torch
from pairs import Pair, report
from transformers import GPT2Config as TorchConfig
from transformers import GPT2LMHeadModel

from eim_jax.generation.sampler import DecodeConfig, generate
from eim_jax.models.language.gpt2 import GPT2, GPT2Config


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="captions decoded at once")
    parser.add_argument("--prefix", type=int, default=10, help="visual tokens")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens of every caption")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    lm = GPT2(GPT2Config())
    params = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    visual = np.asarray(jax.random.normal(jax.random.key(1), (options.batch, options.prefix, 768)))
    model = GPT2LMHeadModel(TorchConfig()).eval()
    model.generation_config.eos_token_id = None  # every caption has the same length on both sides
    model.generation_config.pad_token_id = 0
    embeds = torch.from_numpy(visual.copy())

    def ours(config: DecodeConfig):
        return lambda: jax.block_until_ready(generate(lm, params, visual, None, None, config, eos_id=None))

    @torch.no_grad()
    def theirs(beams: int):
        options_ = {"max_new_tokens": options.tokens, "num_beams": beams, "do_sample": False}
        assert model.generate(inputs_embeds=embeds, **options_).shape == (options.batch, options.tokens)

    pairs = [
        Pair(
            "greedy, per caption",
            ours(DecodeConfig("greedy", max_tokens=options.tokens)),
            lambda: theirs(1),
            options.batch,
        ),
        Pair(
            f"beam {options.beams}, per caption",
            ours(DecodeConfig("beam", beams=options.beams, max_tokens=options.tokens)),
            lambda: theirs(options.beams),
            options.batch,
        ),
    ]
    shape = f"{options.prefix} visual + {options.tokens} new tokens, batch {options.batch}, float32"
    report(f"Decoding with GPT-2 small, {shape}", pairs, options.repeats)
    print(f"\n{gemm_rates.table()}")


if __name__ == "__main__":
    main()

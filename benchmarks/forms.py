"""How likely an untuned LM finds the responses of instruction data, by the form in which it is asked.

python benchmarks/forms.py --lm DIR --source FILE.jsonl [--limit 60] [--longest 160]
Mean nats of a whole response and of a token, over the same responses for all forms, without the token that ends one.
Only responses are taken whose rows fit whole, in every form.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from pairs import machine

from eim_jax.data.datasets.instruct import load_instruct
from eim_jax.data.rows import whole_rows
from eim_jax.data.tokenize import load_tokenizer
from eim_jax.models.language import family_of
from eim_jax.pretrained import load_lm

FORMS = [("plain", "apart"), ("plain", "spaced"), ("alpaca", "apart"), ("alpaca", "spaced"), ("tokenizer", "tokenizer")]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", required=True, help="an instruct model with a chat template")
    parser.add_argument("--source", required=True, help="an instruction file")
    parser.add_argument("--limit", type=int, default=60, help="responses")
    parser.add_argument("--longest", type=int, default=160, help="tokens of a row, in every form")
    options = parser.parse_args()

    tokenizer, lm = load_tokenizer(options.lm), load_lm(options.lm)
    rows = {form: _rows(options.source, tokenizer, *form) for form in FORMS}
    fits = [all(len(row.ids) <= options.longest for row in same) for same in zip(*rows.values(), strict=True)]
    taken = np.flatnonzero(fits)[: options.limit]
    module = family_of(lm.config).build(lm.config)

    @jax.jit
    def scores(params, tokens):
        logits = jax.nn.log_softmax(module.apply({"params": params}, tokens)[:, :-1])
        return jnp.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]

    print(machine("jax", "numpy"))
    print(f"Command: {' '.join(['python', *sys.argv])}\n")
    print(f"{len(taken)} responses\n")
    print("| data.template | data.seam | nats a response | nats a token | first token |")
    print("|---|---|---|---|---|")
    for (template, seam), found in rows.items():
        total = count = first = 0.0
        for row in (found[i] for i in taken):
            tokens = np.zeros((1, options.longest), np.int32)
            tokens[0, : len(row.ids)] = row.ids
            nats = -np.asarray(scores(lm.params, tokens), np.float64)[0, row.start - 1 : len(row.ids) - 1]
            total, count, first = total + nats.sum(), count + len(nats), first + nats[0]
        n = len(taken)
        print(f"| {template} | {seam} | {total / n:.2f} | {total / count:.3f} | {first / n:.2f} |")


def _rows(source: str, tokenizer, template: str, seam: str):
    samples = load_instruct(source, None, template=template, on_bad="drop").split.samples
    return whole_rows([s.instruction for s in samples], [s.response for s in samples], tokenizer, seam, template)


if __name__ == "__main__":
    main()

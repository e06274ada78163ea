"""What the queue's number format costs: relative error of the queue loss's gradient, of its loss, and bytes a key.

    python benchmarks/queue_precision.py --keys 20000 100000 600000

Unit keys and queries that lie nearer to their own key than to the others (cosine about --near), tau 0.07. The gradient
with float32 keys is the reference; queries stay float32, the sums too.
"""

import argparse
import datetime
import os

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.losses.contrastive import queue_nce
from eim_jax.losses.queues import compress

DTYPES = ("float32", "bfloat16", "int8")


def problem(count: int, width: int, batch: int, near: float):
    """Queries [b D], unit keys [N D] and own rows [b]; a query's cosine with its own key is about `near`."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((count, width), np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    index = rng.integers(0, count, batch)
    noise = rng.standard_normal((batch, width), np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return jnp.asarray(near * keys[index] + (1 - near**2) ** 0.5 * noise), jnp.asarray(keys), jnp.asarray(index)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[20_000, 100_000, 600_000])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--near", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    options = parser.parse_args()
    place = f"{jax.default_backend()}, {os.cpu_count()} cores"
    print(f"{datetime.date.today()} | {place} | batch {options.batch}, width {options.width}, jax {jax.__version__}\n")
    print("| keys | cosine with the own key | format | bytes a key | gradient error | loss error |")
    print("|---|---|---|---|---|---|")
    for count in options.keys:
        for near in options.near:
            query, keys, index = problem(count, options.width, options.batch, near)

            def mean(query, held, scale, index=index, count=count):
                nce = queue_nce(query, held, index, count=count, scale=scale)
                return nce.loss / nce.weight

            evaluate = jax.jit(jax.value_and_grad(mean))
            loss, gradient = evaluate(query, keys, None)
            for dtype in DTYPES[1:]:
                held, scale = compress(keys, dtype)
                other, found = evaluate(query, held, scale)
                size = held.dtype.itemsize * options.width + (4 if scale is not None else 0)
                error = float(jnp.linalg.norm(found - gradient) / jnp.linalg.norm(gradient))
                change = abs(float(other - loss)) / float(loss)
                print(f"| {count:,} | {near} | {dtype} | {size} | {error:.1e} | {change:.1e} |", flush=True)


if __name__ == "__main__":
    main()

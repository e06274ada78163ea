"""How much of a queue must be read: the gradient's error when only a part of the keys is, in two ways, by fraction.

    python benchmarks/queue_sampling.py --keys 200000

Block: a random contiguous block of keys, each standing for N / block keys. Top: the keys of highest score (as an exact
index would find them) and as many uniformly drawn from the rest, which stand for all of it. The own key is always read.
Rows are unit vectors in clusters, as captions are; --near is a query's cosine with its own key: 0 before training.
Error: |g - g'| / |g| of a batch's summed gradient towards the unit queries, median over draws.
"""

import argparse
import datetime
import os
import statistics

import numpy as np

TAU = 0.07


def problem(rng, count: int, width: int, batch: int, near: float, cluster: int):
    """Queries [b D], unit keys [N D] in clusters of about `cluster` in random order, own rows [b]."""
    centres = rng.standard_normal((max(1, count // cluster), width), np.float32)
    keys = centres[rng.integers(0, len(centres), count)] + rng.standard_normal((count, width), np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    index = rng.integers(0, count, batch)
    noise = rng.standard_normal((batch, width), np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    query = near * keys[index] + (1 - near**2) ** 0.5 * noise
    return query / np.linalg.norm(query, axis=1, keepdims=True), keys, index


def gradient(scores, own, keys, index, read, stands_for):
    """sum_j p_j k_j - k_own [b D]; row i reads keys read[i], each counted stands_for[i] times, and its own once."""
    rows = []
    for i, (places, times) in enumerate(zip(read, stands_for, strict=True)):
        weight = np.where(places == index[i], 0, times) * np.exp(scores[i, places] - scores[i].max())
        alone = np.exp(own[i] - scores[i].max())
        mean = (weight @ keys[places] + alone * keys[index[i]]) / (weight.sum() + alone)
        rows.append(mean - keys[index[i]])
    return np.stack(rows)


def block(rng, scores, size):
    """The same random contiguous block for every row."""
    count = scores.shape[1]
    places = (rng.integers(0, count) + np.arange(size)) % count
    return [places] * len(scores), [np.full(size, count / size)] * len(scores)


def top(rng, scores, size):
    """Half of the keys read are each row's best, half drawn from the rest."""
    count, best = scores.shape[1], size // 2
    read, times = [], []
    for row in scores:
        order = np.argpartition(-row, best)
        tail = order[best:][rng.integers(0, count - best, size - best)]
        read.append(np.concatenate([order[:best], tail]))
        times.append(np.concatenate([np.ones(best), np.full(size - best, (count - best) / (size - best))]))
    return read, times


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--cluster", type=int, default=100, help="keys that share a centre (cosine about 0.5)")
    parser.add_argument("--near", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.9])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.001, 0.01, 0.1])
    parser.add_argument("--draws", type=int, default=5)
    o = parser.parse_args()
    print(f"{datetime.date.today()} | {os.cpu_count()} cores, numpy {np.__version__}")
    print(f"{o.keys:,} keys of width {o.width} in clusters of {o.cluster}, batch {o.batch}, tau {TAU}\n")
    print("| cosine with the own key | 1 / sum p^2 (median) | " + " | ".join(
        f"{name} {fraction:.1%}" for name in ("block", "top + tail") for fraction in o.fractions
    ) + " |")  # fmt: skip
    print("|" + "---|" * (2 + 2 * len(o.fractions)))
    for near in o.near:
        rng = np.random.default_rng(0)
        query, keys, index = problem(rng, o.keys, o.width, o.batch, near, o.cluster)
        scores = query @ keys.T / TAU
        own = scores[np.arange(o.batch), index]
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        exact = p @ keys - keys[index]
        effective = np.median(1 / (p * p).sum(1))
        cells = []
        for choose in (block, top):
            for fraction in o.fractions:
                errors = []
                for _ in range(o.draws):
                    found = gradient(scores, own, keys, index, *choose(rng, scores, max(2, int(fraction * o.keys))))
                    errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
                cells.append(f"{statistics.median(errors):.1e}")
        print(f"| {near} | {effective:,.0f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Time and memory of the queue loss with its gradient: one pass, plain JAX autodiff, plain PyTorch.

    python benchmarks/queue_loss.py --batch 40 --keys 600000 --width 768

Each variant runs in a process of its own; the processes take turns, one evaluation each, so that whatever else the
machine does meets all of them. Memory is the process's peak above what it holds with keys and queries loaded.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

from eim_jax.utils.cpu import cpu_model, vector_units

TAU = 0.07
VARIANTS = {
    "read": "floor: the keys read once (their sum)",
    "products": "floor: the two products alone, in chunks",
    "one pass": "queue_nce, JAX",
    "jax": "naive autodiff, JAX",
    "torch": "naive autodiff, PyTorch",
}


def main() -> None:
    """Run the table, or (with --variant) one of its rows' processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--keys", type=int, default=600_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=0, help="keys read at a time; 0 = the default of the device")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    serve(args) if args.variant else table(args)


def table(args: argparse.Namespace) -> None:
    """Start every variant, let them take turns, print the rows."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen={str(args.threads > 1).lower()}",
    }
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--variant", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in VARIANTS
    }
    rows = {name: worker.stdout.readline().split() for name, worker in workers.items()}  # loaded and warm
    seconds = {name: [] for name in workers}
    for _ in range(args.repeat):
        for name, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    size = args.keys * args.width * 4
    cpu = f"{cpu_model()} ({', '.join(vector_units())}), {os.cpu_count()} cores, {args.threads} threads"
    print(f"{datetime.date.today()} | {cpu}")
    print(" ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "torch", "numpy")))
    print(f"$ python benchmarks/queue_loss.py {' '.join(sys.argv[1:])}")
    print(f"batch {args.batch}, {args.keys} keys of width {args.width} in float32: {size / 2**20:.0f} MiB\n")
    print("| loss and d loss / d query | median ms | fastest ms | MiB above the keys | peak / keys | loss |")
    print("|---|---|---|---|---|---|")
    for name, title in VARIANTS.items():
        above, loss = rows[name]
        shown = "" if title.startswith("floor") else f"{float(loss):.5f}"
        times = f"{1e3 * statistics.median(seconds[name]):.0f} | {1e3 * min(seconds[name]):.0f}"
        print(f"| {title} | {times} | {int(above) / 2**20:.0f} | {1 + int(above) / size:.3f} | {shown} |")
    floors = [max(pair) for pair in zip(seconds["read"], seconds["products"], strict=True)]
    ratios = [one / floor for one, floor in zip(seconds["one pass"], floors, strict=True)]
    print(f"\nThe one pass takes {statistics.median(ratios):.2f} times the higher floor (median over turns).")
    ratios = [t / one for t, one in zip(seconds["torch"], seconds["one pass"], strict=True)]
    print(
        f"PyTorch takes {statistics.median(ratios):.2f} times as long as the one pass (median over turns).\n",
        flush=True,
    )
    rates = pathlib.Path(__file__).with_name("gemm_rates.py")
    subprocess.run([sys.executable, str(rates)], env=environment, check=True)


def serve(args: argparse.Namespace) -> None:
    """One variant: load, warm up under a memory watch, then one timed evaluation for each line on stdin."""
    evaluate = (torch_variant if args.variant == "torch" else jax_variant)(args)
    with watch() as above:
        loss = evaluate()
        evaluate()
    print(above[0], loss, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        evaluate()
        print(time.perf_counter() - start, flush=True)


def problem(args: argparse.Namespace):
    """The same float32 queries, unit keys and own rows in every process."""
    import numpy as np

    rng = np.random.default_rng(0)
    keys = np.empty((args.keys, args.width), np.float32)
    for block in np.array_split(keys, max(1, args.keys // 4096)):
        rng.standard_normal(out=block, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    query = rng.standard_normal((args.batch, args.width), np.float32)
    return query, keys, rng.integers(0, args.keys, args.batch)


def jax_variant(args: argparse.Namespace):
    """Returns the evaluation by queue_nce, by jax.grad of the definition, or of a floor under both."""
    import jax
    import jax.numpy as jnp

    from eim_jax.losses.contrastive import queue_nce

    def naive(query, keys, index):
        query = query / jnp.linalg.norm(query, axis=1, keepdims=True)
        scores = query @ keys.T / TAU
        own = jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - own)

    def one_pass(query, keys, index):
        nce = queue_nce(query, keys, index, count=args.keys, tau=TAU, chunk=args.chunk)
        return nce.loss / nce.weight

    def products(query, keys, index):
        chunk = args.chunk or 1024

        def step(i, total):
            block = jax.lax.dynamic_slice_in_dim(keys, jnp.minimum(i * chunk, args.keys - chunk), chunk)
            return total + (query @ block.T) @ block

        return jax.lax.fori_loop(0, -(-args.keys // chunk), step, jnp.zeros_like(query)).sum()

    # The copies are made in the background: a watch that starts before they are there would count them.
    query, keys, index = jax.block_until_ready(tuple(map(jnp.asarray, problem(args))))
    floors = {"read": lambda query, keys, index: jnp.sum(keys), "products": products}
    if args.variant in floors:
        step = jax.jit(lambda *arguments: (floors[args.variant](*arguments),))
    else:
        step = jax.jit(jax.value_and_grad(one_pass if args.variant == "one pass" else naive))
    step = step.lower(query, keys, index).compile()  # the compiler's own memory is not the loss's
    return lambda: float(jax.block_until_ready(step(query, keys, index))[0])


def torch_variant(args: argparse.Namespace):
    """Returns the evaluation by torch.autograd of the definition."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(args.threads)
    query, keys, index = map(torch.from_numpy, problem(args))
    query.requires_grad_()

    def evaluate() -> float:
        query.grad = None
        loss = functional.cross_entropy(functional.normalize(query, dim=1) @ keys.T / TAU, index)
        loss.backward()
        return float(loss.detach())

    return evaluate


@contextlib.contextmanager
def watch():
    """Looks at the process's resident memory every 2 ms; yields a list that ends up holding its rise, in bytes."""
    import psutil

    process, done, above = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def look() -> None:
        while not done.wait(0.002):
            above[0] = max(above[0], process.memory_info().rss - start)

    thread = threading.Thread(target=look)
    thread.start()
    yield above
    done.set()
    thread.join()


if __name__ == "__main__":
    main()

"""One training step of LaVIN-7B with EIM: its memory from abstract shapes, or its time on the device at hand.

python benchmarks/lavin_step.py --compile [--quant none nf4] [--accumulate 1 8] [--stage st|lm|adapter|ie] [--batch 32]
    compiles make_step from shapes (nothing is allocated) and states its buffers: for this machine's device, or with
    --target for a GPU that is not here (needs the CUDA plugin's packages; FILE holds XLA's GpuTargetConfigProto as
    text; run under JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1). A CPU is no measure for a GPU: XLA converts
    all bfloat16 weights to float32 there.
python benchmarks/lavin_step.py --run --quant nf4 --accumulate 8 [--steps 10] [--json FILE]
    the same step on random weights that are drawn on the device, beside the device's own matmul and copy rates.

Without either, a CPU compiles and an accelerator runs. The LM reads 512 slots: BOS, LaVIN's markers, 50 visual tokens,
text. Stage "st" (loss_ST) runs no LM, "lm" (loss_LM) no vision; "adapter" (loss_base; trains the LM's adapters and the
ST) reads cached features; "ie" (loss_base + loss_IE) reads images and trains CLIP's adapters too. Queues hold one key
for each of ScienceQA's 12,726 samples.

On a GPU XLA takes 75 % of the memory: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets a larger step in.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from lavin_case import SIZES, STAGES, Case, Size, flops, lavin_case
from pairs import machine
from step_case import arrays, compiled, nbytes

GIB = 2**30


def main(arguments: list[str] | None = None) -> list[dict]:
    """Prints what was asked for; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--compile", action="store_true", help="state the compiled step's memory")
    form.add_argument("--run", action="store_true", help="time steps on random weights")
    parser.add_argument("--size", choices=sorted(SIZES), default="7b")
    parser.add_argument("--layers", type=int, default=0, help="of the LM instead of the size's")
    parser.add_argument("--stage", choices=STAGES, default="adapter")
    parser.add_argument("--quant", choices=("none", "nf4"), nargs="+", default=["none", "nf4"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1])
    parser.add_argument("--remat", choices=("full", "dots", "none"), default="full")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="timed, after one that is not")
    parser.add_argument("--json", type=Path, help="where the rows are written")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs' text")
    parser.add_argument("--target", type=Path, help="compile for the GPU that this file describes")
    options = parser.parse_args(arguments)
    if wrong := [a for a in options.accumulate if a < 1 or options.batch % a]:
        parser.error(f"--accumulate {wrong[0]} does not divide --batch {options.batch}")
    size = SIZES[options.size]
    if options.layers:
        size = size._replace(lm=dataclasses.replace(size.lm, layers=options.layers))
    run = options.run or not (options.compile or jax.default_backend() == "cpu")
    if run and len(options.quant) * len(options.accumulate) > 1:
        parser.error("--run measures one setting a process: name one --quant and one --accumulate")
    if run and options.target:
        parser.error("--target compiles for a device that is not here: --run cannot use it")
    rows = [time_steps(options, size)] if run else state_memory(options, size)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def state_memory(options: argparse.Namespace, size: Size) -> list[dict]:
    """Prints the table of the compiled steps' buffers and returns its rows in bytes."""
    print(f"{machine('jax', 'flax', 'optax')}\n$ python {' '.join(sys.argv)}")
    device = absent_gpu(options.target.read_text()) if options.target else jax.devices()[0]
    print(f"Compiled for one {device.device_kind}, {options.dtype}, remat {options.remat}; GiB.\n")
    head = ("stage", "quant", "batch", "accumulate", "frozen", "not read", "trained parameters", "optimizer")
    print(f"| {' | '.join((*head, 'arguments', 'temporaries', 'peak', 'compile s'))} |\n|{'---|' * 12}", flush=True)
    rows = []
    for quant in options.quant:
        for accumulate in options.accumulate:
            case = case_of(options, size, quant, accumulate)
            made, seconds, sizes = compiled(case, device)
            trained, moments, frozen = case.arguments[:3]
            # jit drops arguments that the step does not read: they lie in memory beside it.
            idle = sum(map(nbytes, case.arguments)) - sizes["arguments"]
            row = {"stage": options.stage, "quant": quant, "batch": options.batch, "accumulate": accumulate}
            row |= {"frozen": nbytes(frozen), "not_read": idle, "trained": sum(x.size for x in trained.values())}
            row |= {"optimizer": nbytes(moments), **sizes, "compile_seconds": seconds}
            rows.append(row)
            gib = {name: f"{row[name] / GIB:.2f}" for name in ("frozen", "not_read", "optimizer", *sizes)}
            cells = (options.stage, quant, options.batch, accumulate, gib["frozen"], gib["not_read"])
            cells += (f"{row['trained']:,}", gib["optimizer"], gib["arguments"], gib["temporaries"], gib["peak"])
            print(f"| {' | '.join(map(str, cells))} | {seconds:.0f} |", flush=True)
            if options.hlo:
                options.hlo.mkdir(parents=True, exist_ok=True)
                (options.hlo / f"{options.stage}-{quant}-{accumulate}.txt").write_text(made.as_text())
    return rows


def absent_gpu(target: str):
    """The one device of a topology that is nowhere, for compiling only."""
    form = {"target_config": target, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="one", **form).devices[0]


def case_of(options: argparse.Namespace, size: Size, quant: str, accumulate: int) -> Case:
    """The case that the command line names."""
    chosen = {"batch": options.batch, "remat": options.remat, "dtype": options.dtype}
    return lavin_case(size, options.stage, quant=quant, accumulate=accumulate, **chosen)


def rates(size: Size, dtype) -> dict[str, float]:
    """The device's best FLOP/s on a square product in `dtype` and bytes/s (read and written) on a copy."""

    def best(work, x, per, number=20):
        jax.block_until_ready(work(x))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready([work(x) for _ in range(number)][-1])
            times.append((time.perf_counter() - start) / number)
        return per / min(times)

    n = size.matmul
    square = jax.random.normal(jax.random.key(0), (n, n), dtype)
    line = jnp.zeros((size.copy // jnp.dtype(dtype).itemsize,), dtype)
    return {
        "matmul_flops_per_s": best(jax.jit(lambda x: x @ x), square, 2 * n**3),
        "copy_bytes_per_s": best(jax.jit(lambda x: x + 1), line, 2 * line.nbytes, 3),
    }


def time_steps(options: argparse.Namespace, size: Size) -> dict:
    """Prints and returns one setting's record: rates of the device, step time, achieved share, memory."""
    case = case_of(options, size, options.quant[0], options.accumulate[0])
    device, dtype = jax.devices()[0], jnp.dtype(options.dtype)
    peak = rates(size, dtype)
    made, seconds, sizes = compiled(case)
    *state, frozen, batch, queues, key = arrays(case)
    times, losses = [], []
    for number in range(options.steps + 1):
        start = time.perf_counter()
        *state, metrics = made(*state, frozen, batch, queues, key, jnp.int32(number))
        losses.append(float(jax.block_until_ready(metrics)["loss"]))
        times.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"the losses of random weights are not finite: {losses}")
    median, work = statistics.median(times[1:]), flops(case, size.length)
    needed = work["forward"] + work["backward"]
    whole = needed + work["recomputed"]
    memory = device.memory_stats() or {}
    record = {
        "machine": machine("jax", "flax", "optax"),
        "device": device.device_kind,
        "command": f"python {' '.join(sys.argv)}",
        **{name: getattr(options, name) for name in ("size", "stage", "batch", "remat", "dtype")},
        "layers": size.lm.layers,
        "quant": options.quant[0],
        "accumulate": options.accumulate[0],
        "slots": size.length,
        **peak,
        "compile_seconds": seconds,
        "step_seconds": median,
        "step_seconds_all": times[1:],
        "tokens_per_s": options.batch * size.length / median,
        "flops": work,
        "model_share_of_matmul": needed / median / peak["matmul_flops_per_s"],
        "computed_share_of_matmul": whole / median / peak["matmul_flops_per_s"],
        "compiled_bytes": sizes,
        "device_peak_bytes": memory.get("peak_bytes_in_use"),
        "device_limit_bytes": memory.get("bytes_limit"),
        "losses": losses,
    }
    print(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main()

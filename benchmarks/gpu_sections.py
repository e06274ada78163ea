"""The sections of benchmarks/gpu.py, each a generator of rows; gpu.py runs them in processes of their own."""

import functools
import gc
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import clipcap_case
import jax
import jax.numpy as jnp
import lavin_case
import numpy as np
from step_case import Case, Updates, buffers, unit_keys
from timing import DevicePeak, Side, measure, rates, ratio

from eim_jax.decode import DecodeConfig, generate
from eim_jax.losses import queue_nce
from eim_jax.models.gpt2 import GPT2
from eim_jax.queues import compress

try:
    import torch
    import torch_lavin
    import torch_steps
    import transformers
except ImportError as error:  # the other side's columns stay empty
    torch, NO_TORCH = None, str(error)
else:
    if not torch.cuda.is_available():  # its threads would wait for JAX's
        torch.set_num_threads(1)

TAU = 0.07
FULL = {
    "matmul": 8192,
    "copy": 1 << 32,
    "keys": (566_747, 12_726, 10_000_000),
    "queue": (40, 768),
    "clipcap": (40, 256),
    "lavin": (
        ("adapter", "none", "full", 1, "softmax"),
        ("adapter", "none", "full", 1, "cudnn"),
        ("adapter", "nf4", "full", 1, "softmax"),
        ("adapter", "none", "dots", 2, "softmax"),
        ("ie", "none", "full", 1, "softmax"),
        ("st", "none", "full", 1, "softmax"),
        ("lm", "none", "full", 1, "softmax"),
        ("ie", "nf4", "full", 1, "softmax"),
        ("lm", "nf4", "full", 1, "softmax"),
    ),
    "lavin_size": "7b",
    "lavin_batch": 32,
    "decode": (40, 50, 40),
    "rounds": 5,
    "least": 0.3,
}
TINY = {
    "matmul": 256,
    "copy": 1 << 22,
    "keys": (700, 300),
    "queue": (4, 64),
    "clipcap": (4,),
    "lavin": (
        ("adapter", "none", "full", 1, "softmax"),
        ("adapter", "nf4", "full", 2, "xla"),
        ("st", "none", "full", 1, "softmax"),
    ),
    "lavin_size": "smallest",
    "lavin_batch": 4,
    "decode": (2, 4, 6),
    "rounds": 2,
    "least": 0.0,
}


class Setting(NamedTuple):
    """What all sections share; `modes` are PyTorch's: of "compiled" and "eager"."""

    size: str
    dtype: str
    modes: tuple[str, ...]
    peak: dict[str, float]  # timing.rates' figures; empty until they are measured
    attention: str = "softmax"  # of ClipCap's towers where no weight drops out, as config.towers.attention

    @property
    def numbers(self) -> dict[str, Any]:
        """The sizes of every section."""
        return FULL if self.size == "full" else TINY

    @property
    def device(self) -> "torch.device":
        """Where PyTorch works."""
        return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")

    def measure(self, sides: dict[str, Side]) -> dict[str, list[float]]:
        """timing.measure with this size's rounds."""
        return measure(sides, self.numbers["rounds"], self.numbers["least"])

    def target(self, words: str, value: float, met: bool) -> dict | None:
        """A target's verdict; at other sizes than the full one there is none."""
        return {"words": words, "value": value, "met": bool(met)} if self.size == "full" else None


def rates_section(setting: Setting) -> Iterator[dict]:
    """The device's own rates, by JAX and by PyTorch."""
    n, size = setting.numbers, setting.dtype
    yield {"case": "matmul and copy", "ours": rates(n["matmul"], n["copy"], jnp.dtype(size))}
    if torch is not None and setting.modes:
        square = torch.randn(n["matmul"], n["matmul"], device=setting.device).to(getattr(torch, size))
        line = torch.randn(n["copy"] // square.element_size(), device=setting.device).to(square.dtype)
        target = torch.empty_like(line)
        work = {"matmul": lambda: square @ square, "copy": lambda: target.copy_(line)}
        times = setting.measure({name: _torch_side(setting, run) for name, run in work.items()})
        found = {"matmul_flops_per_s": 2 * n["matmul"] ** 3 / min(times["matmul"])}
        found["copy_bytes_per_s"] = 2 * line.nbytes / min(times["copy"])
        yield {"case": "matmul and copy in PyTorch", "ours": {}, "torch": {"eager": found}}


def queue_section(setting: Setting) -> Iterator[dict]:
    """Loss and gradient against N keys; PyTorch reads the very same keys."""
    (b, width), dtype = setting.numbers["queue"], jnp.dtype(setting.dtype)
    for number in setting.numbers["keys"]:
        with DevicePeak() as peak:
            keys = jax.block_until_ready(unit_keys((number, width), dtype, jax.random.key(0, impl="rbg")))
            query = jax.random.normal(jax.random.key(1), (b, width), jnp.float32)
            index = jnp.arange(b) * (number // b)

            made, (value, gradient) = _queue_loss(query, keys, None, index)
        sides = {"ours": Side(functools.partial(made, query, keys, None, index))}
        row = {"case": f"N = {number:,}, B = {b}, D = {width}", "ours": _memory(buffers(made), peak), "torch": {}}
        row["ours"]["loss"] = float(value)
        for mode in _modes(setting):
            sides[mode], row["torch"][mode] = _torch_queue(setting, mode, query, keys, index, gradient)
        _fill(row, setting.measure(sides), b)
        over = _floor(row, keys.nbytes, setting)
        if number == FULL["keys"][0]:
            row["target"] = setting.target("<= 1.5 x the memory floor", over, over <= 1.5)
        if keys.nbytes < 64 << 20:
            row["note"] = "the keys fit in the cache, which the floor knows nothing of"
        yield row
        del sides
        with DevicePeak() as peak:
            codes, scale = jax.block_until_ready(jax.jit(compress, static_argnums=1)(keys, jnp.int8))
            del keys
            made, (value, coarse) = _queue_loss(query, codes, scale, index)
        row = {"case": f"int8 keys, N = {number:,}, B = {b}, D = {width}", "ours": _memory(buffers(made), peak)}
        row |= {"torch": {}}
        error = jnp.linalg.norm(coarse - gradient) / jnp.linalg.norm(gradient)
        row["ours"] |= {"loss": float(value), "gradient_differs": float(error)}
        _fill(row, setting.measure({"ours": Side(functools.partial(made, query, codes, scale, index))}), b)
        _floor(row, codes.nbytes + scale.nbytes, setting)
        yield row


def _queue_loss(query, keys, scale, index):
    """The compiled loss with its gradient to the queries, and what it gives."""

    def loss_of(query, keys, scale, index):
        nce = queue_nce(query, keys, index, count=len(keys), tau=TAU, scale=scale)
        return nce.loss / nce.weight

    made = jax.jit(jax.value_and_grad(loss_of)).lower(query, keys, scale, index).compile()
    return made, jax.block_until_ready(made(query, keys, scale, index))


def _floor(row: dict, nbytes: int, setting: Setting) -> float:
    """Adds the time that reading the keys once takes; returns how many times as long the loss took."""
    floor = nbytes / setting.peak["copy_bytes_per_s"]
    over = row["ours"]["seconds"] / floor
    row["ours"] |= {"floor_seconds": floor, "share": 1 / over, "share_of": "memory floor"}
    return over


def _torch_queue(setting, mode, query, keys, index, gradient) -> tuple[Side, dict]:
    shared = torch.from_dlpack(keys)
    theirs = torch.tensor(np.asarray(query), device=setting.device, requires_grad=True)
    rows = torch.tensor(np.asarray(index), device=setting.device).long()
    work = torch.compile(torch_steps.queue_loss, dynamic=False) if mode == "compiled" else torch_steps.queue_loss

    def run():
        theirs.grad = None
        loss = work(theirs, shared, rows)
        loss.backward()
        return loss

    with _TorchPeak(setting) as peak:
        loss = float(run().detach())
    error = np.linalg.norm(theirs.grad.float().cpu().numpy() - np.asarray(gradient)) / np.linalg.norm(gradient)
    return _torch_side(setting, run), {"loss": loss, "gradient_differs": float(error), **peak.found}


def clipcap_section(setting: Setting) -> Iterator[dict]:
    """ClipCap-EIM's three stages."""
    size = clipcap_case.SIZES[setting.size]
    for stage in ("ie", "lm", "st"):
        for batch in setting.numbers["clipcap"]:
            case = clipcap_case.clipcap_case(size, stage, batch=batch, dtype=setting.dtype, attention=setting.attention)
            sides, row = _jax_step(case, f"{stage}, batch {batch}")
            for mode in _modes(setting):
                with _TorchPeak(setting) as peak:
                    dtype = getattr(torch, setting.dtype)
                    step = torch_steps.clipcap_step(case, size, setting.device, dtype, mode == "compiled")
                    loss = float(step.run())
                sides[mode] = _torch_side(setting, step.run)
                row["torch"][mode] = {"loss": loss, "trained": step.trained, **peak.found}
            _fill(row, setting.measure(sides), batch)
            _share(row, clipcap_case.flops(case), setting)
            if stage == "ie" and "ratio" in row:
                row["target"] = setting.target(
                    ">= 1.3 x compiled PyTorch's samples/s", row["ratio"], row["ratio"] >= 1.3
                )
            yield row
            del sides
            gc.collect()


def lavin_section(setting: Setting) -> Iterator[dict]:
    """LaVIN's stages on this project's side; lavin_torch_section has the other."""
    for stage, quant, remat, accumulate, attention in setting.numbers["lavin"]:
        kind = "NF4" if quant == "nf4" else setting.dtype
        name = f"{stage}, {kind}, remat {remat}, {accumulate} micro-batch(es), attention {attention}"
        form = {"quant": quant, "remat": remat, "accumulate": accumulate, "attention": attention}
        try:
            yield _lavin_row(setting, stage, name, form)
        except Exception as error:  # a setting that does not fit leaves the others
            yield {"case": name, "ours": {}, "torch": {}, "note": f"failed: {type(error).__name__}: {error}"[:400]}
        gc.collect()


def _lavin_row(setting: Setting, stage: str, name: str, form: dict) -> dict:
    n, size = setting.numbers, lavin_case.SIZES[setting.numbers["lavin_size"]]
    case = lavin_case.lavin_case(size, stage, batch=n["lavin_batch"], dtype=setting.dtype, **form)
    sides, row = _jax_step(case, name)
    _fill(row, measure(sides, n["rounds"], 0.0), n["lavin_batch"])
    work = lavin_case.flops(case, size.length)
    needed = work["forward"] + work["backward"]
    if case.arguments[3].supervised is not None:  # step_case supervises half of a text; the head reads nothing else
        idle = case.arguments[3].tokens.size // 2
        needed -= 4 * idle * size.lm.width * size.lm.vocab
    _share(row, needed, setting)
    share = row["ours"]["share"]
    row["ours"]["share_with_recomputation"] = share * (needed + work["recomputed"]) / needed
    if stage == "adapter" and form["quant"] == "none":
        row["target"] = setting.target(">= 45 % of the matmul peak", share, share >= 0.45)
    return row


def lavin_torch_section(setting: Setting) -> Iterator[dict]:
    """LaVIN's stages in PyTorch, alone on the device; NF4 there needs a package that is not asked for."""
    n, size = setting.numbers, lavin_case.SIZES[setting.numbers["lavin_size"]]
    modes = _modes(setting)
    for stage in dict.fromkeys(stage for stage, quant, *_ in n["lavin"] if quant == "none"):
        form = {"quant": "none", "accumulate": 1, "dtype": setting.dtype}
        case = lavin_case.lavin_case(size, stage, batch=n["lavin_batch"], **form)
        row = {"case": f"{stage}, {setting.dtype}, blocks checkpointed", "ours": {}, "torch": {}}
        for mode in modes[:1]:
            with _TorchPeak(setting) as peak:
                step = torch_lavin.lavin_step(
                    case, stage, setting.device, getattr(torch, setting.dtype), mode == "compiled"
                )
                loss = float(step.run())
            row["torch"][mode] = {"loss": loss, "trained": step.trained, **peak.found}
            _fill(row, measure({mode: _torch_side(setting, step.run)}, n["rounds"], 0.0), n["lavin_batch"])
            del step
            gc.collect()
        if modes:
            yield row


def decode_section(setting: Setting) -> Iterator[dict]:
    """Captions of GPT-2 after visual tokens, greedy and by beams of 5, against transformers' generate."""
    b, prefix, tokens = setting.numbers["decode"]
    config = clipcap_case.SIZES[setting.size].lm
    config = type(config)(**{**vars(config), "dtype": jnp.dtype(setting.dtype)})
    lm = GPT2(config)
    drawn = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x.astype(config.dtype), drawn)
    visual = jax.random.normal(jax.random.key(1), (b, prefix, config.width)).astype(config.dtype)
    for name, chosen in (("beam 5", DecodeConfig("beam", 5, tokens)), ("greedy", DecodeConfig("greedy", 1, tokens))):
        work = functools.partial(generate, lm, params, visual, None, None, chosen, eos_id=None)
        with DevicePeak() as peak:
            jax.block_until_ready(work())
        row = {"case": f"{name}, batch {b}, {prefix} + {tokens} tokens", "ours": {"device_peak_bytes": peak.bytes}}
        sides, row["torch"] = {"ours": Side(work)}, {}
        if _modes(setting):
            with _TorchPeak(setting) as held:
                sides["eager"] = _torch_side(setting, _transformers(setting, config, visual, chosen))
                sides["eager"].wait(sides["eager"].run())
            row["torch"]["eager"] = held.found
        _fill(row, setting.measure(sides), b)
        if name == "beam 5" and "ratio" in row:
            row["target"] = setting.target(">= 4 x transformers' generate", row["ratio"], row["ratio"] >= 4)
        yield row


def _transformers(setting: Setting, c, visual, chosen: DecodeConfig):
    """transformers' generate of exactly as many tokens."""
    shape = {"vocab_size": c.vocab, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).to(setting.device, getattr(torch, setting.dtype)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    embeds = torch.from_dlpack(visual).clone()
    options = {"max_new_tokens": chosen.max_tokens, "num_beams": chosen.beams, "do_sample": False}

    def run():
        with torch.no_grad():
            found = model.generate(inputs_embeds=embeds, **options)
        if found.shape != (len(embeds), chosen.max_tokens):
            raise RuntimeError(f"generate gave {tuple(found.shape)}, not {chosen.max_tokens} tokens a row")
        return found

    return run


def _jax_step(case: Case, name: str) -> tuple[dict[str, Side], dict]:
    """The compiled step with random arguments, one update done, and the row that says what it is."""
    with DevicePeak() as peak:
        step = Updates(case)
        loss = float(step.run())
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: the loss of random weights is {loss}")
    ours = {"loss": loss, "compile_seconds": step.compile_seconds, **_memory(step.buffers, peak)}
    ours["trained"] = sum(leaf.size for leaf in case.arguments[0].values())
    return {"ours": Side(step.run)}, {"case": name, "ours": ours, "torch": {}}


def _modes(setting: Setting) -> tuple[str, ...]:
    return setting.modes if torch is not None else ()


def _memory(held: dict[str, int], peak: DevicePeak) -> dict:
    return {"compiled_bytes": held["peak"], "device_peak_bytes": peak.bytes}


def _torch_side(setting: Setting, run) -> Side:
    return Side(run, lambda _: torch_steps.wait(setting.device))


class _TorchPeak:
    """The most bytes that PyTorch's allocator held in a `with` block above what it held before."""

    def __init__(self, setting: Setting):
        self.cuda, self.found = setting.device.type == "cuda", {}

    def __enter__(self) -> "_TorchPeak":
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.found = {"device_peak_bytes": torch.cuda.max_memory_allocated() - self.before}


def _fill(row: dict, times: dict[str, list[float]], samples: int) -> None:
    """Adds medians, rates and the ratio to PyTorch's first mode."""
    for name, seconds in times.items():
        part = row["ours"] if name == "ours" else row["torch"][name]
        median = statistics.median(seconds)
        part |= {"seconds": median, "seconds_all": seconds, "samples_per_s": samples / median}
    others = [name for name in times if name != "ours"]
    if others and "ours" in times:
        row["ratio"], row["ratio_to"] = ratio(times, "ours", others[0]), others[0]


def _share(row: dict, work: float, setting: Setting) -> None:
    share = work / row["ours"]["seconds"] / setting.peak["matmul_flops_per_s"]
    row["ours"] |= {"flops": work, "share": share, "share_of": "matmul peak"}


SECTIONS = {
    "rates": rates_section,
    "queue": queue_section,
    "clipcap": clipcap_section,
    "decode": decode_section,
    "lavin": lavin_section,
    "lavin_torch": lavin_torch_section,
}
